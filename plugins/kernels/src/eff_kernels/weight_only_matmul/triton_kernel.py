"""weight_only_matmul in Triton: levels are unpacked and scaled in registers, so the weight is read once, packed.

One row is bound by that reading: a vector kernel whose programs hold few rows of the weight and many of its columns. More
rows share the unpacked tile in a fused product. Where the product itself is the limit, unpacking in every row block
would repeat work, so the weight is dequantized once and the library multiplies.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.weight_only_matmul import tile

FUSED_ROWS = {torch.float32: 16, torch.float16: 256, torch.bfloat16: 256}
"""Rows of x up to which the product is fused; float32 has no tensor cores of its precision."""
VECTOR_N, VECTOR_K = 8, 1024
DEQUANTIZE_N, DEQUANTIZE_K = 16, 256


@triton.jit
def vector_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, out_ptr, n, k, row_bytes, groups, group_size,
    BITS: tl.constexpr, HAS_ZERO: tl.constexpr, SPAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    SPANS: tl.constexpr = BLOCK_K // SPAN
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, k, BLOCK_K):
        w = tile.levels(packed_ptr, row, n, row_bytes, start, BITS, BLOCK_N, BLOCK_K).to(tl.float32)
        w = tl.reshape(w, (BLOCK_N, SPANS, SPAN))
        if HAS_ZERO:
            w -= tile.per_group(zero_ptr, row, n, start, groups, group_size, SPAN, SPANS)[:, :, None]
        else:
            w -= 2 ** (BITS - 1)
        x = tl.load(x_ptr + start + column, mask=column < k - start, other=0.0).to(tl.float32)
        sums = tl.sum(w * tl.reshape(x, (1, SPANS, SPAN)), axis=2)  # one multiplication by the scale per group
        total += tl.sum(sums * tile.per_group(scale_ptr, row, n, start, groups, group_size, SPAN, SPANS), axis=1)
    tl.store(out_ptr + row, total.to(out_ptr.dtype.element_ty), mask=row < n)


@triton.jit
def product_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, out_ptr, m, n, k, row_bytes, groups, group_size,
    BITS: tl.constexpr, HAS_ZERO: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    SPANS: tl.constexpr = BLOCK_K // SPAN
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        mask = (row[:, None] < m) & (inner[None, :] < k - start)
        x = tl.load(x_ptr + row[:, None] * k + start + inner[None, :], mask=mask, other=0.0)
        w = tile.levels(packed_ptr, column, n, row_bytes, start, BITS, BLOCK_N, BLOCK_K).to(tl.float32)
        w = tl.reshape(w, (BLOCK_N, SPANS, SPAN))
        if HAS_ZERO:
            w -= tile.per_group(zero_ptr, column, n, start, groups, group_size, SPAN, SPANS)[:, :, None]
        else:
            w -= 2 ** (BITS - 1)
        w *= tile.per_group(scale_ptr, column, n, start, groups, group_size, SPAN, SPANS)[:, :, None]
        w = tl.reshape(w, (BLOCK_N, BLOCK_K)).to(x.dtype)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    out_ptrs = out_ptr + row[:, None] * n + column[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(row[:, None] < m) & (column[None, :] < n))


@triton.jit
def dequantize_kernel(
    packed_ptr, scale_ptr, zero_ptr, out_ptr, n, k, row_bytes, groups, group_size,
    BITS: tl.constexpr, HAS_ZERO: tl.constexpr, SPAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    SPANS: tl.constexpr = BLOCK_K // SPAN
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_K
    w = tile.levels(packed_ptr, row, n, row_bytes, start, BITS, BLOCK_N, BLOCK_K).to(tl.float32)
    w = tl.reshape(w, (BLOCK_N, SPANS, SPAN))
    if HAS_ZERO:
        w -= tile.per_group(zero_ptr, row, n, start, groups, group_size, SPAN, SPANS)[:, :, None]
    else:
        w -= 2 ** (BITS - 1)
    w *= tile.per_group(scale_ptr, row, n, start, groups, group_size, SPAN, SPANS)[:, :, None]
    column = start + tl.arange(0, BLOCK_K)
    out_ptrs = out_ptr + row[:, None] * k + column[None, :]
    w = tl.reshape(w, (BLOCK_N, BLOCK_K)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, w, mask=(row[:, None] < n) & (column[None, :] < k))


def way(m: int, dtype: torch.dtype) -> str:
    """Say how m rows are multiplied."""
    if m == 1:
        return "vector kernel"
    return "fused product" if m <= FUSED_ROWS[dtype] else "dequantize, then the library's product"


def forward(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return x (M, K) times the transposed weight, (M, N)."""
    m, n = len(x), len(packed)
    if m > FUSED_ROWS[x.dtype]:
        return x @ dequantize(packed, scale, zero_point, bits, x.dtype).t()
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if not m:
        return out
    tensors, sizes, constants = _arguments(packed, scale, zero_point, bits)
    x = x.contiguous()
    if m == 1:
        vector_kernel[(triton.cdiv(n, VECTOR_N),)](
            x, *tensors, out, n, *sizes, **constants, SPAN=_span(sizes[-1], VECTOR_K),
            BLOCK_N=VECTOR_N, BLOCK_K=VECTOR_K,
        )  # fmt: skip
        return out
    block_m, block_n, block_k = _blocks(m)
    product_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, block_n))](
        x, *tensors, out, m, n, *sizes, **constants, SPAN=_span(sizes[-1], block_k),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_stages=3,
    )  # fmt: skip
    return out


