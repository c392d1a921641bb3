"""Mutual scoring: how far each patch of an image is from the nearest patch of every other image.

    a_ij^m = min_n || z_i^m - z_j^n ||,   score_i^m = mean of the smallest share of a_ij^m over j != i

(Li et al., MuSc, ICLR 2024, arXiv:2401.16753, sec. 3.3.) Of the distance matrix, patches x patches, only one tile exists at a
time: N numbers per patch are kept for N images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.checks import FLOATS, check_dtype, check_not_empty, check_range, check_shape
from eff_kernels.mutual_score import library

__all__ = ["mutual_distances", "mutual_score"]


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
    check_dtype("mutual_distances", "z", z, FLOATS)
    check_shape("mutual_distances", "z", z, ("images", "patches", "channels"))
    check_not_empty("mutual_distances", "z", z)
    check_range("mutual_distances", "number of images", len(z), 2, torch.inf)
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(z).all()):
        raise ValueError("mutual_distances: z holds NaN or infinity, expected finite features")
    result: Tensor = library.mutual_distances_op(z)
    return result


def mutual_score(z: Tensor, low: float = 0.0, high: float = 0.3) -> Tensor:
    """Return the interval average of each patch's distances to the other images, (N, L).

    Args:
        z: as for `mutual_distances`.
        low, high: of the N - 1 distances in ascending order, those from share `low` to share `high` are averaged; values
            of 1 and more are counts. At least one distance is taken, where the reference code has NaN.

    Raises:
        TypeError, ValueError: as `mutual_distances`, or low and high are no interval.
    """
    others = len(z) - 1
    if not 0 <= low < high:
        raise ValueError(f"mutual_score: low and high are {low} and {high}, expected 0 <= low < high")
    last = min(others, max(1, int(high if high >= 1 else high * others)))
    first = min(last - 1, int(low if low >= 1 else low * others))
    nearest = mutual_distances(z).topk(last, dim=1, largest=False).values  # the image itself, at infinity, never is
    return nearest[:, first:].mean(1)
