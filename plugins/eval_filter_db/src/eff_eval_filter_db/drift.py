"""Distribution shift between groups of filters (Gavrikov and Keuper, 2022, sec. 4).

    D(P, Q) = sum_i a_i * ( sum_x p_i ln(p_i / q_i) + sum_x q_i ln(q_i / p_i) )

p_i, q_i: histograms of the i-th coefficient on the common basis, all axes and groups over the range of
all coefficients; a_i: that basis' explained variance ratios. Empty bins count as float32's epsilon
*in density*, before the histogram is normalised, as the authors' notebook does.

An empty bin costs ln(p / epsilon), and a small group has more of them: every distance here is between
equally many filters, drawn without replacement, and `floor` is what two draws from one pool give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eff_eval_filter_db.basis import Basis, filters_of
from eff_eval_filter_db.layers import Array, Layer

EMPTY = float(np.finfo(np.float32).eps)
FLOOR_DRAWS = 5
FINE_BINS = 512
"""Bins of the histograms that curves are drawn from."""


def distributions(counts: Array, width: float) -> Array:
    """Return counts (..., bins) as distributions that sum to 1, with empty bins lifted.

    Args:
        counts: of one axis each, not all zero.
        width: of a bin.
    """
    density = counts / (counts.sum(axis=-1, keepdims=True) * width)
    density = np.where(density == 0, EMPTY, density)
    lifted: Array = density / density.sum(axis=-1, keepdims=True)
    return lifted


def shifts(distribution: Array, others: Array, ratios: Array) -> Array:
    """Return D (g,) of one group's distributions (d, bins) to those of others (g, d, bins)."""
    divergence = ((distribution - others) * (np.log(distribution) - np.log(others))).sum(axis=-1)
    weighted: Array = (divergence * ratios).sum(axis=-1)
    return weighted


def shift_matrix(stacked: Array, ratios: Array) -> Array:
    """Return D (g, g) between all groups of distributions (g, d, bins); zero diagonal, symmetric."""
    return np.stack([shifts(row, stacked, ratios) for row in stacked])


@dataclass(frozen=True)
class Drift:
    """How far groups of filters are from each other."""

    names: tuple[str, ...]
    """By increasing mean distance to the rest."""
    counts: tuple[int, ...]
    matched: Array
    """(g, g) D between equally many filters of each."""
    unmatched: Array
    """(g, g) D between all filters, as the paper has it."""
    drawn: int
    """Filters of each group in `matched`."""
    floor: float
    """Mean D between two disjoint draws of that size from the pool of all groups."""

    def upper(self) -> Array:
        """Return the distances of all pairs."""
        distances: Array = self.matched[np.triu_indices(len(self.names), 1)]
        return distances

    def rows(self) -> list[dict[str, object]]:
        """Return one row per pair of groups."""
        first, second = np.triu_indices(len(self.names), 1)
        return [
            {
                "first": self.names[i],
                "second": self.names[j],
                "drift": float(self.matched[i, j]),
                "drift_all_filters": float(self.unmatched[i, j]),
                "filters_drawn": self.drawn,
                "filters_first": self.counts[i],
                "filters_second": self.counts[j],
                "floor": self.floor,
            }
            for i, j in zip(first.tolist(), second.tolist(), strict=True)
        ]


class Projector:
    """Histograms of groups on a common basis."""

    def __init__(self, basis: Basis, layers: Sequence[Layer], bins: int, scale: bool, dtype: str):
        self.basis, self.bins, self.scale, self.dtype = basis, bins, scale, dtype
        extremes = [(values.min(), values.max()) for values in (self.coefficients(layer) for layer in layers)]
        low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
        self.range = (float(low), float(high))

    @property
    def width(self) -> float:
        """Width of a bin."""
        return (self.range[1] - self.range[0]) / self.bins

    def coefficients(self, layer: Layer) -> Array:
        """Return the coefficients (n, d) of a layer's filters."""
        return self.basis.coefficients(filters_of(layer, self.scale, self.dtype))

    def histograms(self, layers: Sequence[Layer], masks: Array, bins: int | None = None) -> Array:
        """Return counts (m, d, bins) of the filters that each of m masks chooses, layer by layer.

        Args:
            layers: of one group.
            masks: (m, n) booleans over the filters of all layers, in order.
            bins: unset: the projector's.
        """
        bins = bins or self.bins
        counts = np.zeros((len(masks), len(self.basis.ratios), bins), np.int64)
        start = 0
        for layer in layers:
            values = self.coefficients(layer)
            for position, mask in enumerate(masks):
                chosen = values[mask[start : start + len(values)]]
                for axis in range(chosen.shape[1]):
                    counts[position, axis] += np.histogram(chosen[:, axis], bins, self.range)[0]
            start += len(values)
        return counts


