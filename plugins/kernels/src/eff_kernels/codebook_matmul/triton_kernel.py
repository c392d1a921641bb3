"""codebook_matmul in Triton: codes are read packed, entries come from the cache, the weight exists in registers only.

Entries whose length is no power of two are padded to one inside a tile; x is read with the same gaps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.codebook_matmul import tile
from eff_kernels.codebook_matmul.reference import unpack_codes, widened

FUSED_ROWS = {torch.float32: 16, torch.float16: 64, torch.bfloat16: 64}
"""Rows of x up to which the product decodes in the kernel: every row block decodes again."""
VECTOR_N, VECTOR_K = 8, 512
DECODE_N, DECODE_K = 16, 128


@triton.jit
def vector_kernel(
    x_ptr, packed_ptr, codebook_ptr, out_ptr, n, k, codes_per_row, entries,
    BITS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.arange(0, BLOCK_J * PADDED)
    column = place // PADDED * DIM + place % PADDED
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, codes_per_row, BLOCK_J):
        w = tile.weight(
            packed_ptr, codebook_ptr, row, n, codes_per_row, start, entries, BITS, DIM, PADDED, BLOCK_N, BLOCK_J
        )
        at = start * DIM + column
        x = tl.load(x_ptr + at, mask=(place % PADDED < DIM) & (at < k), other=0.0).to(tl.float32)
        total += tl.sum(w.to(tl.float32) * x[None, :], axis=1)
    tl.store(out_ptr + row, total.to(out_ptr.dtype.element_ty), mask=row < n)


@triton.jit
def product_kernel(
    x_ptr, packed_ptr, codebook_ptr, out_ptr, m, n, k, codes_per_row, entries,
    BITS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.arange(0, BLOCK_J * PADDED)
    column = place // PADDED * DIM + place % PADDED
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, codes_per_row, BLOCK_J):
        w = tile.weight(
            packed_ptr, codebook_ptr, output, n, codes_per_row, start, entries, BITS, DIM, PADDED, BLOCK_N, BLOCK_J
        )
        at = start * DIM + column
        mask = (row[:, None] < m) & (place % PADDED < DIM)[None, :] & (at < k)[None, :]
        x = tl.load(x_ptr + row[:, None] * k + at[None, :], mask=mask, other=0.0)
        total = tl.dot(x, tl.trans(w.to(x.dtype)), total, input_precision="ieee")
    out_ptrs = out_ptr + row[:, None] * n + output[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(row[:, None] < m) & (output[None, :] < n))


@triton.jit
def decode_kernel(
    packed_ptr, codebook_ptr, out_ptr, n, k, codes_per_row, entries,
    BITS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_J
    w = tile.weight(
        packed_ptr, codebook_ptr, row, n, codes_per_row, start, entries, BITS, DIM, PADDED, BLOCK_N, BLOCK_J
    )
    place = tl.arange(0, BLOCK_J * PADDED)
    at = start * DIM + place // PADDED * DIM + place % PADDED
    mask = (row[:, None] < n) & ((place % PADDED < DIM) & (at < k))[None, :]
    tl.store(out_ptr + row[:, None] * k + at[None, :], w.to(out_ptr.dtype.element_ty), mask=mask)


def way(m: int, dtype: torch.dtype) -> str:
    """Say how m rows are multiplied."""
    if m == 1:
        return "vector kernel"
    return "decoded in the product" if m <= FUSED_ROWS[dtype] else "decode, then the library's product"


def forward(x: Tensor, packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Return x (M, K) times the transposed weight, (M, N)."""
    m, n = len(x), len(packed)
    if m > FUSED_ROWS[x.dtype]:
        return x @ decode(packed, codebook, bits).t()
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if not m:
        return out
    tensors, sizes, constants = _arguments(packed, codebook, bits)
    x = x.contiguous()
    if m == 1:
        vector_kernel[(triton.cdiv(n, VECTOR_N),)](
            x, *tensors, out, n, *sizes, **constants, BLOCK_N=VECTOR_N, BLOCK_J=VECTOR_K // constants["PADDED"]
        )
        return out
    block_m, block_n, block_k = _blocks(m)
    product_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, block_n))](
        x, *tensors, out, m, n, *sizes, **constants,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_J=block_k // constants["PADDED"],
    )  # fmt: skip
    return out


