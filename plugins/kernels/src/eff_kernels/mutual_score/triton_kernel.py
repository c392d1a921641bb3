"""mutual_distances in Triton: a program holds some patches of one image and runs over all patches of another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.dispatch import TRITON_DTYPES, interpreting

ROWS, COLUMNS, DEPTH = 64, 64, 32


@triton.jit
def nearest_kernel(
    z_ptr, square_ptr, out_ptr, images, patches, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1).to(tl.int64)
    j = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = m < patches
    row_ptr = z_ptr + (i * patches + m)[:, None] * channels
    own = tl.load(square_ptr + i * patches + m, mask=row_mask, other=0.0)
    nearest = tl.full((ROWS,), float("inf"), tl.float32)
    for start in range(0, patches, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        column_mask = n < patches
        column_ptr = z_ptr + (j * patches + n)[None, :] * channels
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in range(0, channels, DEPTH):
            c = depth + tl.arange(0, DEPTH)
            a = tl.load(row_ptr + c[None, :], mask=row_mask[:, None] & (c < channels)[None, :], other=0.0)
            b = tl.load(column_ptr + c[:, None], mask=column_mask[None, :] & (c < channels)[:, None], other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            product = tl.dot(a, b, product, input_precision="ieee")
        others = tl.load(square_ptr + j * patches + n, mask=column_mask, other=float("inf"))
        nearest = tl.minimum(nearest, tl.min(others[None, :] - 2.0 * product, axis=1))
    distance = tl.sqrt(tl.maximum(nearest + own, 0.0))
    distance = tl.where(i == j, float("inf"), distance)
    tl.store(out_ptr + (i * images + j) * patches + m, distance, mask=row_mask)


def mutual_distances(z: Tensor) -> Tensor:
    """Return (N, N, L) for (N, L, C)."""
    z = z.contiguous()
    images, patches, channels = z.shape
    square = z.float().square().sum(-1)
    out = torch.empty(images, images, patches, dtype=torch.float32, device=z.device)
    nearest_kernel[(triton.cdiv(patches, ROWS), images, images)](
        z, square, out, images, patches, channels, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH,
        WIDEN=interpreting() and z.dtype == torch.bfloat16,
    )  # fmt: skip
    return out


_KINDS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
AHEAD_OF_TIME = {
    nearest_kernel: [
        (
            {
                "z_ptr": _KINDS[kind], "square_ptr": "*fp32", "out_ptr": "*fp32", "images": "i32", "patches": "i32",
                "channels": "i32",
            },
            {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH, "WIDEN": False},
        )
        for kind in TRITON_DTYPES
    ]
}  # fmt: skip
"""Signatures and constants that each kernel is compiled with ahead of time in the tests."""
