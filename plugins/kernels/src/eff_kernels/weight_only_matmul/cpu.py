"""weight_only_matmul on the CPU: some rows of the weight are dequantized into the cache, multiplied, and forgotten.

Products of bfloat16 take many rows of the weight at a time, which uses the processor better than small ones do; never all
of it, because fresh pages for a whole weight cost as much as dequantizing it. A dense weight is faster all the same:
dequantizing takes as long as the product of several hundred rows.

A shift and a mask of all bytes give every second (2 bits: every fourth) column at once. These planes stay side by side,
and the columns of x are put in their order instead: interleaving the levels would cost more than anything else here.

With one scale a row, few rows of bfloat16 multiply the levels as bytes. torch's product for 4 bits and several scales
wants a layout of its own; making it from this one takes longer than the whole product here, so it is made once, by
`prepack`, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_kernels.packing import unpack_rows, unpacking_buffers

PIECE = 1 << 19
"""Weights dequantized at a time: 2 MiB of float32."""
PRODUCT = 1 << 23
"""Weights multiplied at a time in bfloat16: 16 MiB, what an allocator reuses instead of asking for fresh pages."""
BYTES_ROWS = 16
"""Rows up to which a product with bytes is the faster way; it takes time in proportion to the rows."""
PLANES = {2: 4, 3: 1, 4: 2, 8: 1}
"""Levels a byte holds; those of 3 bits straddle bytes and are unpacked in order."""
BFLOAT16_ROWS = 2
"""From here on a product of bfloat16 pays for rounding the weights to it."""


def dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K)."""
    out = torch.empty(len(packed), packed.shape[1] * 8 // bits, dtype=dtype)
    for here, weight in _pieces(packed, scale, zero_point, bits, _wide(dtype)):
        out[here] = _columns_first(weight, bits)
    return out


def forward(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return x (M, K) times the transposed weight, (M, N)."""
    if takes_bytes(x, scale, zero_point, bits):
        return _bytes_product(_planes_first(x, bits), packed, scale[:, 0], zero_point, bits)
    dtype = product_dtype(len(x), x.dtype)
    inputs = _planes_first(x.to(dtype), bits)
    if dtype == torch.bfloat16:
        return _bfloat16_product(inputs, packed, scale, zero_point, bits)
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


def takes_bytes(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> bool:
    """Whether x takes the product with bytes: one scale a row, not rounded for it, and levels less zero point fit int8."""
    if x.dtype != torch.bfloat16 or scale.dtype != x.dtype or scale.shape[1] > 1 or not 0 < len(x) <= BYTES_ROWS:
        return False
    if zero_point is None:
        return True
    lowest, highest = (128, 128) if bits == 8 else (0, 2**bits - 1)
    return bool(((zero_point == zero_point.round()) & (zero_point >= lowest) & (zero_point <= highest)).all())


def product_dtype(m: int, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to multiply in; processors multiply float16 slowly, bfloat16 fast."""
    if dtype == torch.float16 or (dtype == torch.bfloat16 and m < BFLOAT16_ROWS):
        return torch.float32
    return dtype


def _bytes_product(inputs: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return the product of inputs in the order of the planes, summed in float32 before the scale."""
    (m, k), n, planes = inputs.shape, len(packed), PLANES[bits]
    out = torch.empty(m, n, dtype=inputs.dtype)
    rows = min(n, max(1, 4 * PIECE // k))  # bytes, not floats
    work = _plane_buffers(rows, packed, bits)
    signed = torch.empty(rows, planes, k // planes, dtype=torch.int8)
    middle = 2 ** (bits - 1)
    offset = None if zero_point is None or bool((zero_point == middle).all()) else (zero_point - middle).char()[:, None]
    for start in range(0, n, rows):
        here = slice(start, min(start + rows, n))
        levels = signed[: here.stop - start]
        _write_signed(packed[here], bits, work, levels)
        if offset is not None:
            levels.sub_(offset[here])
        out[:, here] = torch._weight_int8pack_mm(inputs, levels.view(-1, k), scale[here])
    return out


def _bfloat16_product(inputs: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return the product of inputs in the order of the planes."""
    (m, k), n = inputs.shape, len(packed)
    out = torch.empty(m, n, dtype=inputs.dtype)
    rows = min(n, max(1, PRODUCT // k))
    rounded = torch.empty(rows, k, dtype=inputs.dtype)
    for start in range(0, n, rows):
        block = slice(start, min(start + rows, n))
        zero = None if zero_point is None else zero_point[block]
        for here, weight in _pieces(packed[block], scale[block], zero, bits, torch.float32):
            rounded[here] = weight
        out[:, block] = F.linear(inputs, rounded[: block.stop - start])
    return out


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
    """Yield rows of the weight in float32 or float64, columns in the order of the planes, each time in the same memory."""
    n, groups, planes = len(packed), scale.shape[1], PLANES[bits]
    k = packed.shape[1] * 8 // bits
    rows = min(n, max(1, PIECE // k))
    work = _plane_buffers(rows, packed, bits)
    computed = torch.empty(rows, planes, groups, k // planes // groups, dtype=dtype)
    scale = scale.to(dtype)[:, None, :, None]
    for start in range(0, n, rows):
        here = slice(start, min(start + rows, n))
        values = computed[: here.stop - start]
        for plane in range(planes):
            levels = _plane(packed[here], plane, bits, work)
            if zero_point is None:  # taken off the bytes, four times fewer than floats; they wrap to the signed value
                levels = levels.sub_(2 ** (bits - 1)).view(torch.int8)
            values[:, plane].copy_(levels.view(len(values), groups, -1))
        if zero_point is not None:
            values.sub_(zero_point[here, None, :, None].to(dtype))
        yield here, values.mul_(scale[here]).view(len(values), k)


def _write_signed(packed: Tensor, bits: int, work: tuple[Tensor, Tensor], out: Tensor) -> None:
    """Write levels less 2^(bits-1), int8, to `out` (N, planes, K / planes): a shift up and one down spread the sign."""
    if bits == 3:
        torch.sub(unpack_rows(packed, bits, work), 4, out=out[:, 0].view(torch.uint8))
        return
    signs = sum(1 << bit for bit in range(bits - 1, 8, bits))
    flipped = torch.bitwise_xor(packed, signs, out=work[0][: len(packed)]).view(torch.int8)
    for plane in range(PLANES[bits]):
        levels = torch.bitwise_left_shift(flipped, 8 - bits * (plane + 1), out=out[:, plane])
        levels.bitwise_right_shift_(8 - bits)


def _plane_buffers(rows: int, packed: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return what `_plane` works in."""
    return unpacking_buffers(rows, packed.shape[1], 3 if bits == 3 else 8, packed.device)


def _plane(packed: Tensor, plane: int, bits: int, work: tuple[Tensor, Tensor]) -> Tensor:
    """Return the levels of the columns `plane`, `plane` + PLANES, ...; at 3 bits, of all columns."""
    if bits == 3:
        return unpack_rows(packed, bits, work)
    levels = torch.bitwise_right_shift(packed, plane * bits, out=work[0][: len(packed)])
    return levels.bitwise_and_(2**bits - 1) if plane < PLANES[bits] - 1 else levels