def decode(packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Return the weight (N, K)."""
    tensors, sizes, constants = _arguments(packed, codebook, bits)
    n, k, codes_per_row = len(packed), *sizes[:2]
    out = torch.empty(n, k, dtype=codebook.dtype, device=packed.device)
    block_j = DECODE_K // constants["PADDED"]
    decode_kernel[(triton.cdiv(n, DECODE_N), triton.cdiv(codes_per_row, block_j))](
        *tensors, out, n, *sizes, **constants, BLOCK_N=DECODE_N, BLOCK_J=block_j
    )
    return out


def backward_x(grad: Tensor, packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Return the gradient of x, (M, K): it sums over rows of the weight, which are packed the other way."""
    return grad @ decode(packed, codebook, bits)


def backward_codebook(grad: Tensor, x: Tensor, packed: Tensor, entries: int, bits: int) -> Tensor:
    """Return the gradient of the codebook (entries, dim).

    It is that of an embedding table whose rows are looked up by code; torch's sorts the codes and uses no atomics.
    """
    codes = unpack_codes(packed, bits).flatten()
    d_weight = (widened(grad).t() @ widened(x)).view(len(codes), -1)
    d_codebook: Tensor = torch.ops.aten.embedding_dense_backward(d_weight, codes, entries, -1, False)
    return d_codebook.to(grad.dtype)


def _arguments(
    packed: Tensor, codebook: Tensor, bits: int
) -> tuple[tuple[Tensor, Tensor], tuple[int, int, int], dict[str, int]]:
    """Return what all kernels take: tensors, sizes (k, codes a row, entries), constants."""
    entries, dim = codebook.shape
    codes_per_row = packed.shape[1] * 8 // bits
    constants = {"BITS": bits, "DIM": dim, "PADDED": triton.next_power_of_2(dim)}
    words = packed.view(torch.uint16) if bits == 16 else packed
    return (words, codebook.contiguous()), (codes_per_row * dim, codes_per_row, entries), constants


def _blocks(m: int) -> tuple[int, int, int]:
    """Return block sizes of rows, columns and K: narrow blocks keep a GPU busy while there are few rows."""
    if m <= 16:
        return 16, 32, 128
    return (32 if m <= 32 else 64), 64, 64


_SIZES = {"n": "i32", "k": "i32", "codes_per_row": "i32", "entries": "i32"}
_CASES = [("*fp32", 4, 3), ("*fp16", 8, 4), ("*bf16", 16, 8), ("*bf16", 8, 2)]
"""Dtype, bits and dim."""


def _case(kind: str, bits: int, dim: int) -> tuple[dict[str, str], dict[str, int]]:
    pointers = {"packed_ptr": "*u16" if bits == 16 else "*u8", "codebook_ptr": kind, "out_ptr": kind}
    return pointers, {"BITS": bits, "DIM": dim, "PADDED": triton.next_power_of_2(dim)}


def _block(block_k: int, constants: dict[str, int]) -> dict[str, int]:
    return {**constants, "BLOCK_J": block_k // constants["PADDED"]}


AHEAD_OF_TIME = {
    vector_kernel: [
        ({"x_ptr": kind, **pointers, **_SIZES}, {**_block(VECTOR_K, constants), "BLOCK_N": VECTOR_N})
        for kind, bits, dim in _CASES
        for pointers, constants in [_case(kind, bits, dim)]
    ],
    product_kernel: [
        (
            {"x_ptr": kind, **pointers, "m": "i32", **_SIZES},
            {**_block(_blocks(rows)[2], constants), "BLOCK_M": _blocks(rows)[0], "BLOCK_N": _blocks(rows)[1]},
        )
        for (kind, bits, dim), rows in zip(_CASES, (16, 16, 64, 32), strict=True)
        for pointers, constants in [_case(kind, bits, dim)]
    ],
    decode_kernel: [
        ({**pointers, **_SIZES}, {**_block(DECODE_K, constants), "BLOCK_N": DECODE_N})
        for kind, bits, dim in _CASES
        for pointers, constants in [_case(kind, bits, dim)]
    ],
}
"""Signatures and constants that each kernel is compiled with ahead of time in the tests."""
