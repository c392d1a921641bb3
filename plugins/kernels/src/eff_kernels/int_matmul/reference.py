"""What int_matmul means, in plain torch; every kernel must agree with it bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor


def output_dtype(q_max: int) -> torch.dtype:
    """Return the dtype of the result: int8 where the levels fit it."""
    return torch.int8 if q_max <= 127 else torch.uint8


def forward(
    x: Tensor, weight: Tensor, multiplier: Tensor, shift: Tensor, bias: Tensor | None,
    q_min: int, q_max: int, half_even: bool,
) -> Tensor:  # fmt: skip
    """Return the requantized product of x (M, K) and weight (N, K)."""
    total = (x.double() @ weight.double().t()).long()  # float64 holds every sum exactly, and every device multiplies it
    return requantize(total, multiplier, shift, bias, q_min, q_max, half_even)


def requantize(
    total: Tensor, multiplier: Tensor, shift: Tensor, bias: Tensor | None, q_min: int, q_max: int, half_even: bool
) -> Tensor:
    """Return clip(round((total + bias) * multiplier / 2^shift)) for integer sums (M, N)."""
    wide = total.long()
    if bias is not None:
        wide = wide + bias.long()
    level = shift_rounded(wide, multiplier.long(), shift.long(), half_even)
    return level.clamp(q_min, q_max).to(output_dtype(q_max))


def shift_rounded(q: Tensor, m: Tensor, e: Tensor, half_even: bool = False) -> Tensor:
    """Return round(q m / 2^e) in int64; ties go up, or to even.

    Args:
        q: int64 with |q m| < 2^62.
        m, e: int64, broadcast against q; e in [1, 62].
        half_even: rule of ties.
    """
    shifted = q * m + (torch.ones_like(e) << (e - 1))  # plus one half
    level = shifted >> e  # rounds toward minus infinity
    if half_even:
        tie = (shifted & ((torch.ones_like(e) << e) - 1)) == 0
        level = torch.where(tie, level & ~1, level)
    return level


def scaled(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return the product of x (M, K) and weight (N, K) in float32, scaled per row of the weight."""
    total = (x.double() @ weight.double().t()).float() * scale
    return total if bias is None else total + bias
