"""int_matmul in Triton: a tiled 8-bit product; bias, rescaling and clip happen before the sums leave the chip."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.int_matmul import tile
from eff_kernels.int_matmul.reference import output_dtype

GROUP = 8
"""Row blocks that run side by side, so that they find each other's weight blocks in the L2 cache."""


@triton.jit
def matmul_kernel(
    x_ptr, weight_ptr, multiplier_ptr, shift_ptr, bias_ptr, out_ptr, m, n, k,
    Q_MIN: tl.constexpr, Q_MAX: tl.constexpr, HALF_EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, UNSIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    row, column = tile.place(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    total = tile.sums(x_ptr, weight_ptr, row, column, m, n, k, UNSIGNED, BLOCK_M, BLOCK_N, BLOCK_K)
    wide = total.to(tl.int64)
    if HAS_BIAS:
        wide += tl.load(bias_ptr + column, mask=column < n, other=0).to(tl.int64)[None, :]
    e = tl.load(shift_ptr + column, mask=column < n, other=1).to(tl.int64)
    one = tl.full((BLOCK_N,), 1, tl.int64)
    scaled = wide * tl.load(multiplier_ptr + column, mask=column < n, other=0).to(tl.int64)[None, :]
    scaled += (one << (e - 1))[None, :]
    level = scaled >> e[None, :]
    if HALF_EVEN:
        tie = (scaled & ((one << e) - 1)[None, :]) == 0
        level = tl.where(tie, level & ~1, level)
    level = tl.minimum(tl.maximum(level, Q_MIN), Q_MAX)
    out_ptrs = out_ptr + row[:, None] * n + column[None, :]
    tl.store(out_ptrs, level.to(out_ptr.dtype.element_ty), mask=(row[:, None] < m) & (column[None, :] < n))


@triton.jit
def scaled_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, m, n, k,
    HAS_BIAS: tl.constexpr, UNSIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    row, column = tile.place(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    total = tile.sums(x_ptr, weight_ptr, row, column, m, n, k, UNSIGNED, BLOCK_M, BLOCK_N, BLOCK_K)
    y = total.to(tl.float32) * tl.load(scale_ptr + column, mask=column < n, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=column < n, other=0.0)[None, :]
    tl.store(out_ptr + row[:, None] * n + column[None, :], y, mask=(row[:, None] < m) & (column[None, :] < n))


def _blocks(m: int) -> tuple[int, int, int, int, int]:
    """Return block sizes of rows, columns and K, warps and stages.

    Few rows are bound by reading the weight: narrow blocks give every multiprocessor one. Many are bound by the
    product: square blocks reuse what they load.
    """
    if m <= 16:
        return 16, 32, 256, 4, 4
    if m <= 64:
        return 32 if m <= 32 else 64, 64, 128, 4, 4
    return 128, 128, 128, 8, 3


def forward(
    x: Tensor, weight: Tensor, multiplier: Tensor, shift: Tensor, bias: Tensor | None,
    q_min: int, q_max: int, half_even: bool,
) -> Tensor:  # fmt: skip
    """Return the requantized product of x (M, K) and weight (N, K)."""
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=output_dtype(q_max), device=x.device)
    if not m:
        return out
    multiplier, shift = multiplier.contiguous(), shift.contiguous()
    block_m, block_n, block_k, warps, stages = _blocks(m)
    matmul_kernel[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
        x.contiguous(), weight, multiplier, shift, shift if bias is None else bias.contiguous(), out, m, n, k,
        Q_MIN=q_min, Q_MAX=q_max, HALF_EVEN=half_even, HAS_BIAS=bias is not None, UNSIGNED=x.dtype == torch.uint8,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=GROUP, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def scaled(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return the product of x (M, K) and weight (N, K) in float32, scaled per row of the weight."""
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=torch.float32, device=x.device)
    if not m:
        return out
    scale = scale.contiguous()
    block_m, block_n, block_k, warps, stages = _blocks(m)
    scaled_kernel[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
        x.contiguous(), weight, scale, scale if bias is None else bias.contiguous(), out, m, n, k,
        HAS_BIAS=bias is not None, UNSIGNED=x.dtype == torch.uint8,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=GROUP, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


_VECTORS = {"multiplier_ptr": "*i32", "shift_ptr": "*i32", "bias_ptr": "*i32"}
_SIZES = {"m": "i32", "n": "i32", "k": "i32"}
AHEAD_OF_TIME = {
    matmul_kernel: [
        (
            {"x_ptr": kind, "weight_ptr": "*i8", **_VECTORS, "out_ptr": kind, **_SIZES},
            {
                "Q_MIN": 0 if kind == "*u8" else -128, "Q_MAX": 255 if kind == "*u8" else 127,
                "HALF_EVEN": kind == "*u8", "HAS_BIAS": True, "UNSIGNED": kind == "*u8",
                "BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": inner, "GROUP_M": GROUP,
            },
        )
        for kind in ("*i8", "*u8")
        for rows, columns, inner, _, _ in (_blocks(1), _blocks(128))
    ],
    scaled_kernel: [
        (
            {
                "x_ptr": kind, "weight_ptr": "*i8", "scale_ptr": "*fp32", "bias_ptr": "*fp32", "out_ptr": "*fp32",
                **_SIZES,
            },
            {
                "HAS_BIAS": True, "UNSIGNED": kind == "*u8",
                "BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": inner, "GROUP_M": GROUP,
            },
        )
        for kind in ("*i8", "*u8")
        for rows, columns, inner, _, _ in (_blocks(1), _blocks(128))
    ],
}  # fmt: skip
"""Signatures and constants that each kernel is compiled with ahead of time in the tests."""
