"""How degenerate a layer's filters are: sparsity, variance entropy, orthogonality.

The scores of Gavrikov and Keuper (2022, sec. 5); formulas as in paulgavrikov/torchconvquality (MIT),
written anew in numpy. In float64: half precision is too coarse for the entropy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from eff_eval_filter_db.basis import Moments
from eff_eval_filter_db.config import PAPER_KERNEL, FilterDBConfig
from eff_eval_filter_db.layers import Array, Layer

# T(n) = L / (1 + exp(-k (log2 n - x0))) + b, fitted by the authors to the smallest entropy of random layers of n filters.
_L, _X0, _K, _B = 1.2618047, 2.30436435, 0.88767525, -0.31050834


def sparse_filters(rows: Array, eps: float) -> Array:
    """Return which filters (n, d) have all weights below `eps` times the layer's largest magnitude."""
    largest = np.abs(rows).max(initial=0.0)
    threshold = eps * largest if largest else 1.0
    sparse: Array = (np.abs(rows) < threshold).all(axis=1)
    return sparse


def variance_entropy(rows: Array) -> float:
    """Return H = -sum p log10 p of the filters' (n, d) variances p along their principal directions.

    0 where they are all equal, log10 d where every direction is used alike. Directions without
    variance add nothing (the authors' library gives NaN there).
    """
    moments = Moments(rows.shape[1], str(rows.dtype))
    moments.add(rows)
    variances, _ = moments.variances()
    if not variances.sum():
        return 0.0
    share = variances[variances > 0] / variances.sum()
    return float(-(share * np.log10(share)).sum()) + 0.0  # no -0.0


def random_entropy(count: int) -> float | None:
    """Return T(n), the entropy from which `count` 3x3 filters are as random as noise.

    None for fewer than 3 filters: the authors' fit is negative there, and any layer would be random.
    """
    fitted = _L / (1 + math.exp(-_K * (math.log2(count) - _X0))) + _B if count else 0.0
    return fitted if fitted > 0 else None


def orthogonality(weight: Array, groups: int) -> float | None:
    """Return 1 - mean |G - I| over pairs of output channels, G the Gram matrix of normalised channels.

    1: orthogonal, 0: all parallel. Channels of different groups see different inputs, so each group is
    measured alone and the mean returned (ours). A zero channel also adds 1 on the diagonal, as in the
    authors' library.

    Args:
        weight: (O, I/groups, k, k).
        groups: of the convolution.

    Returns:
        None where a group has one output channel (depthwise, O = 1): there is nothing to compare.
    """
    per_group = len(weight) // groups
    if per_group < 2:
        return None
    rows = weight.reshape(groups, per_group, -1)
    norm = np.linalg.norm(rows, axis=2, keepdims=True)
    rows = rows / np.where(norm == 0, 1, norm)
    deviation = np.abs(rows @ rows.transpose(0, 2, 1) - np.eye(per_group)).sum(axis=(1, 2))
    return float(np.mean(1 - deviation / (per_group * (per_group - 1))))


def orthogonality_bound(shape: tuple[int, int], groups: int, size: int) -> float:
    """Return the largest orthogonality that O channels of length I/groups * size can have.

    1 up to as many channels as dimensions; beyond, |g| >= g^2 and Welch's bound on the sum of squares
    give 1 - (N - d) / (d (N - 1)).
    """
    channels, length = shape[0] // groups, shape[1] * size
    return 1.0 if channels <= length else 1 - (channels - length) / (length * (channels - 1))


@dataclass(frozen=True)
class Quality:
    """A layer's scores; None where one is not defined."""

    filters: int
    sparsity: float
    entropy: float
    threshold: float | None
    clean_filters: int
    clean_entropy: float | None
    clean_threshold: float | None
    orthogonality: float | None
    orthogonality_bound: float | None
    is_zero: bool

    @property
    def normalised_entropy(self) -> float | None:
        """H / T(n); None where T(n) is not known."""
        return None if self.threshold is None else self.entropy / self.threshold

    def flags(self, config: FilterDBConfig) -> list[str]:
        """Return what is wrong with the layer."""
        # n filters vary in n - 1 directions at most: where even random ones are below, a low entropy says nothing.
        can_be_diverse = self.filters - 1 > 10**config.low_entropy and (
            self.threshold is None or self.threshold > config.low_entropy
        )
        named = {
            "all zero": self.is_zero,
            "sparse": self.sparsity >= config.sparse_share,
            "random": self.threshold is not None and not self.is_zero and self.entropy >= self.threshold,
            "low diversity": can_be_diverse and self.entropy < config.low_entropy,
        }
        return [name for name, holds in named.items() if holds]


def layer_quality(layer: Layer, config: FilterDBConfig) -> Quality:
    """Return the scores of a layer."""
    weight = layer.read().astype(config.dtype, copy=False)
    rows = weight.reshape(layer.count, -1)
    sparse = sparse_filters(rows, config.sparsity_eps)
    clean = rows[~sparse]
    knows_noise = config.kernel == PAPER_KERNEL
    known = layer.groups is not None
    return Quality(
        filters=len(rows),
        sparsity=float(sparse.mean()),
        entropy=variance_entropy(rows),
        threshold=random_entropy(len(rows)) if knows_noise else None,
        clean_filters=len(clean),
        clean_entropy=variance_entropy(clean) if len(clean) else None,
        clean_threshold=random_entropy(len(clean)) if knows_noise else None,
        orthogonality=orthogonality(weight, layer.groups) if layer.groups is not None else None,
        orthogonality_bound=orthogonality_bound(layer.shape, layer.groups or 1, rows.shape[1])
        if known and layer.shape[0] > (layer.groups or 1)
        else None,
        is_zero=not rows.any(),
    )
