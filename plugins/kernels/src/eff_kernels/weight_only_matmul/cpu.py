"""weight_only_matmul on the CPU: some rows of the weight are dequantized into the cache, multiplied, and forgotten.

Many rows of bfloat16 dequantize the weight once and take one library product, which uses the processor better than many
small ones. A dense weight is faster all the same: dequantizing it takes as long as the product of several hundred rows.

A shift and a mask of all bytes give every second (2 bits: every fourth) column at once. These planes stay side by side,
and the columns of x are put in their order instead: interleaving the levels would cost more than anything else here.

torch's products for few rows want the levels in a layout of their own; making it from this one takes longer than the
whole product here, so it is made once, by `prepack`, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_kernels.packing import unpack_rows, unpacking_buffers

PIECE = 1 << 19
"""Weights dequantized at a time: 2 MiB of float32."""
PLANES = {2: 4, 3: 1, 4: 2, 8: 1}
"""Levels a byte holds; those of 3 bits straddle bytes and are unpacked in order."""
BFLOAT16_ROWS = 32
"""From here on a product of bfloat16 pays for rounding the weights to it, and one product with the whole weight is faster
than one for each piece of it."""


def dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K)."""
    out = torch.empty(len(packed), packed.shape[1] * 8 // bits, dtype=dtype)
    for here, weight in _pieces(packed, scale, zero_point, bits, dtype):
        out[here] = _columns_first(weight, bits)
    return out


def forward(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return x (M, K) times the transposed weight, (M, N)."""
    dtype = product_dtype(len(x), x.dtype)
    inputs = _planes_first(x.to(dtype), bits)
    if takes_whole(len(x), x.dtype):
        whole = torch.empty(len(packed), x.shape[1], dtype=dtype)
        for here, weight in _pieces(packed, scale, zero_point, bits, _wide(dtype)):
            whole[here] = weight
        return F.linear(inputs, whole)
    out = torch.empty(len(packed), len(x), dtype=dtype)
    for here, weight in _pieces(packed, scale, zero_point, bits, dtype):
        torch.mm(weight, inputs.t(), out=out[here])
    return out.t().to(x.dtype).contiguous()


def backward(grad: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return the gradient of x, (M, K), from that of the result, (M, N)."""
    wide = grad.to(_wide(grad.dtype))
    out = wide.new_zeros(len(grad), packed.shape[1] * 8 // bits)
    for here, weight in _pieces(packed, scale, zero_point, bits, wide.dtype):
        out.addmm_(wide[:, here], weight)
    return _columns_first(out, bits).to(grad.dtype)


def takes_whole(m: int, dtype: torch.dtype) -> bool:
    """Whether m rows dequantize the weight once; float32 products of pieces are as fast as one of all."""
    return dtype == torch.bfloat16 and m >= BFLOAT16_ROWS


def product_dtype(m: int, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to multiply in; processors multiply float16 slowly, bfloat16 fast."""
    if dtype == torch.float16 or (dtype == torch.bfloat16 and m < BFLOAT16_ROWS):
        return torch.float32
    return dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _planes_first(values: Tensor, bits: int) -> Tensor:
    """Return a matrix with its columns in the order of the planes: 0, p, 2p, ..., 1, p + 1, ..."""
    m, k = values.shape
    return values.reshape(m, k // PLANES[bits], PLANES[bits]).transpose(1, 2).reshape(m, k)


def _columns_first(values: Tensor, bits: int) -> Tensor:
    """Undo `_planes_first`."""
    m, k = values.shape
    return values.reshape(m, PLANES[bits], k // PLANES[bits]).transpose(1, 2).reshape(m, k)


def _pieces(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of the weight, columns in the order of the planes, each time in the same memory."""
    (n, row_bytes), groups, planes = packed.shape, scale.shape[1], PLANES[bits]
    k = row_bytes * 8 // bits
    rows = min(n, max(1, PIECE // k))
    work = unpacking_buffers(rows, row_bytes, 3 if bits == 3 else 8, packed.device)
    computed = torch.empty(rows, planes, groups, k // planes // groups, dtype=_wide(dtype))
    stored = torch.empty(rows, k, dtype=dtype) if computed.dtype != dtype else None
    scale = scale.to(computed.dtype)[:, None, :, None]
    for start in range(0, n, rows):
        here = slice(start, min(start + rows, n))
        values = computed[: here.stop - start]
        for plane in range(planes):
            levels = _plane(packed[here], plane, bits, work)
            if zero_point is None:  # taken off the bytes, four times fewer than floats; they wrap to the signed value
                levels = levels.sub_(2 ** (bits - 1)).view(torch.int8)
            values[:, plane].copy_(levels.view(len(values), groups, -1))
        if zero_point is not None:
            values.sub_(zero_point[here, None, :, None].to(values.dtype))
        weight = values.mul_(scale[here]).view(len(values), k)
        yield here, weight if stored is None else stored[: len(values)].copy_(weight)


def _plane(packed: Tensor, plane: int, bits: int, work: tuple[Tensor, Tensor]) -> Tensor:
    """Return the levels of the columns `plane`, `plane` + PLANES, ...; at 3 bits, of all columns."""
    if bits == 3:
        return unpack_rows(packed, bits, work)
    levels = torch.bitwise_right_shift(packed, plane * bits, out=work[0][: len(packed)])
    return levels.bitwise_and_(2**bits - 1) if plane < PLANES[bits] - 1 else levels