def draw(count: int, total: int, rng: np.random.Generator) -> Array:
    """Return a mask (total,) that chooses `count` places at random."""
    mask = np.zeros(total, bool)
    mask[rng.choice(total, count, replace=False)] = True
    return mask


def measure_drift(groups: Mapping[str, Sequence[Layer]], projector: Projector, rng: np.random.Generator) -> Drift:
    """Return the distances between groups.

    Args:
        groups: at least two, each with its layers.
        projector: common basis and range, made from the layers of all groups.
        rng: draws the filters that are compared.
    """
    names = list(groups)
    sizes = [sum(layer.count for layer in layers) for layers in groups.values()]
    drawn = min(sizes)
    masks = [np.stack([draw(drawn, size, rng), np.ones(size, bool)]) for size in sizes]
    counts = [projector.histograms(layers, mask) for layers, mask in zip(groups.values(), masks, strict=True)]
    ratios = projector.basis.ratios
    matched, unmatched = (
        shift_matrix(distributions(np.stack(part), projector.width), ratios) for part in zip(*counts, strict=True)
    )
    order = np.argsort(matched.sum(axis=1), kind="stable")
    return Drift(
        tuple(names[i] for i in order),
        tuple(sizes[i] for i in order),
        matched[np.ix_(order, order)],
        unmatched[np.ix_(order, order)],
        drawn,
        _floor([layer for layers in groups.values() for layer in layers], drawn, projector, rng),
    )


def _floor(pool: Sequence[Layer], drawn: int, projector: Projector, rng: np.random.Generator) -> float:
    total = sum(layer.count for layer in pool)
    masks = np.zeros((2 * FLOOR_DRAWS, total), bool)
    for first in range(0, len(masks), 2):
        both = rng.choice(total, 2 * drawn, replace=False)
        masks[first, both[:drawn]] = True
        masks[first + 1, both[drawn:]] = True
    made = distributions(projector.histograms(pool, masks), projector.width)
    distances = [shifts(made[i], made[i + 1 : i + 2], projector.basis.ratios)[0] for i in range(0, len(made), 2)]
    return float(np.mean(distances))


def density_curves(layers: Sequence[Layer], projector: Projector) -> tuple[Array, Array]:
    """Return places (FINE_BINS,) and Gaussian kernel densities (d, FINE_BINS) there, for drawing only.

    Silverman's bandwidth; the sum over filters is one over the bins of a fine histogram.
    """
    everything = np.ones((1, sum(layer.count for layer in layers)), bool)
    counts = projector.histograms(layers, everything, FINE_BINS)[0]
    low, high = projector.range
    step = (high - low) / FINE_BINS
    places = low + step * (np.arange(FINE_BINS) + 0.5)
    total = counts.sum(axis=1, keepdims=True)
    mean = (counts * places).sum(axis=1, keepdims=True) / total
    deviation = np.sqrt((counts * (places - mean) ** 2).sum(axis=1) / np.maximum(total[:, 0] - 1, 1))
    bandwidth = np.maximum(deviation * (0.75 * total[:, 0]) ** -0.2, step)
    distance = places[:, None] - places[None, :]
    kernels = np.exp(-0.5 * (distance / bandwidth[:, None, None]) ** 2) / (
        bandwidth[:, None, None] * np.sqrt(2 * np.pi)
    )
    curves: Array = np.einsum("dxy,dy->dx", kernels, counts / total)
    return places, curves
