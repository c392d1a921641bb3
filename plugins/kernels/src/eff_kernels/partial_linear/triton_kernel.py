"""The columns of partial_linear in Triton: a program gathers a block of rows and columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.dispatch import TRITON_DTYPES

ROWS, COLUMNS = 32, 32


@triton.jit
def select_kernel(
    x_ptr, index_ptr, out_ptr, rows, width, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    chosen = tl.load(index_ptr + column, mask=column < count, other=0)[None, :]
    mask = (row < rows) & (column < count)[None, :]
    inside = (chosen >= 0) & (chosen < width)
    value = tl.load(x_ptr + row * width + chosen, mask=mask & inside, other=float("nan"))
    tl.store(out_ptr + row * count + column[None, :], value, mask=mask)


def select_columns(x: Tensor, index: Tensor) -> Tensor:
    """Return x[..., index], contiguous; NaN for an index outside."""
    x = x.contiguous()
    width, count = x.shape[-1], len(index)
    out = x.new_empty(*x.shape[:-1], count)
    rows = out.numel() // count
    if rows:
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(count, COLUMNS))
        select_kernel[grid](x, index.contiguous(), out, rows, width, count, ROWS=ROWS, COLUMNS=COLUMNS)
    return out


_KINDS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
AHEAD_OF_TIME = {
    select_kernel: [
        (
            {"x_ptr": _KINDS[kind], "index_ptr": "*i64", "out_ptr": _KINDS[kind], "rows": "i64", "width": "i32", "count": "i32"},
            {"ROWS": ROWS, "COLUMNS": COLUMNS},
        )
        for kind in TRITON_DTYPES
    ]
}  # fmt: skip
"""Signatures and constants that each kernel is compiled with ahead of time in the tests."""
