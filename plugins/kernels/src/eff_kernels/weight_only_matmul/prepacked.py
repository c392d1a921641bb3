"""A second layout of the weight, made once, for few rows of bfloat16 on the CPU: that of torch's own products.

Making it takes about as long as ten products of one row, so it pays where a weight is used again and again (decoding
token by token). It holds the levels at 4 bits (8 where the weight has 8), beside the packed weight, not instead of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels.packing import unpack_rows

ROWS = 32
"""Rows up to which torch's products are the faster way; they take time in proportion to the rows."""
_GROUPS = (256, 128, 64, 32)


class Prepacked(NamedTuple):
    """The weight (N, K) as `torch._weight_int4pack_mm_for_cpu` or, for 8 bits, `torch._weight_int8pack_mm` reads it."""

    codes: Tensor
    """Tiles of 4-bit levels, uint8 (N, K / 2), or int8 (N, K)."""
    grid: Tensor
    """bfloat16: scale and what is added, (K / group, N, 2); for 8 bits the scale of each row, (N,)."""
    group: int
    """Columns that share a scale; 0 for 8 bits."""
    packed: Tensor
    """The weight that this is made of, with its scales and zero points: the same memory, not a copy."""
    scale: Tensor
    zero_point: Tensor | None
    bits: int

    def is_of(self, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> bool:
        """Whether this is made of this weight: same memory, since to compare values would take as long as the product."""
        pairs = [(self.packed, packed), (self.scale, scale)]
        if self.zero_point is not None and zero_point is not None:
            pairs.append((self.zero_point, zero_point))
        elif self.zero_point is not zero_point:
            return False
        return bits == self.bits and all(kept is given or kept.is_set_to(given) for kept, given in pairs)


def make(packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Prepacked | None:
    """Return the layout, or None where torch has none for this weight."""
    if packed.device.type != "cpu":
        return None
    n, k, groups = len(packed), packed.shape[1] * 8 // bits, scale.shape[1]
    if bits == 8:
        if groups > 1 or zero_point is not None:
            return None
        grid = scale[:, 0].bfloat16()
        return Prepacked((packed ^ 128).view(torch.int8), grid, 0, packed, scale, zero_point, bits)
    group = next((size for size in _GROUPS if k // groups % size == 0), 0)
    if not group or n % 16:
        return None
    middle = 2 ** (bits - 1) if zero_point is None else zero_point.float()
    grid = torch.stack([scale.float(), (8 - middle) * scale.float()], -1)  # torch takes 8 off each level
    grid = grid.repeat_interleave(k // groups // group, 1).transpose(0, 1).contiguous().bfloat16()
    codes = torch._convert_weight_to_int4pack_for_cpu(unpack_rows(packed, bits).int(), 2)
    return Prepacked(codes, grid, group, packed, scale, zero_point, bits)


def suits(x: Tensor) -> bool:
    """Whether this layout is the faster way for x (..., K)."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and 0 < x.numel() <= ROWS * x.shape[-1]
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.compiler.is_compiling()
    )


def forward(x: Tensor, weight: Prepacked) -> Tensor:
    """Return x (M, K) times the transposed weight, (M, N)."""
    x = x.contiguous()
    if not weight.group:
        return torch._weight_int8pack_mm(x, weight.codes, weight.grid)
    return torch._weight_int4pack_mm_for_cpu(x, weight.codes, weight.group, weight.grid)
