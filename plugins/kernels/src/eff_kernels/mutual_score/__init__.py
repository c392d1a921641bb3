"""Mutual scoring: how far each patch of an image is from the nearest patch of every other image.

    a_ij^m = min_n || z_i^m - z_j^n ||,   score_i^m = mean of the smallest share of a_ij^m over j != i

(Li et al., MuSc, ICLR 2024, arXiv:2401.16753, sec. 3.3.) Of the distance matrix, patches x patches, only one tile exists at a
time: N numbers per patch are kept for N images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eff_kernels.checks import FLOATS, check_dtype, check_not_empty, check_number, check_range, check_shape
from eff_kernels.mutual_score import library
from eff_kernels.mutual_score.reference import wide_dtype

__all__ = ["mutual_distances", "mutual_score"]

SQUARED_SAFELY = 40
"""Features up to 2^40 in magnitude, and sets whose largest is at least 2^-41, are squared and added as they are."""


def mutual_distances(z: Tensor) -> Tensor:
    """Return the distance of each patch to the nearest patch of each image. No backward.

    From |a|^2 + |b|^2 - 2 ab with accumulation in float32 (float64 for float64): exact to about 1e-6 of the largest
    norm where patches differ, and sqrt(1e-6) of it where they coincide, as in torch.cdist.

    Args:
        z: features of N images with L patches, (N, L, C), N >= 2; float16, bfloat16, float32 or float64.

    Returns:
        (N, N, L), float32 (float64 for float64): [i, j, m] from patch m of image i to image j; infinity for j = i.

    Raises:
        TypeError: `z` is not floating point.
        ValueError: wrong shape, fewer than 2 images, no patches, or NaN or infinity in it.
    """
    _check("mutual_distances", z)
    return _distances("mutual_distances", z)


def _check(op: str, z: Tensor) -> None:
    check_dtype(op, "z", z, FLOATS)
    check_shape(op, "z", z, ("images", "patches", "channels"))
    check_not_empty(op, "z", z)
    check_range(op, "number of images", len(z), 2, torch.inf)


def _distances(op: str, z: Tensor) -> Tensor:
    """Return the distances; where squares would leave float32 they are taken of features scaled by a power of two."""
    if torch.compiler.is_compiling() or z.is_meta:
        found: Tensor = library.mutual_distances_op(z)
        return found
    low, high = torch.aminmax(z.detach())
    largest = float(torch.maximum(-low, high))
    if not math.isfinite(largest):
        raise ValueError(f"{op}: z holds NaN or infinity, expected finite features")
    exponent = math.frexp(largest)[1]
    if not largest or abs(exponent) <= SQUARED_SAFELY:
        result: Tensor = library.mutual_distances_op(z)
        return result
    # In two factors: 2^-exponent alone may be no normal number.
    half, rest = math.ldexp(1.0, exponent // 2), math.ldexp(1.0, exponent - exponent // 2)
    scaled: Tensor = library.mutual_distances_op(z.to(wide_dtype(z)) / half / rest)
    return scaled * half * rest


def mutual_score(z: Tensor, low: float = 0.0, high: float = 0.3) -> Tensor:
    """Return the interval average of each patch's distances to the other images, (N, L).

    Args:
        z: as for `mutual_distances`.
        low, high: of the N - 1 distances in ascending order, those from share `low` to share `high` are averaged; values
            of 1 and more are counts. At least one distance is taken, where the reference code has NaN.

    Raises:
        TypeError, ValueError: as `mutual_distances`, or low and high are no interval.
    """
    _check("mutual_score", z)
    others = len(z) - 1
    for name, value in (("low", low), ("high", high)):
        check_number("mutual_score", name, value)
    if not 0 <= low < high:
        raise ValueError(f"mutual_score: low and high are {low} and {high}, expected 0 <= low < high")
    last = min(others, max(1, int(high if high >= 1 else high * others)))
    first = min(last - 1, int(low if low >= 1 else low * others))
    nearest = (
        _distances("mutual_score", z).topk(last, dim=1, largest=False).values
    )  # the image itself, at infinity, never is
    return nearest[:, first:].mean(1)
