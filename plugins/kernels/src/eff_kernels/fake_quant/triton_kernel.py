"""fake_quant in Triton. A tensor is seen as (outer, channels, inner); one scale is channels = 1.

Backward reduces in two stages, without atomics: programs write partial sums in a fixed layout, a
second kernel adds them in a fixed order. The result does not depend on scheduling.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
SMALLEST_BLOCK = 32
"""Of a backward program where a channel or group has few elements."""
MAX_PARTS = 512
"""Partial sums per channel at most; bounds the second stage."""

# Adding and subtracting 1.5 * 2^23 rounds a float32 of magnitude below 2^22 half to even, and so
# works alike in the interpreter and on every target; levels are far below 2^22.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def forward_kernel(
    x_ptr, scale_ptr, offset_ptr, out_ptr, size, channels, inner,
    Q_MIN: tl.constexpr, Q_MAX: tl.constexpr, HAS_OFFSET: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = index < size
    channel = (index // inner) % channels
    x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(scale_ptr + channel, mask=mask, other=1.0)
    beta = tl.zeros_like(s)
    if HAS_OFFSET:
        beta = tl.load(offset_ptr + channel, mask=mask, other=0.0)
    u_raw = tl.div_rn(x - beta, s)
    nan = u_raw != u_raw  # also from a NaN or zero scale: it must not look like a quantized value
    u = tl.where(nan, 0.0, tl.minimum(tl.maximum(u_raw, Q_MIN), Q_MAX))
    level = (u + _ROUND) - _ROUND
    out = tl.where(nan, u_raw, level * s + beta)
    tl.store(out_ptr + index, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    grad_ptr, x_ptr, scale_ptr, offset_ptr, dx_ptr, part_scale_ptr, part_offset_ptr,
    per_channel, channels, inner, blocks_per_part,
    Q_MIN: tl.constexpr, Q_MAX: tl.constexpr, HAS_OFFSET: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(1)
    s = tl.load(scale_ptr + channel)
    beta = s * 0.0
    if HAS_OFFSET:
        beta = tl.load(offset_ptr + channel)
    sum_scale = tl.zeros((BLOCK_SIZE,), tl.float32)
    sum_offset = tl.zeros((BLOCK_SIZE,), tl.float32)
    for block in range(0, blocks_per_part):
        element = (part * blocks_per_part + block) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        mask = element < per_channel
        index = ((element // inner) * channels + channel) * inner + element % inner
        x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + index, mask=mask, other=0.0).to(tl.float32)
        u = tl.div_rn(x - beta, s)
        inside = (u >= Q_MIN) & (u <= Q_MAX)
        tl.store(dx_ptr + index, tl.where(inside, g, 0.0).to(dx_ptr.dtype.element_ty), mask=mask)
        level = (tl.where(inside, u, 0.0) + _ROUND) - _ROUND
        r = tl.where(u <= Q_MIN, Q_MIN * 1.0, tl.where(u >= Q_MAX, Q_MAX * 1.0, level - u))
        sum_scale += tl.where(mask, g * r, 0.0)
        if HAS_OFFSET:
            clipped = (u < Q_MIN) | (u > Q_MAX)
            sum_offset += tl.where(mask & clipped, g, 0.0)
    tl.store(part_scale_ptr + channel * parts + part, tl.sum(sum_scale, axis=0))
    if HAS_OFFSET:
        tl.store(part_offset_ptr + channel * parts + part, tl.sum(sum_offset, axis=0))


@triton.jit
def sum_parts_kernel(part_ptr, out_ptr, parts, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_SIZE)
    values = tl.load(part_ptr + row * parts + column, mask=column < parts, other=0.0)
    tl.store(out_ptr + row, tl.sum(values, axis=0))


def _view(x: Tensor, dim: int) -> tuple[int, int, int]:
    """Return outer, channels, inner of a contiguous tensor."""
    if dim < 0:
        return 1, 1, max(1, x.numel())
    outer = x.shape[:dim].numel()
    return outer, x.shape[dim], x.shape[dim + 1 :].numel()


def _storage_order(like: Tensor) -> list[int]:
    """Return the permutation of dimensions that makes a dense tensor (of `empty_like`) contiguous."""
    return sorted(range(like.ndim), key=lambda index: -like.stride(index))


def forward(x: Tensor, scale: Tensor, offset: Tensor | None, q_min: int, q_max: int, dim: int) -> Tensor:
    """Return the fake-quantized values; one read and one write of `x`, also when it is channels-last."""
    out = torch.empty_like(x)  # strides as the fake implementation promises them to torch.compile
    if x.numel() == 0:
        return out
    order = _storage_order(out)
    x = x.permute(order).contiguous()
    _, channels, inner = _view(x, order.index(dim) if dim >= 0 else dim)
    beta = scale if offset is None else offset.contiguous()
    forward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
        x, scale.contiguous(), beta, out, x.numel(), channels, inner,
        Q_MIN=q_min, Q_MAX=q_max, HAS_OFFSET=offset is not None, BLOCK_SIZE=BLOCK,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, q_min: int, q_max: int, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, scale and offset (the last two before `grad_scale`)."""
    d_x = torch.empty_like(x)
    d_scale, d_offset = torch.zeros_like(scale), torch.zeros_like(scale)
    if x.numel() == 0:
        return d_x, d_scale, d_offset
    order = _storage_order(d_x)
    x, grad, scale = x.permute(order).contiguous(), grad.permute(order).contiguous(), scale.contiguous()
    outer, channels, inner = _view(x, order.index(dim) if dim >= 0 else dim)
    per_channel = outer * inner
    block = min(BLOCK, max(SMALLEST_BLOCK, triton.next_power_of_2(per_channel)))
    blocks = triton.cdiv(per_channel, block)
    blocks_per_part = triton.cdiv(blocks, MAX_PARTS)
    parts = triton.cdiv(blocks, blocks_per_part)
    part_scale = torch.empty(channels, parts, dtype=torch.float32, device=x.device)
    part_offset = torch.empty_like(part_scale)
    beta = scale if offset is None else offset.contiguous()
    backward_kernel[(channels, parts)](
        grad, x, scale, beta, d_x, part_scale, part_offset, per_channel, channels, inner, blocks_per_part,
        Q_MIN=q_min, Q_MAX=q_max, HAS_OFFSET=offset is not None, BLOCK_SIZE=block,
    )  # fmt: skip
    width = triton.next_power_of_2(parts)
    sum_parts_kernel[(channels,)](part_scale, d_scale, parts, BLOCK_SIZE=width)
    if offset is not None:
        sum_parts_kernel[(channels,)](part_offset, d_offset, parts, BLOCK_SIZE=width)
    return d_x, d_scale, d_offset