def backward(grad: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return the gradient of x, (M, K): it sums over rows of the weight, which are packed the other way."""
    return grad @ dequantize(packed, scale, zero_point, bits, grad.dtype)


def dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K)."""
    n, k = len(packed), packed.shape[1] * 8 // bits
    out = torch.empty(n, k, dtype=dtype, device=packed.device)
    tensors, sizes, constants = _arguments(packed, scale, zero_point, bits)
    dequantize_kernel[(triton.cdiv(n, DEQUANTIZE_N), triton.cdiv(k, DEQUANTIZE_K))](
        *tensors, out, n, *sizes, **constants, SPAN=_span(sizes[-1], DEQUANTIZE_K),
        BLOCK_N=DEQUANTIZE_N, BLOCK_K=DEQUANTIZE_K,
    )  # fmt: skip
    return out


def _arguments(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int, int], dict[str, int | bool]]:
    """Return what all kernels take: tensors, sizes (k, bytes a row, groups, group size), constants."""
    scale = _readable(scale)
    zero = scale if zero_point is None else _readable(zero_point)
    k, groups = packed.shape[1] * 8 // bits, scale.shape[1]
    return (
        (packed, scale, zero),
        (k, packed.shape[1], groups, k // groups),
        {"BITS": bits, "HAS_ZERO": zero_point is not None},
    )


def _readable(values: Tensor) -> Tensor:
    """Return a contiguous tensor in a dtype that kernels read."""
    return (values.float() if values.dtype == torch.float64 else values).contiguous()


def _span(group_size: int, block_k: int) -> int:
    """Return how many columns share a scale inside a block: a power of two that divides both."""
    return math.gcd(group_size, block_k)


def _blocks(m: int) -> tuple[int, int, int]:
    """Return block sizes of rows, columns and K: narrow blocks keep a GPU busy while there are few rows."""
    if m <= 16:
        return 16, 32, 128
    return (32 if m <= 32 else 64), 64, 64


_SIZES = {"n": "i32", "k": "i32", "row_bytes": "i32", "groups": "i32", "group_size": "i32"}
_KINDS = ("*fp32", "*fp16", "*bf16")
_BITS = (2, 3, 4, 8)


def _signature(kind: str) -> dict[str, str]:
    return {"packed_ptr": "*u8", "scale_ptr": kind, "zero_ptr": kind, "out_ptr": kind}


AHEAD_OF_TIME = {
    vector_kernel: [
        (
            {"x_ptr": kind, **_signature(kind), **_SIZES},
            {"BITS": bits, "HAS_ZERO": True, "SPAN": 128, "BLOCK_N": VECTOR_N, "BLOCK_K": VECTOR_K},
        )
        for kind, bits in [*zip(_KINDS, _BITS[:3], strict=True), ("*bf16", 8)]
    ],
    product_kernel: [
        (
            {"x_ptr": kind, **_signature(kind), "m": "i32", **_SIZES},
            {
                "BITS": bits, "HAS_ZERO": False, "SPAN": 32,
                "BLOCK_M": _blocks(rows)[0], "BLOCK_N": _blocks(rows)[1], "BLOCK_K": _blocks(rows)[2],
            },
        )
        for kind, bits, rows in [("*fp32", 2, 16), ("*fp16", 3, 64), ("*bf16", 4, 64), ("*bf16", 8, 16)]
    ],
    dequantize_kernel: [
        (
            {**_signature(kind), **_SIZES},
            {"BITS": bits, "HAS_ZERO": True, "SPAN": 8, "BLOCK_N": DEQUANTIZE_N, "BLOCK_K": DEQUANTIZE_K},
        )
        for kind, bits in [*zip(_KINDS, _BITS[:3], strict=True), ("*bf16", 8)]
    ],
}  # fmt: skip
"""Signatures and constants that each kernel is compiled with ahead of time in the tests."""
