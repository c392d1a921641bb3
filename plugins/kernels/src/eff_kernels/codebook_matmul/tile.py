"""The device function that the kernels of codebook_matmul share: a decoded tile of the weight."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weight(
    packed_ptr, codebook_ptr, row, rows, codes_per_row, start, entries,
    BITS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Return BLOCK_J codes from `start` on, decoded: (BLOCK_N, BLOCK_J * PADDED) float32, 0 beyond the ends and beyond DIM.

    NaN where the codebook does not have the code: an out-of-range read must not look like a weight.
    """
    index = start + tl.arange(0, BLOCK_J)
    here = (row[:, None] < rows) & (index[None, :] < codes_per_row)
    if BITS == 4:
        word = tl.load(packed_ptr + row[:, None] * (codes_per_row // 2) + index[None, :] // 2, mask=here, other=0)
        code = (word.to(tl.int32) >> (4 * (index[None, :] % 2))) & 15
    else:
        code = tl.load(packed_ptr + row[:, None] * codes_per_row + index[None, :], mask=here, other=0).to(tl.int32)
    inside = tl.arange(0, PADDED)[None, None, :]
    wanted = here[:, :, None] & (inside < DIM)
    known = code[:, :, None] < entries
    w = tl.load(codebook_ptr + code[:, :, None] * DIM + inside, mask=wanted & known, other=0.0).to(tl.float32)
    w = tl.where(wanted & (known == 0), float("nan"), w)
    return tl.reshape(w, (BLOCK_N, BLOCK_J * PADDED))
