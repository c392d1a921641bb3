"""The part that both kernels of int_matmul share: the exact sums of a block."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return the rows (BLOCK_M,) and columns (BLOCK_N,) of this program, int64."""
    row_blocks, column_blocks = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    block = tl.program_id(0)
    first_row = block // (GROUP_M * column_blocks) * GROUP_M
    rows_here = tl.minimum(row_blocks - first_row, GROUP_M)
    inside = block % (GROUP_M * column_blocks)
    row = (first_row + inside % rows_here).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, (inside // rows_here).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def sums(
    x_ptr, weight_ptr, row, column, m, n, k,
    UNSIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return sum_k x[row, k] * weight[column, k], int32 (BLOCK_M, BLOCK_N)."""
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row[:, None] * k + inner[None, :]
    w_ptrs = weight_ptr + column[:, None] * k + inner[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    weight_sum = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, k, BLOCK_K):
        left = inner[None, :] < k - start
        x = tl.load(x_ptrs + start, mask=(row[:, None] < m) & left, other=0)
        w = tl.load(w_ptrs + start, mask=(column[:, None] < n) & left, other=0)
        if (
            UNSIGNED
        ):  # the tensor cores take two operands of one type: use x - 128, whose bits are x with the top one flipped
            x = (x ^ 128).to(tl.int8, bitcast=True)
            weight_sum += tl.sum(w.to(tl.int32), axis=1)
        total = tl.dot(x, tl.trans(w), total, out_dtype=tl.int32)
    if UNSIGNED:
        total += 128 * weight_sum[None, :]
    return total
