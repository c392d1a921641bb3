"""Nearest codeword: the entry of a codebook closest to each of many short vectors.

    a_t = argmin_j |x_t - c_j|^2,   the smallest j where several are equally near

(VQ-VAE, van den Oord et al., NeurIPS 2017, arXiv:1711.00937; with 100,000 entries VQGAN-LC, arXiv:2406.11837.) Of the distance
matrix, vectors x entries, only one tile exists at a time.
"""

from __future__ import annotations

from torch import Tensor

from eff_kernels.checks import (
    FLOATS,
    check_count,
    check_device,
    check_dtype,
    check_finite,
    check_not_empty,
    check_shape,
)
from eff_kernels.nearest_code import library
from eff_kernels.nearest_code.reference import BLOCK, wide_dtype

__all__ = ["nearest_code", "nearest_code_distance"]


def nearest_code(x: Tensor, codebook: Tensor, block: int = BLOCK, columns: int = 0) -> Tensor:
    """Return the index of the nearest entry of each vector. No backward.

    From |c|^2 - 2 x c about the mean of the codebook, accumulated in float32 (float64 for float64): of entries whose squared
    distances differ by less than about 1e-6 of the squared norms about that mean, either may be found. NaN and infinity, which
    would give any index, are refused on the CPU (elsewhere and under torch.compile nobody looks).

    Args:
        x: vectors (T, d), float16, bfloat16, float32 or float64.
        codebook: entries (N, d), N >= 1, dtype and device of x.
        block: distances that the CPU holds at once.
        columns: entries of one such block; 0: a few times as many as vectors.

    Returns:
        (T,), int64.

    Raises:
        TypeError: no floating point, or two dtypes, or a size that is no integer.
        ValueError: shapes do not fit, the codebook is empty, a size is out of range, or NaN or infinity (CPU).
    """
    check_dtype("nearest_code", "x", x, FLOATS)
    check_dtype("nearest_code", "codebook", codebook, (x.dtype,))
    check_shape("nearest_code", "x", x, ("vectors", "d"))
    check_shape("nearest_code", "codebook", codebook, ("entries", x.shape[1]))
    check_not_empty("nearest_code", "codebook", codebook)
    check_device("nearest_code", "codebook", codebook, "x", x)
    check_count("nearest_code", "block", block, 1, 2**31)
    check_count("nearest_code", "columns", columns, 0, 2**31)
    check_finite("nearest_code", "x", x)
    check_finite("nearest_code", "codebook", codebook)
    result: Tensor = library.nearest_code_op(x, codebook, block, columns)
    return result


def nearest_code_distance(x: Tensor, codebook: Tensor, block: int = BLOCK, columns: int = 0) -> tuple[Tensor, Tensor]:
    """Return the codes (T,) of `nearest_code` and the squared distances (T,), float32 (float64 for float64), from differences."""
    codes = nearest_code(x, codebook, block, columns)
    wide = wide_dtype(x)
    return codes, (x.to(wide) - codebook.to(wide)[codes]).square().sum(1)
