"""int_matmul on the CPU: oneDNN's 8-bit product, then requantization in pieces that stay in the cache.

float64 multiplies several times faster than int64 and is exact here: a level within the clip range is at most 2^9 in
magnitude, so sum * multiplier stays below 2^53 while shift <= 44. Beyond the range only the order matters, and
float64 rounding keeps it. Layers with a larger shift take int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.int_matmul.reference import output_dtype, requantize

PIECE = 262144
"""Elements requantized at a time: 2 MiB of float64, few enough calls and still in the cache."""
EXACT_SHIFT = 44


def forward(
    x: Tensor, weight: Tensor, multiplier: Tensor, shift: Tensor, bias: Tensor | None,
    q_min: int, q_max: int, half_even: bool,
) -> Tensor:  # fmt: skip
    """Return the requantized product of x (M, K) and weight (N, K)."""
    return requantized(_product(x, weight), multiplier, shift, bias, q_min, q_max, half_even)


def requantized(
    total: Tensor, multiplier: Tensor, shift: Tensor, bias: Tensor | None, q_min: int, q_max: int, half_even: bool
) -> Tensor:
    """Return what `reference.requantize` returns, for sums (M, N)."""
    out = torch.empty(total.shape, dtype=output_dtype(q_max))
    rows = max(1, PIECE // total.shape[1])
    if int(shift.max()) > EXACT_SHIFT:
        for start in range(0, len(total), rows):
            here = slice(start, start + rows)
            out[here] = requantize(total[here], multiplier, shift, bias, q_min, q_max, half_even)
        return out
    ratio = multiplier.double() / torch.exp2(shift.double())
    wide_bias = None if bias is None else bias.double()
    buffer = torch.empty(min(rows, len(total)), total.shape[1], dtype=torch.float64)
    for start in range(0, len(total), rows):
        here = slice(start, start + rows)
        wide = buffer[: len(total[here])].copy_(total[here])
        if wide_bias is not None:
            wide.add_(wide_bias)
        wide.mul_(ratio)
        _store_levels(wide.round_() if half_even else wide.add_(0.5).floor_(), out[here], q_min, q_max)
    return out


def _store_levels(values: Tensor, out: Tensor, q_min: int, q_max: int) -> None:
    """Write integers in float64, clipped, to `out`: as int8, the one byte type whose conversion is vectorised."""
    if out.dtype == torch.int8:
        out.copy_(values.clamp_(q_min, q_max))
    else:
        out.view(torch.int8).copy_(values.sub_(128).clamp_(q_min - 128, q_max - 128))
        out.bitwise_xor_(128)  # plus 128, in the bits


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Return the exact sums: int32, or float64 where the processor's 8-bit instructions would saturate."""
    if torch.cpu._is_vnni_supported():
        return torch._int_mm(x, weight.t())
    return x.double() @ weight.double().t()


def scaled(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return the product of x (M, K) and weight (N, K) in float32, scaled per row of the weight."""
    total = _product(x, weight).float()
    return total.mul_(scale) if bias is None else torch.addcmul(bias, total, scale, out=total)
