"""weight_only_matmul on the CPU: some rows of the weight are dequantized into the cache, multiplied, and forgotten.

torch's `_weight_int4pack_mm_for_cpu` wants the levels in a layout of its own; making it from this one takes longer than
the whole product here, so it is a peer in the benchmark and not a path.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from eff_kernels.packing import unpack_rows, unpacking_buffers

PIECE = 1 << 19
"""Weights dequantized at a time: 2 MiB of float32."""
BFLOAT16_ROWS = 32
"""From here on a product of bfloat16 pays for rounding the weights to it."""


def dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K)."""
    out = torch.empty(len(packed), packed.shape[1] * 8 // bits, dtype=dtype)
    for here, weight in _pieces(packed, scale, zero_point, bits, dtype):
        out[here] = weight
    return out


def forward(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return x (M, K) times the transposed weight, (M, N)."""
    dtype = product_dtype(len(x), x.dtype)
    columns = x.to(dtype).t()
    out = torch.empty(len(packed), len(x), dtype=dtype)
    for here, weight in _pieces(packed, scale, zero_point, bits, dtype):
        torch.mm(weight, columns, out=out[here])
    return out.t().to(x.dtype).contiguous()


def backward(grad: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return the gradient of x, (M, K), from that of the result, (M, N)."""
    wide = grad.to(_wide(grad.dtype))
    out = wide.new_zeros(len(grad), packed.shape[1] * 8 // bits)
    for here, weight in _pieces(packed, scale, zero_point, bits, wide.dtype):
        out.addmm_(wide[:, here], weight)
    return out.to(grad.dtype)


def product_dtype(m: int, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to multiply in; processors multiply float16 slowly, bfloat16 fast."""
    if dtype == torch.float16 or (dtype == torch.bfloat16 and m < BFLOAT16_ROWS):
        return torch.float32
    return dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pieces(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of the weight, each time in the same memory.

    A constant zero point is taken off the bytes, of which there are four times fewer than of floats.
    """
    n, row_bytes = packed.shape
    k = row_bytes * 8 // bits
    rows = min(n, max(1, PIECE // k))
    work = unpacking_buffers(rows, row_bytes, bits, packed.device)
    computed = torch.empty(rows, k, dtype=_wide(dtype))
    stored = computed if computed.dtype == dtype else torch.empty(rows, k, dtype=dtype)
    scale = scale.to(computed.dtype)[:, :, None]
    for start in range(0, n, rows):
        here = slice(start, min(start + rows, n))
        levels, values = unpack_rows(packed[here], bits, work), computed[: here.stop - start]
        grouped = values.view(len(values), scale.shape[1], -1)
        if zero_point is None:
            values.copy_(levels.sub_(2 ** (bits - 1)).view(torch.int8))  # wraps to the signed value
        else:
            values.copy_(levels)
            grouped.sub_(zero_point[here, :, None].to(computed.dtype))
        grouped.mul_(scale[here])
        yield here, values if stored is computed else stored[: len(values)].copy_(values)
