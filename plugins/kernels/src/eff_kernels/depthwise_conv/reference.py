"""What depthwise_conv means, in plain torch; every kernel must agree with it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Return (N, C, H, W) for x (N, C, H, W) and weight (C, 1, k, k)."""
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, bias, 1, padding, dilation, groups=x.shape[1])


def weight_gradient(dy: Tensor, x: Tensor, kernel: int, dilation: int) -> Tensor:
    """Return (C, 1, k, k): what each tap multiplies, times the gradient of where it goes."""
    channels = x.shape[1]
    shape = (channels, 1, kernel, kernel)
    return conv2d_weight(x, shape, dy, 1, dilation * (kernel // 2), dilation, groups=channels)
