"""The common basis: PCA of peak-scaled filters by streaming moments (Gavrikov and Keuper, 2022, sec. 3).

f' = f / max |f|                                     a zero filter stays zero
C = E[(f' - m)(f' - m)^T] = B^T diag(v) B            rows of B: eigen-filters
c = (f' - m) B^T,  a_i = v_i / sum v                 coefficients, explained variance ratios
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from eff.errors import UnsupportedModelError
from eff_eval_filter_db.layers import Array, Layer

# Below (this many epsilons)^2 of the mean square, variance is what rounding leaves of equal filters.
ROUNDING = 128


def scale_by_peak(rows: Array) -> Array:
    """Return each row of (n, d) divided by its largest absolute entry; zero rows stay zero."""
    peak = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    scaled: Array = rows / np.where(peak == 0, 1, peak)
    return scaled


@dataclass(frozen=True)
class Basis:
    """Eigen-filters of a set of filters."""

    mean: Array
    """(d,)."""
    components: Array
    """(d, d), one per row, by decreasing variance; the entry that is largest in magnitude is positive."""
    ratios: Array
    """(d,) explained variance ratios a_i; sum 1."""
    count: int

    def coefficients(self, rows: Array) -> Array:
        """Return the coefficients (n, d) of scaled filters (n, d)."""
        projected: Array = (rows - self.mean) @ self.components.T
        return projected


class Moments:
    """Count, mean and centred scatter of rows, merged block by block (Chan, Golub, LeVeque, 1979)."""

    def __init__(self, size: int, dtype: str = "float64"):
        self.count = 0
        self.mean = np.zeros(size, dtype)
        self.scatter = np.zeros((size, size), dtype)
        self.square = 0.0
        """Sum of all squared entries; tells variance from rounding."""

    def add(self, rows: Array) -> None:
        """Take in rows (n, d)."""
        if not len(rows):
            return
        mean = rows.mean(axis=0)
        centred = rows - mean
        shift = mean - self.mean
        total = self.count + len(rows)
        self.scatter += centred.T @ centred + np.outer(shift, shift) * (self.count * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.count = total
        self.square += float(np.square(rows).sum())

    def variances(self) -> tuple[Array, Array]:
        """Return the variances (d,) in decreasing order and their directions (d, d) in rows."""
        values, vectors = np.linalg.eigh(self.scatter / max(self.count - 1, 1))
        values = np.clip(values[::-1], 0, None)
        noise = (ROUNDING * np.finfo(self.scatter.dtype).eps) ** 2
        if values.sum() <= noise * self.square / max(self.count, 1):
            values = np.zeros_like(values)
        return values, vectors.T[::-1]

    def basis(self) -> Basis:
        """Return the PCA of what was added.

        Raises:
            UnsupportedModelError: all rows are equal.
        """
        values, vectors = self.variances()
        if not values.sum():
            raise UnsupportedModelError(
                f"eval_filter_db: all {self.count} filters are equal, so they have no principal shapes; "
                "use a model that has been initialised"
            )
        largest = np.abs(vectors).argmax(axis=1)
        signs = np.sign(vectors[np.arange(len(vectors)), largest])
        return Basis(self.mean.copy(), vectors * signs[:, None], values / values.sum(), self.count)


def filters_of(layer: Layer, scale: bool, dtype: str) -> Array:
    """Return the filters (n, d) of a layer as the PCA sees them."""
    rows = layer.rows(dtype)
    return scale_by_peak(rows) if scale else rows


def fit_basis(layers: Iterable[Layer], size: int, scale: bool = True, dtype: str = "float64") -> Basis:
    """Return the PCA of all filters of `layers`, one layer in memory at a time.

    Args:
        layers: where the filters are.
        size: numbers per filter, k * k.
        scale: divide each filter by its peak.
        dtype: of the sums.
    """
    moments = Moments(size, dtype)
    for layer in layers:
        moments.add(filters_of(layer, scale, dtype))
    return moments.basis()
