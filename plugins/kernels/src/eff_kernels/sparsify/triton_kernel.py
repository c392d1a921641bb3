"""sparsify in Triton: a pass that counts per block, and one that writes each block's entries where its count begins.

No atomics: the indices come out ascending, whatever the scheduling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.dispatch import TRITON_DTYPES
from eff_kernels.sparsify.reference import check_finite, check_nan, choose

BLOCK = 1024


@triton.jit
def accumulate_kernel(
    g_ptr, u_ptr, v_ptr, size, momentum, NESTEROV: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    g = tl.load(g_ptr + index, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + index, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + index, mask=mask, other=0.0).to(tl.float32)
    if NESTEROV:
        u = momentum * (u + g)
        v = v + u + g
    else:
        u = momentum * u + g
        v = v + u
    tl.store(u_ptr + index, u.to(u_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + index, v.to(v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def count_kernel(v_ptr, threshold_ptr, count_ptr, nan_ptr, size, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    index = block * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(v_ptr + index, mask=index < size, other=0.0).to(tl.float32)
    passes = (tl.abs(v) >= tl.load(threshold_ptr)) & (index < size)
    tl.store(count_ptr + block, tl.sum(passes.to(tl.int64), axis=0))
    tl.store(nan_ptr + block, tl.sum((v != v).to(tl.int32), axis=0))


@triton.jit
def write_kernel(v_ptr, threshold_ptr, end_ptr, out_ptr, size, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    index = block * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(v_ptr + index, mask=index < size, other=0.0).to(tl.float32)
    passes = (tl.abs(v) >= tl.load(threshold_ptr)) & (index < size)
    rank = tl.cumsum(passes.to(tl.int64), axis=0)
    begin = tl.load(end_ptr + block) - tl.sum(passes.to(tl.int64), axis=0)
    tl.store(out_ptr + begin + rank - 1, index, mask=passes)


def accumulate_(gradient: Tensor, u: Tensor, v: Tensor, momentum: float, nesterov: bool) -> None:
    """Add a gradient to momentum and residual, in place; both contiguous."""
    check_finite(gradient)
    gradient = gradient.contiguous()
    if v.numel():
        grid = (triton.cdiv(v.numel(), BLOCK),)
        accumulate_kernel[grid](gradient, u, v, v.numel(), momentum, NESTEROV=nesterov, BLOCK=BLOCK)


def sparsify(
    v: Tensor, keep: int, stride: int, start: int, share: float, upper: float, lower: float, max_iterations: int,
    resample: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return values and indices."""
    flat = v.flatten()
    blocks = triton.cdiv(len(flat), BLOCK)
    counts = torch.empty(blocks, dtype=torch.int64, device=v.device)
    bad = torch.empty(blocks, dtype=torch.int32, device=v.device)

    def passing(threshold: Tensor) -> Tensor:
        threshold = threshold.float()
        count_kernel[(blocks,)](flat, threshold, counts, bad, len(flat), BLOCK=BLOCK)
        check_nan(bad.any())
        ends = counts.cumsum(0)
        out = torch.empty(int(ends[-1]), dtype=torch.int64, device=v.device)
        write_kernel[(blocks,)](flat, threshold, ends, out, len(flat), BLOCK=BLOCK)
        return out

    if stride == 1:
        check_nan(flat.isnan().any())
    return choose(flat, passing, keep, stride, start, share, upper, lower, max_iterations, resample)


_KINDS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
AHEAD_OF_TIME = {
    accumulate_kernel: [
        (
            {"g_ptr": _KINDS[kind], "u_ptr": _KINDS[kind], "v_ptr": _KINDS[kind], "size": "i64", "momentum": "fp32"},
            {"NESTEROV": nesterov, "BLOCK": BLOCK},
        )
        for kind in TRITON_DTYPES
        for nesterov in (False, True)
    ],
    count_kernel: [
        (
            {"v_ptr": _KINDS[kind], "threshold_ptr": "*fp32", "count_ptr": "*i64", "nan_ptr": "*i32", "size": "i64"},
            {"BLOCK": BLOCK},
        )
        for kind in TRITON_DTYPES
    ],
    write_kernel: [
        (
            {"v_ptr": _KINDS[kind], "threshold_ptr": "*fp32", "end_ptr": "*i64", "out_ptr": "*i64", "size": "i64"},
            {"BLOCK": BLOCK},
        )
        for kind in TRITON_DTYPES
    ],
}
"""Signatures and constants that each kernel is compiled with ahead of time in the tests."""
