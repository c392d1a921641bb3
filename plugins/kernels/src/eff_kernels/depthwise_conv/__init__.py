"""Depthwise convolution with kernels up to 31, by the way that is fastest for the shape.

    y[n, c, h, w] = bias[c] + sum_ij weight[c, 0, i, j] * x[n, c, h + r (i - k // 2), w + r (j - k // 2)]

with zeros outside, dilation r and an odd kernel k: the large-kernel and dilated branches of UniRepLKNet (Ding et al., CVPR
2024, arXiv:2311.15599, sec. 3). Torch's own time for the same convolution differs by an order of magnitude with the memory
format and the kernel; `cpu.way` has the rule.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from eff_kernels.checks import FLOATS, check_choice, check_count, check_device, check_dtype, check_shape
from eff_kernels.depthwise_conv import library

__all__ = ["depthwise_conv"]

KERNELS = range(3, 32, 2)


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, dilation: int = 1
) -> Tensor:
    """Return the depthwise convolution of `x`, padded with zeros by `dilation * (k - 1) / 2` on every side.

    Has gradients for x, weight and bias (for stride 1 no second derivatives). Sums in float32, in float64 for float64;
    half dtypes are rounded once. NaN and infinity propagate: to the values that they reach, and with the Fourier way to
    the whole map of their image and channel.

    Args:
        x: maps (N, C, H, W), contiguous or channels_last (others are copied); float16, bfloat16, float32 or float64.
        weight: kernels (C, 1, k, k), k odd, 3 to 31; of another floating dtype it is converted to that of `x`.
        bias: (C,) or None; converted as the weight.
        stride: 1 is what this op is for; others are `torch.nn.functional.conv2d`.
        dilation: distance between the kernel's taps in pixels, >= 1.

    Returns:
        (N, C, ceil(H / stride), ceil(W / stride)) in the dtype and, for stride 1, the memory format of `x`.

    Raises:
        TypeError: a tensor is not floating point, or stride or dilation no integer.
        ValueError: a shape, a device, the kernel's size, stride or dilation does not fit, or `x` is empty apart from N.
    """
    op = "depthwise_conv"
    check_dtype(op, "x", x, FLOATS)
    check_dtype(op, "weight", weight, FLOATS)
    check_shape(op, "x", x, ("N", "C", "H", "W"))
    if not (x.shape[1] and x.shape[2] and x.shape[3]):
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected at least one channel, row and column")
    check_shape(op, "weight", weight, (x.shape[1], 1, "k", "k"))
    check_choice(op, "kernel height", weight.shape[2], KERNELS)
    check_shape(op, "weight", weight, (x.shape[1], 1, weight.shape[2], weight.shape[2]))
    check_device(op, "weight", weight, "x", x)
    for name, value in (("stride", stride), ("dilation", dilation)):
        check_count(op, name, value, 1, 2**31 - 1)
    if bias is not None:
        check_dtype(op, "bias", bias, FLOATS)
        check_shape(op, "bias", bias, (x.shape[1],))
        check_device(op, "bias", bias, "x", x)
        bias = bias.to(x.dtype)
    weight = weight.to(x.dtype)
    if stride != 1:
        padding = dilation * (weight.shape[2] // 2)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1])
    return library.run(x, weight, bias, dilation)
