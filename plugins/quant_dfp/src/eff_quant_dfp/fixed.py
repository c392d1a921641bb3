"""Dynamic fixed point: integers of P bits with one power of two for the whole tensor.

Das, Mellempudi, Mudigere, Kalamkar et al.: Mixed Precision Training of Convolutional Neural Networks using Integer
Operations, ICLR 2018, arXiv:1802.00930.
    f = i 2^E,   e_max = floor(log2 max|f|),   E = e_max - (P - 2),   i = round(f 2^-E), clipped to +-(2^(P-1) - 1)
With head-room of r bits E is larger by r and the range smaller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eff.errors import RunError

LARGEST_EXPONENT = 126
"""2^E and 2^-E are normal float32 numbers up to here; beyond, scaling takes two steps."""


@dataclass(frozen=True)
class Fixed:
    """A tensor i 2^E."""

    codes: Tensor
    """Integers: int16 of operands, int32 or int64 of products and sums."""
    exponent: int
    flushed: float = 0.0
    """Share of the elements that were not 0 and became 0."""

    def float(self) -> Tensor:
        """Return the value in float32 (up-conversion): exact below 2^24 and within the range of float32."""
        return scaled(self.codes.float() if self.codes.dtype == torch.int16 else self.codes.double(), self.exponent)


def scaled(values: Tensor, exponent: int) -> Tensor:
    """Return values * 2^exponent as float32, exact where float32 holds the result, for any exponent."""
    if abs(exponent) <= LARGEST_EXPONENT:
        return (values * 2.0**exponent).float()
    half = exponent // 2  # in double precision both factors are powers of two within range
    return (values.double() * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half)).float()


def quantize(
    x: Tensor,
    bits: int = 16,
    pre_shift: int = 0,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
    name: str = "tensor",
) -> Fixed:
    """Return float32 `x` in dynamic fixed point with `bits` - `pre_shift` effective bits.

    Args:
        x: any shape.
        bits: P, 4 to 16.
        pre_shift: r.
        rounding: "nearest" (ties to even), "truncate" (toward 0) or "stochastic" (unbiased, from `generator`).
        generator: of stochastic rounding.
        name: of the tensor, for the error.

    Raises:
        RunError: NaN or infinity in `x`.
    """
    largest = float(x.abs().max()) if x.numel() else 0.0
    if not math.isfinite(largest):
        raise RunError(f"quant_dfp: {name} holds NaN or infinity; its exponent would erase every other element")
    if largest == 0.0:
        return Fixed(torch.zeros_like(x, dtype=torch.int16), 0)
    exponent = math.frexp(largest)[1] - 1 - (bits - 2 - pre_shift)
    u = x * 2.0**-exponent if abs(exponent) <= LARGEST_EXPONENT else _scaled_up(x, -exponent)
    if rounding == "nearest":
        codes = u.round()
    elif rounding == "truncate":
        codes = u.trunc()
    else:
        codes = (u + torch.rand(u.shape, generator=generator, device=u.device)).floor()
    limit = 2 ** (bits - 1 - pre_shift) - 1
    codes = codes.clamp(-limit, limit)
    flushed = float(((codes == 0) & (x != 0)).float().mean())
    return Fixed(codes.to(torch.int16), exponent, flushed)


def _scaled_up(x: Tensor, exponent: int) -> Tensor:
    half = exponent // 2
    return (x.double() * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half)).float()


def multiply(a: Fixed, b: Fixed) -> Fixed:
    """Return the elementwise product, at most 31 bits, int32."""
    return Fixed(a.codes.int() * b.codes.int(), a.exponent + b.exponent)


def add(a: Fixed, b: Fixed) -> Fixed:
    """Return the sum, int32, on the coarser of the two grids; the finer operand is shifted right and rounded."""
    exponent = max(a.exponent, b.exponent)
    total = shift_right(a.codes, exponent - a.exponent) + shift_right(b.codes, exponent - b.exponent)
    return Fixed(total.int(), exponent)


def shift_right(codes: Tensor, count: int) -> Tensor:
    """Return round(codes / 2^count), ties away from minus infinity, int64; a bare shift would round down."""
    wide = codes.long()
    if count == 0:
        return wide
    if count > 62:
        return torch.zeros_like(wide)
    return (wide + (1 << (count - 1))) >> count


def down_convert(x: Fixed) -> Fixed:
    """Return 32-bit integers as 16-bit ones: shifted right by as many bits as the largest has above 15."""
    largest = int(x.codes.long().abs().max()) if x.codes.numel() else 0
    count = max(0, largest.bit_length() - 15)
    codes = shift_right(x.codes, count).clamp(-(2**15) + 1, 2**15 - 1)
    return Fixed(codes.to(torch.int16), x.exponent + count)
