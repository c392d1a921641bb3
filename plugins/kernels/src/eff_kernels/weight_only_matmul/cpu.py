"""weight_only_matmul on the CPU: some rows of the weight are dequantized into the cache, multiplied, and forgotten.

torch's `_weight_int4pack_mm_for_cpu` wants the levels in a layout of its own; making it from this one takes longer than
the whole product here, so it is a peer in the benchmark and not a path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.packing import unpack_rows

PIECE = 1 << 19
"""Weights dequantized at a time: 2 MiB of float32."""
BFLOAT16_ROWS = 32
"""From here on a product of bfloat16 pays for rounding the weights to it."""


def dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K)."""
    n, k = len(packed), packed.shape[1] * 8 // bits
    rows = max(1, PIECE // k)
    if n <= rows:
        return _dequantize(packed, scale, zero_point, bits, dtype)
    out = torch.empty(n, k, dtype=dtype)
    for here in _pieces(n, k):
        out[here] = _dequantize(packed[here], scale[here], _rows(zero_point, here), bits, dtype)
    return out


def forward(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return x (M, K) times the transposed weight, (M, N)."""
    (m, k), n = x.shape, len(packed)
    dtype = product_dtype(m, x.dtype)
    columns = x.to(dtype).t()
    out = torch.empty(n, m, dtype=dtype)
    for here in _pieces(n, k):
        weight = _dequantize(packed[here], scale[here], _rows(zero_point, here), bits, dtype)
        torch.mm(weight, columns, out=out[here])
    return out.t().to(x.dtype).contiguous()


def backward(grad: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return the gradient of x, (M, K), from that of the result, (M, N)."""
    (m, n), k = grad.shape, packed.shape[1] * 8 // bits
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    out = torch.zeros(m, k, dtype=wide)
    for here in _pieces(n, k):
        out.addmm_(grad[:, here].to(wide), _dequantize(packed[here], scale[here], _rows(zero_point, here), bits, wide))
    return out.to(grad.dtype)


def product_dtype(m: int, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to multiply in; processors multiply float16 slowly, bfloat16 fast."""
    if dtype == torch.float16 or (dtype == torch.bfloat16 and m < BFLOAT16_ROWS):
        return torch.float32
    return dtype


def _pieces(n: int, k: int) -> list[slice]:
    rows = max(1, PIECE // k)
    return [slice(start, start + rows) for start in range(0, n, rows)]


def _rows(values: Tensor | None, here: slice) -> Tensor | None:
    return values if values is None else values[here]


def _dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """Return some rows of the weight; a constant zero point is taken off the bytes, four times fewer than floats."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    levels = unpack_rows(packed, bits)
    if zero_point is None:
        levels = levels.sub_(2 ** (bits - 1)).view(torch.int8)  # wraps to the signed value
    grouped = levels.to(wide).view(len(packed), scale.shape[1], -1)
    if zero_point is not None:
        grouped.sub_(zero_point.to(wide)[:, :, None])
    return grouped.mul_(scale.to(wide)[:, :, None]).view(len(packed), -1).to(dtype)
