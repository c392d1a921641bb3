"""depthwise_conv in Triton: a program holds a block of pixels and channels and runs over the taps.

Channels_last takes few pixels and neighbouring channels, contiguous maps many pixels of one channel, so that what a program
reads at once is neighbouring in memory. The weight's gradient is summed in two stages without atomics: the same bits in
every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.depthwise_conv import reference
from eff_kernels.dispatch import TRITON_DTYPES

SMALL = 5
"""Up to here torch has kernels of its own, as the paper's code takes them."""
PIXELS = 32
"""Of a step of the weight's gradient."""
PROGRAMS = 4096
"""That the weight's gradient is spread over at least, where there is work for them."""


@triton.jit
def depthwise_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, channels, height, width, stride_n, stride_c, stride_h, stride_w, dilation,
    KERNEL: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(height * width, PIXELS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * PIXELS + tl.arange(0, PIXELS)[:, None]
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    h, w = pixel // width, pixel % width
    mask = (pixel < height * width) & (c < channels)
    plane = n * stride_n + c.to(tl.int64) * stride_c
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    for i in range(KERNEL):
        row = h + (i - KERNEL // 2) * dilation
        row_mask = mask & (row >= 0) & (row < height)
        row_ptr = x_ptr + plane + row.to(tl.int64) * stride_h
        for j in range(KERNEL):
            column = w + (j - KERNEL // 2) * dilation
            inside = row_mask & (column >= 0) & (column < width)
            value = tl.load(row_ptr + column * stride_w, mask=inside, other=0.0).to(tl.float32)
            tap = tl.load(weight_ptr + (c * KERNEL + i) * KERNEL + j, mask=c < channels, other=0.0).to(tl.float32)
            # A tap over the border counts as absent: 0 * NaN would be NaN.
            total += tl.where(inside, value * tap, 0.0)
    tl.store(y_ptr + plane + h.to(tl.int64) * stride_h + w * stride_w, total, mask=mask)


@triton.jit
def weight_gradient_kernel(
    dy_ptr, x_ptr, part_ptr, channels, height, width, pixels, steps, dilation,
    KERNEL: tl.constexpr, PIXELS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Part `split` of the sum for the taps in row i of channel c; `pixels` are those of all images."""
    c, i, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tap = tl.arange(0, TAPS)[None, :]
    plane = height.to(tl.int64) * width
    total = tl.zeros((PIXELS, TAPS), tl.float32)
    for step in range(steps):
        pixel = (split * steps + step) * PIXELS + tl.arange(0, PIXELS)[:, None]
        start = (pixel // plane * channels + c) * plane
        h, w = pixel % plane // width, pixel % plane % width
        row, column = h + (i - KERNEL // 2) * dilation, w + (tap - KERNEL // 2) * dilation
        mask = pixel < pixels
        dy = tl.load(dy_ptr + start + pixel % plane, mask=mask, other=0.0).to(tl.float32)
        inside = mask & (row >= 0) & (row < height) & (column >= 0) & (column < width) & (tap < KERNEL)
        x = tl.load(x_ptr + start + row * width + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(inside, dy * x, 0.0)
    sums = tl.sum(total, axis=0)[None, :]
    tl.store(part_ptr + ((split * channels + c) * KERNEL + i) * KERNEL + tap, sums, mask=tap < KERNEL)


def blocks(x: Tensor) -> tuple[int, int]:
    """Return the pixels and channels of a program."""
    return (256, 1) if x.is_contiguous() else (16, 32)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Return (N, C, H, W) in the format of x."""
    if weight.shape[-1] <= SMALL:
        return reference.forward(x, weight, bias, dilation)
    return convolve(x, weight, bias, dilation)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Return (N, C, H, W) by the kernel, for any odd side."""
    images, channels, height, width = x.shape
    y = torch.empty_like(x)
    pixels, together = blocks(x)
    grid = (images * triton.cdiv(height * width, pixels), triton.cdiv(channels, together))
    depthwise_kernel[grid](
        x, weight, weight if bias is None else bias, y, channels, height, width, *x.stride(), dilation,
        KERNEL=weight.shape[-1], PIXELS=pixels, CHANNELS=together, HAS_BIAS=bias is not None,
    )  # fmt: skip
    return y


def weight_gradient(dy: Tensor, x: Tensor, kernel: int, dilation: int) -> Tensor:
    """Return (C, 1, k, k)."""
    if kernel <= SMALL:
        return reference.weight_gradient(dy, x, kernel, dilation)
    return sum_products(dy, x, kernel, dilation)


def sum_products(dy: Tensor, x: Tensor, kernel: int, dilation: int) -> Tensor:
    """Return (C, 1, k, k) by the kernel: parts of the sum, then the parts' sum in their order."""
    dy, x = dy.contiguous(), x.contiguous()
    images, channels, height, width = x.shape
    pixels = images * height * width
    steps = triton.cdiv(pixels, PIXELS)
    splits = min(steps, triton.cdiv(PROGRAMS, channels * kernel))
    steps = triton.cdiv(steps, splits)
    parts = torch.empty(splits, channels, 1, kernel, kernel, dtype=torch.float32, device=x.device)
    weight_gradient_kernel[(channels, kernel, splits)](
        dy, x, parts, channels, height, width, pixels, steps, dilation,
        KERNEL=kernel, PIXELS=PIXELS, TAPS=triton.next_power_of_2(kernel),
    )  # fmt: skip
    return parts.sum(0).to(x.dtype)


_KINDS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_SIZES = dict.fromkeys(("channels", "height", "width", "dilation"), "i32")
AHEAD_OF_TIME = {
    depthwise_kernel: [
        (
            {
                **dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "y_ptr"), _KINDS[kind]), **_SIZES,
                **dict.fromkeys(("stride_n", "stride_c", "stride_h", "stride_w"), "i64"),
            },
            {"KERNEL": 13, "PIXELS": pixels, "CHANNELS": together, "HAS_BIAS": True},
        )
        for kind in TRITON_DTYPES
        for pixels, together in ((256, 1), (16, 32))
    ],
    weight_gradient_kernel: [
        (
            {"dy_ptr": _KINDS[kind], "x_ptr": _KINDS[kind], "part_ptr": "*fp32", **_SIZES, "pixels": "i64", "steps": "i32"},
            {"KERNEL": 13, "PIXELS": PIXELS, "TAPS": 16},
        )
        for kind in TRITON_DTYPES
    ],
}  # fmt: skip
"""Signatures and constants that each kernel is compiled with ahead of time in the tests."""
