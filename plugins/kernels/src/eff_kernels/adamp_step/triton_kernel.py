"""adamp_step_ in Triton: per weight one pass for moments and sums over rows, a small decision, one pass for the weight.

Sums are written by part of a row and added in a fixed order: no atomics, the result does not depend on scheduling.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.adamp_step import cpu
from eff_kernels.dispatch import TRITON_DTYPES

LARGEST_BLOCK = 1024
ENOUGH = 1024
"""Programs that fill a GPU; rows are only cut into parts where there are fewer."""
MOST_PARTS = 64
SUMS = 2048
"""Sums that a step of the decision loads of each kind."""


@triton.jit
def update_of(first, second, g, beta1, root, eps, NESTEROV: tl.constexpr):
    moment = first
    if NESTEROV:
        moment = first + (1.0 - beta1) * (g - first)
    return moment / (tl.sqrt(second) / root + eps)


@triton.jit
def moments_kernel(
    w_ptr, g_ptr, m_ptr, v_ptr, sum_ptr, length, blocks_per_part, beta1, beta2, root, eps,
    NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    rows, parts = tl.num_programs(0), tl.num_programs(1)
    gw = tl.zeros((BLOCK,), tl.float32)
    ww = tl.zeros((BLOCK,), tl.float32)
    gg = tl.zeros((BLOCK,), tl.float32)
    uw = tl.zeros((BLOCK,), tl.float32)
    for block in range(0, blocks_per_part):
        column = (part * blocks_per_part + block) * BLOCK + tl.arange(0, BLOCK)
        mask = column < length
        index = row * length + column
        w = tl.load(w_ptr + index, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + index, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + index, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + index, mask=mask, other=0.0).to(tl.float32)
        m += (1.0 - beta1) * (g - m)
        v = beta2 * v + (1.0 - beta2) * g * g
        tl.store(m_ptr + index, m.to(m_ptr.dtype.element_ty), mask=mask)
        tl.store(v_ptr + index, v.to(v_ptr.dtype.element_ty), mask=mask)
        u = update_of(m, v, g, beta1, root, eps, NESTEROV)
        gw += g * w
        ww += w * w
        gg += g * g
        uw += tl.where(mask, u * w, 0.0)
    place = row * parts + part
    stride = rows.to(tl.int64) * parts
    tl.store(sum_ptr + place, tl.sum(gw, axis=0))
    tl.store(sum_ptr + stride + place, tl.sum(ww, axis=0))
    tl.store(sum_ptr + 2 * stride + place, tl.sum(gg, axis=0))
    tl.store(sum_ptr + 3 * stride + place, tl.sum(uw, axis=0))


@triton.jit
def row_sums(sum_ptr, which, row, rows, parts, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    place = (which * rows + row)[:, None] * parts + part[None, :]
    mask = (row < rows)[:, None] & (part < parts)[None, :]
    return tl.sum(tl.load(sum_ptr + place, mask=mask, other=0.0), axis=1)


@triton.jit
def decide_kernel(
    sum_ptr, factor_ptr, keep_ptr, rows, parts, row_limit, layer_limit, eps, decay, wd_ratio,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    largest = 0.0
    undefined = 0
    total_gw = 0.0
    total_ww = 0.0
    total_gg = 0.0
    total_uw = 0.0
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        gw = row_sums(sum_ptr, 0, row, rows, parts, PARTS)
        ww = row_sums(sum_ptr, 1, row, rows, parts, PARTS)
        gg = row_sums(sum_ptr, 2, row, rows, parts, PARTS)
        uw = row_sums(sum_ptr, 3, row, rows, parts, PARTS)
        cosine = tl.abs(gw) / (tl.maximum(tl.sqrt(ww), eps) * tl.maximum(tl.sqrt(gg), eps))
        largest = tl.maximum(largest, tl.max(cosine, axis=0))
        undefined += tl.sum((cosine != cosine).to(tl.int32), axis=0)  # a maximum passes over NaN
        total_gw += tl.sum(gw, axis=0)
        total_ww += tl.sum(ww, axis=0)
        total_gg += tl.sum(gg, axis=0)
        total_uw += tl.sum(uw, axis=0)
    norm = tl.sqrt(total_ww)
    cosine = tl.abs(total_gw) / (tl.maximum(norm, eps) * tl.maximum(tl.sqrt(total_gg), eps))
    by_row = (largest < row_limit) & (undefined == 0)
    by_layer = (largest >= row_limit) & (cosine < layer_limit)
    layer_factor = tl.where(by_layer, total_uw / ((norm + eps) * (norm + eps)), 0.0)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        length = tl.sqrt(row_sums(sum_ptr, 1, row, rows, parts, PARTS)) + eps
        row_factor = row_sums(sum_ptr, 3, row, rows, parts, PARTS) / (length * length)
        tl.store(factor_ptr + row, tl.where(by_row, row_factor, layer_factor), mask=row < rows)
    tl.store(keep_ptr, 1.0 - decay * tl.where(by_row | by_layer, wd_ratio, 1.0))


@triton.jit
def weight_kernel(
    w_ptr, g_ptr, m_ptr, v_ptr, factor_ptr, keep_ptr, length, blocks_per_part, beta1, root, eps, size,
    NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    factor = tl.load(factor_ptr + row)
    keep = tl.load(keep_ptr)
    for block in range(0, blocks_per_part):
        column = (part * blocks_per_part + block) * BLOCK + tl.arange(0, BLOCK)
        mask = column < length
        index = row * length + column
        w = tl.load(w_ptr + index, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + index, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + index, mask=mask, other=0.0).to(tl.float32)
        g = m
        if NESTEROV:
            g = tl.load(g_ptr + index, mask=mask, other=0.0).to(tl.float32)
        u = update_of(m, v, g, beta1, root, eps, NESTEROV)
        w = w * keep - size * (u - factor * w)
        tl.store(w_ptr + index, w.to(w_ptr.dtype.element_ty), mask=mask)


@triton.jit
def plain_kernel(
    w_ptr, g_ptr, m_ptr, v_ptr, length, keep, beta1, beta2, root, eps, size,
    NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < length
    w = tl.load(w_ptr + index, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + index, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + index, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + index, mask=mask, other=0.0).to(tl.float32)
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    u = update_of(m, v, g, beta1, root, eps, NESTEROV)
    tl.store(m_ptr + index, m.to(m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + index, v.to(v_ptr.dtype.element_ty), mask=mask)
    tl.store(w_ptr + index, (w * keep - size * u).to(w_ptr.dtype.element_ty), mask=mask)


def adamp_step_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], counts: list[Any],
    lr: Any, betas: tuple[float, float], eps: float, weight_decay: Any, delta: float, wd_ratio: float, nesterov: bool,
) -> None:  # fmt: skip
    """Do one step in place. Weights whose tensors are laid out differently go the way of `cpu`."""
    for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, counts, strict=True):
        *four, count = tensors
        if not four[0].numel():
            continue
        if _alike(four):
            _step(*four, count, lr, betas, eps, weight_decay, delta, wd_ratio, nesterov)
        else:
            each = [[tensor] for tensor in tensors]
            cpu.adamp_step_(*each, lr, betas, eps, weight_decay, delta, wd_ratio, nesterov)


def _alike(tensors: list[Tensor]) -> bool:
    """Whether the rows (dimension 0) lie one behind the other, in all tensors in the same way."""
    weight = tensors[0]
    dense = sorted(zip(weight.stride(), weight.shape, strict=True), reverse=True)
    expected = weight.numel()
    for stride, size in dense:
        expected //= size
        if size > 1 and stride != expected:
            return False
    first = weight.ndim < 2 or len(weight) == 1 or weight.stride(0) == weight.numel() // len(weight)
    return first and all(other.stride() == weight.stride() for other in tensors[1:])


def _step(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, count: float, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float, delta: float, wd_ratio: float, nesterov: bool,
) -> None:  # fmt: skip
    beta1, beta2 = betas
    root, size, decay = (1 - beta2**count) ** 0.5, lr / (1 - beta1**count), lr * weight_decay
    if w.ndim < 2:
        grid = (triton.cdiv(w.numel(), LARGEST_BLOCK),)
        plain_kernel[grid](
            w, g, m, v, w.numel(), 1 - decay, beta1, beta2, root, eps, size, NESTEROV=nesterov, BLOCK=LARGEST_BLOCK
        )
        return
    rows, length = len(w), w.numel() // len(w)
    block = min(LARGEST_BLOCK, triton.next_power_of_2(length))
    blocks = triton.cdiv(length, block)
    parts = min(blocks, MOST_PARTS, triton.cdiv(ENOUGH, rows))
    blocks_per_part = triton.cdiv(blocks, parts)
    parts = triton.cdiv(blocks, blocks_per_part)
    sums = torch.empty(4, rows, parts, dtype=torch.float32, device=w.device)
    factor, keep = (torch.empty(count, dtype=torch.float32, device=w.device) for count in (rows, 1))
    moments_kernel[(rows, parts)](
        w, g, m, v, sums, length, blocks_per_part, beta1, beta2, root, eps, NESTEROV=nesterov, BLOCK=block
    )
    width = triton.next_power_of_2(parts)
    decide_kernel[(1,)](
        sums, factor, keep, rows, parts, delta / length**0.5, delta / w.numel() ** 0.5, eps, decay, wd_ratio,
        ROWS=SUMS // width, PARTS=width,
    )  # fmt: skip
    weight_kernel[(rows, parts)](
        w, g, m, v, factor, keep, length, blocks_per_part, beta1, root, eps, size, NESTEROV=nesterov, BLOCK=block
    )


_KINDS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_RATES = dict.fromkeys(
    ("keep", "beta1", "beta2", "root", "eps", "size", "decay", "wd_ratio", "row_limit", "layer_limit"), "fp32"
)


def _signature(kernel: Any, kind: torch.dtype) -> dict[str, str]:
    names = [name for name in kernel.arg_names if name.islower()]
    pointers = {name: _KINDS[kind] for name in ("w_ptr", "g_ptr", "m_ptr", "v_ptr")}
    others = {"sum_ptr": "*fp32", "factor_ptr": "*fp32", "keep_ptr": "*fp32", "rows": "i32", "parts": "i32"}
    known = {**pointers, **others, **_RATES, "length": "i64", "blocks_per_part": "i32"}
    return {name: known[name] for name in names}


AHEAD_OF_TIME: dict[Any, list[Any]] = {
    update_of: [],
    row_sums: [],
    decide_kernel: [
        (_signature(decide_kernel, torch.float32), {"ROWS": SUMS // parts, "PARTS": parts}) for parts in (1, MOST_PARTS)
    ],
    **{
        kernel: [
            (_signature(kernel, kind), {"NESTEROV": nesterov, "BLOCK": LARGEST_BLOCK})
            for kind in TRITON_DTYPES
            for nesterov in (False, True)
        ]
        for kernel in (moments_kernel, weight_kernel, plain_kernel)
    },
}
"""Signatures and constants that each kernel is compiled with ahead of time in the tests; helpers within their callers."""
