"""nearest_code in Triton: a program holds some vectors and runs over the codebook with a running minimum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.dispatch import TRITON_DTYPES, interpreting

ROWS, COLUMNS, DEPTH = 64, 128, 16


@triton.jit
def nearest_code_kernel(
    x_ptr, word_ptr, square_ptr, out_ptr, vectors, entries, d,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = t < vectors
    best = tl.full((ROWS,), float("inf"), tl.float32)
    code = tl.zeros((ROWS,), tl.int32)
    for start in range(0, entries, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        column_mask = n < entries
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in range(0, d, DEPTH):
            c = depth + tl.arange(0, DEPTH)
            a = tl.load(x_ptr + t[:, None] * d + c[None, :], mask=row_mask[:, None] & (c < d)[None, :], other=0.0)
            b = tl.load(
                word_ptr + n.to(tl.int64)[None, :] * d + c[:, None],
                mask=column_mask[None, :] & (c < d)[:, None],
                other=0.0,
            )
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            product = tl.dot(a, b, product, input_precision="ieee")
        square = tl.load(square_ptr + n, mask=column_mask, other=float("inf"))
        distance = square[None, :] - 2.0 * product
        value, index = tl.min(distance, axis=1, return_indices=True, return_indices_tie_break_left=True)
        nearer = value < best
        best = tl.where(nearer, value, best)
        code = tl.where(nearer, start + index, code)
    tl.store(out_ptr + t, code.to(tl.int64), mask=row_mask)


def nearest_code(x: Tensor, codebook: Tensor, block: int, columns: int) -> Tensor:
    """Return (T,) for (T, d) and (N, d); what is subtracted before is rounded to the dtype of x, so half dtypes lose no range."""
    words = codebook.float()
    # Half dtypes hold no difference exactly.
    centre = words.mean(0) if x.dtype == torch.float32 else torch.zeros_like(words[0])
    points, words = (x.float() - centre).to(x.dtype).contiguous(), (words - centre).to(x.dtype).contiguous()
    square = words.float().square().sum(1)
    out = torch.empty(len(x), dtype=torch.int64, device=x.device)
    if len(x):
        nearest_code_kernel[(triton.cdiv(len(x), ROWS),)](
            points, words, square, out, len(x), len(codebook), x.shape[1], ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH,
            WIDEN=interpreting() and x.dtype == torch.bfloat16,
        )  # fmt: skip
    return out


_KINDS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
AHEAD_OF_TIME = {
    nearest_code_kernel: [
        (
            {
                "x_ptr": _KINDS[kind], "word_ptr": _KINDS[kind], "square_ptr": "*fp32", "out_ptr": "*i64", "vectors": "i32",
                "entries": "i32", "d": "i32",
            },
            {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH, "WIDEN": False},
        )
        for kind in TRITON_DTYPES
    ]
}  # fmt: skip
"""Signatures and constants that each kernel is compiled with ahead of time in the tests."""
