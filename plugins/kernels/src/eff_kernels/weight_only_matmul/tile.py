"""Device functions that the kernels of weight_only_matmul share: a tile of levels, and of what belongs to its groups."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def levels(packed_ptr, row, rows, row_bytes, start, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the levels (BLOCK_N, BLOCK_K), int32, from column `start` on, which is a multiple of 8; 0 beyond the ends."""
    line = packed_ptr + row[:, None] * row_bytes
    here = row[:, None] < rows
    if BITS == 3:
        byte = start // 8 * 3 + tl.arange(0, BLOCK_K // 8)[None, :] * 3
        mask = here & (byte < row_bytes)
        word = tl.load(line + byte, mask=mask, other=0).to(tl.int32)
        word |= tl.load(line + byte + 1, mask=mask, other=0).to(tl.int32) << 8
        word |= tl.load(line + byte + 2, mask=mask, other=0).to(tl.int32) << 16
        return tl.reshape((word[:, :, None] >> (3 * tl.arange(0, 8))[None, None, :]) & 7, (BLOCK_N, BLOCK_K))
    else:
        PER_BYTE: tl.constexpr = 8 // BITS
        byte = start // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE)[None, :]
        word = tl.load(line + byte, mask=here & (byte < row_bytes), other=0).to(tl.int32)
        if BITS == 8:
            return word
        else:
            shift = (BITS * tl.arange(0, PER_BYTE))[None, None, :]
            return tl.reshape((word[:, :, None] >> shift) & (2**BITS - 1), (BLOCK_N, BLOCK_K))


@triton.jit
def per_group(ptr, row, rows, start, groups, group_size, SPAN: tl.constexpr, SPANS: tl.constexpr):
    """Return the scales (or zero points) of a tile, float32 (BLOCK_N, SPANS): one per `SPAN` columns from `start` on."""
    group = (start + SPAN * tl.arange(0, SPANS)) // group_size
    mask = (row[:, None] < rows) & (group[None, :] < groups)
    return tl.load(ptr + row[:, None] * groups + group[None, :], mask=mask, other=0.0).to(tl.float32)
