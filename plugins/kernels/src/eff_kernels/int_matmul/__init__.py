"""Matrix product of 8-bit integers whose 32-bit sums go straight to the next layer's integer grid.

    y[i, n] = clip(round((sum_k x[i, k] * weight[n, k] + bias[n]) * multiplier[n] / 2^shift[n]), q_min, q_max)

The rescaling is a dyadic number: integer multiply, then shift (HAWQ-V3, Yao et al., ICML 2021, arXiv:2011.10680, sec. 3).
No float takes part in the result, so it is the same bit for bit on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.checks import (
    FLOATS,
    check_choice,
    check_contiguous,
    check_device,
    check_dtype,
    check_integer,
    check_no_gradient,
    check_not_empty,
    check_readable,
    check_shape,
    check_values,
)
from eff_kernels.int_matmul import library

__all__ = ["dyadic", "int_matmul", "longest_sum", "scaled_int_matmul"]

ROUNDINGS = ("half_up", "half_even")
LARGEST_RATIO = 2.0**30 - 0.25
"""From here on the multiplier rounds to 2^31, which would take a shift of 0."""
MAX_SHIFT = 62
"""Largest shift: (sum + bias) * multiplier plus half of 2^shift must fit 64 bits."""


def longest_sum(dtype: torch.dtype) -> int:
    """Return the largest K for activations of `dtype`: sums stay within 2^30.

    That leaves room for any 32-bit bias, and for the multiplier in 64 bits.

    Raises:
        TypeError: `dtype` is neither int8 nor uint8.
    """
    if dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"longest_sum: dtype is {dtype!r}, expected torch.int8 or torch.uint8")
    largest = 128 if dtype == torch.int8 else 255
    return int(2**30 // (largest * 128))


def int_matmul(
    x: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    shift: Tensor,
    *,
    q_min: int,
    q_max: int,
    bias: Tensor | None = None,
    rounding: str = "half_up",
) -> Tensor:
    """Return the requantized product; no backward.

    Sums are exact int32, the rescaling is exact int64. ReLU is free: `q_min=0`.

    Args:
        x: activations, shape (..., K), int8 or uint8 (4-bit codes are either), zero point 0.
        weight: shape (N, K), int8, contiguous.
        multiplier: m of `dyadic`, shape (N,), int32, above 0.
        shift: e of `dyadic`, shape (N,), int32, in [1, 62]. Both are looked at on the CPU only, and not under
            torch.compile: elsewhere that would wait for the device.
        q_min: smallest level of the result.
        q_max: largest level of the result; with `q_min` in [-128, 127] or in [0, 255].
        bias: on the grid of the sums (scale of x times scale of the weight), shape (N,), int32; None is 0.
        rounding: of ties, "half_up" (toward plus infinity, what adding half and shifting does) or "half_even".

    Returns:
        Shape (..., N), int8 where the levels fit it, else uint8.

    Raises:
        TypeError: a dtype is not as stated, or `q_min` or `q_max` is no integer.
        ValueError: a shape, device or layout does not fit, the range is empty or too wide, K is above `longest_sum`, a
            multiplier or shift is out of range.
    """
    op = "int_matmul"
    _check_operands(op, x, weight)
    for name, value in (("multiplier", multiplier), ("shift", shift), ("bias", bias)):
        if name != "bias" or value is not None:
            check_dtype(op, name, value, (torch.int32,))
            check_shape(op, name, value, (weight.shape[0],))
            check_device(op, name, value, "x", x)
    check_integer(op, "q_min", q_min)
    check_integer(op, "q_max", q_max)
    if not (-128 <= q_min < q_max <= 127 or 0 <= q_min < q_max <= 255):
        raise ValueError(f"{op}: q_min and q_max are {q_min} and {q_max}, expected a range in [-128, 127] or [0, 255]")
    check_choice(op, "rounding", rounding, ROUNDINGS)
    check_values(op, "multiplier", multiplier, 1, 2**31 - 1, "at least 1, as dyadic gives it")
    check_values(op, "shift", shift, 1, MAX_SHIFT, f"1 to {MAX_SHIFT}, as dyadic gives it")
    k = weight.shape[1]
    y = library.run(x.reshape(-1, k), weight, multiplier, shift, bias, q_min, q_max, rounding == "half_even")
    return y.view(*x.shape[:-1], weight.shape[0])


def scaled_int_matmul(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return (x @ weight^T) * scale + bias in float32, the sums exact int32; no backward.

    What follows such a layer in float: a norm, an addition, a softmax.

    Args:
        x: activations, shape (..., K), int8 or uint8, zero point 0.
        weight: shape (N, K), int8, contiguous.
        scale: scale of x times scale of the weight, shape (N,), float32. NaN in it or in the bias reaches its column.
        bias: shape (N,), float32.

    Returns:
        Shape (..., N), float32.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: a shape, device or layout does not fit, K is above `longest_sum`, `scale` or `bias` asks for a gradient.
    """
    op = "scaled_int_matmul"
    _check_operands(op, x, weight)
    for name, value in (("scale", scale), ("bias", bias)):
        if name == "scale" or value is not None:
            check_dtype(op, name, value, (torch.float32,))
            check_shape(op, name, value, (weight.shape[0],))
            check_device(op, name, value, "x", x)
            check_no_gradient(op, name, value, "which this product does not give")
    y = library.run_scaled(x.reshape(-1, weight.shape[1]), weight, scale, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _check_operands(op: str, x: Tensor, weight: Tensor) -> None:
    """Raise where x and weight are no 8-bit matrices that fit, or their sums could overflow."""
    check_dtype(op, "x", x, (torch.int8, torch.uint8))
    check_dtype(op, "weight", weight, (torch.int8,))
    check_not_empty(op, "weight", weight)
    check_shape(op, "weight", weight, ("N", x.shape[-1] if x.ndim else "K"))
    if not x.ndim:
        raise ValueError(f"{op}: x has no dimensions, expected (..., {weight.shape[1]})")
    check_contiguous(op, "weight", weight)
    check_device(op, "weight", weight, "x", x)
    if weight.shape[1] > longest_sum(x.dtype):
        raise ValueError(
            f"{op}: K is {weight.shape[1]}, expected at most {longest_sum(x.dtype)} so that sums cannot overflow"
        )


def dyadic(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Return (m, e) with ratio = m / 2^e to 31 bits: ratio = frac * 2^a, m = floor(frac * 2^31 + 1/2), e = 31 - a.

    The ratio of a layer is scale of x times scale of the weight over scale of y, in double precision; HAWQ-V3's code
    rounds the product of the first two to float32 before. Below 2^-31 m has fewer bits, because e stops at 62.

    Args:
        ratio: finite, in [2^-63, 2^30), any shape, floating point. Waits for the device.

    Returns:
        m in [1, 2^31 - 1] and e in [1, 62], int32, shaped like `ratio`.

    Raises:
        TypeError: `ratio` is not floating point.
        ValueError: a ratio is not finite, not positive, or too small or too large to be written so.
    """
    check_dtype("dyadic", "ratio", ratio, FLOATS)
    check_readable("dyadic", "ratio", ratio)
    wide = ratio.double()
    bad = ~((wide >= 2.0**-63) & (wide < LARGEST_RATIO))  # also where it is NaN
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        found = float(wide[index])
        why = "a dead scale" if abs(found) < 2.0**-63 else "not a scale that a multiplier and a shift can stand for"
        raise ValueError(f"dyadic: ratio{list(index)} is {found:g}, {why}; expected 2^-63 to below 2^30")
    frac, exponent = torch.frexp(wide)
    e = 31 - exponent.long()
    over = (e - MAX_SHIFT).clamp(min=0)
    m = torch.floor(frac * torch.exp2((31 - over).double()) + 0.5).long()
    e = e - over
    full = m == 2**31  # the fraction rounds to 1
    return torch.where(full, m // 2, m).int(), torch.where(full, e - 1, e).int()