_POINTERS = {"x_ptr": "*fp32", "scale_ptr": "*fp32", "offset_ptr": "*fp32"}
_DTYPES = ("*fp32", "*fp16", "*bf16")


def _range(has_offset: bool, block: int = BLOCK) -> dict[str, Any]:
    return {"Q_MIN": -8, "Q_MAX": 7, "HAS_OFFSET": has_offset, "BLOCK_SIZE": block}


AHEAD_OF_TIME = {
    forward_kernel: [
        ({**_POINTERS, "x_ptr": kind, "out_ptr": kind, "size": size, "channels": "i32", "inner": size}, _range(has_offset))
        for kind in _DTYPES
        for size, has_offset in (("i64", True), ("i32", False))
    ],
    backward_kernel: [
        (
            {
                "grad_ptr": kind, **_POINTERS, "x_ptr": kind, "dx_ptr": kind, "part_scale_ptr": "*fp32",
                "part_offset_ptr": "*fp32", "per_channel": size, "channels": "i32", "inner": size, "blocks_per_part": "i32",
            },
            _range(has_offset, block),
        )
        for kind in _DTYPES
        for size, has_offset, block in (("i64", True, BLOCK), ("i32", False, 128))
    ],
    sum_parts_kernel: [({"part_ptr": "*fp32", "out_ptr": "*fp32", "parts": "i32"}, {"BLOCK_SIZE": 512})],
}  # fmt: skip
"""Signatures and constants that each kernel is compiled with ahead of time in the tests."""
