"""Deformable convolution and its hardware-friendly restrictions (Huang et al., FPGA 2021, arXiv:2006.08357, sec. 3).

    y[o, p] = sum_k w[o, k] x(p * stride - padding + k * dilation + d_k(p))

x at fractional positions is bilinear, outside the image 0. The variants say where the offsets d come from:

    none     d = 0, an ordinary convolution
    full     2 K channels, (dy, dx) per tap, taps row by row
    bound    the same, clipped
    square   one channel s: d_k = anchor_k (s - 1), so tap k lands at distance s from the centre; s = 1 is the plain kernel

The clip is [-B + 1, B] (`repo`: 2 B integers, 4 bits for B = 8; s itself for `square`) or [0, B] (`paper`: the text's
bounds, of the offsets; for `square` of t with s = 1 + t, as in the authors' detectron2 code).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.errors import ModelError

Variant = Literal["none", "full", "bound", "square"]
BoundMode = Literal["repo", "paper"]
ANCHORS = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1))
"""(dy, dx) of the taps of a 3x3 kernel, row by row."""


class Tap(nn.Module):
    """A place where an activation is quantized later; passes it on as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x


def sample_taps(
    x: Tensor, offsets: Tensor, kernel: int = 3, stride: int = 1, padding: int = 1, dilation: int = 1, nearest: bool = False
) -> Tensor:  # fmt: skip
    """Return the input of every tap of every output pixel, laid out so that a convolution of stride `kernel` sums them up.

    Positions are shared by all channels and computed once per pixel.

    Args:
        x: (N, C, H, W).
        offsets: (N, 2 K, H', W') with K = kernel^2, in pixels; (dy, dx) per tap, taps row by row.
        kernel: side of the kernel.
        stride: of the output pixels.
        padding: the first tap of output pixel 0 is at -padding.
        dilation: distance of neighbouring taps.
        nearest: the offsets are whole numbers: gather instead of interpolating.

    Returns:
        (N, C, kernel H', kernel W'); the tap (i, j) of output (r, c) is at (kernel r + i, kernel c + j).

    Raises:
        ValueError: `offsets` has another number of channels or another size than the output.
    """
    n, _, h, w = x.shape
    reach = dilation * (kernel - 1) + 1
    height, width = ((side + 2 * padding - reach) // stride + 1 for side in (h, w))
    expected = (n, 2 * kernel * kernel, height, width)
    if tuple(offsets.shape) != expected:
        raise ValueError(
            f"offsets have shape {tuple(offsets.shape)}, expected {expected} for an input {tuple(x.shape)}"
        )
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32  # half dtypes cannot tell far pixels apart
    by_tap = offsets.to(wide).view(n, kernel, kernel, 2, height, width)
    taps = torch.arange(kernel, device=x.device) * dilation
    rows = torch.arange(height, device=x.device) * stride - padding
    columns = torch.arange(width, device=x.device) * stride - padding
    y = by_tap[:, :, :, 0] + (taps.view(-1, 1, 1, 1) + rows.view(-1, 1))
    z = by_tap[:, :, :, 1] + (taps.view(-1, 1, 1) + columns)
    y, z = (part.permute(0, 3, 1, 4, 2).reshape(n, height * kernel, width * kernel) for part in (y, z))
    if nearest:
        return _gather(x, y, z)
    grid = torch.stack(
        [(2 * z + 1) / w - 1, (2 * y + 1) / h - 1], -1
    )  # align_corners=False: pixel i at (2 i + 1) / W - 1
    sampled = F.grid_sample(x.to(wide), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.to(x.dtype)


def _gather(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    n, c, h, w = x.shape
    rows, columns = y.round().long(), z.round().long()
    inside = (rows >= 0) & (rows < h) & (columns >= 0) & (columns < w)
    index = (rows.clamp(0, h - 1) * w + columns.clamp(0, w - 1)).flatten(1)
    found = x.flatten(2).gather(2, index[:, None].expand(-1, c, -1)).view(n, c, *y.shape[1:])
    return found * inside[:, None].to(x.dtype)


def round_straight_through(x: Tensor) -> Tensor:
    """Return `x` rounded half to even; its gradient is passed on as it is."""
    return x + (x.round() - x).detach()


class DeformConv2d(nn.Module):
    """A deformable convolution; `none` is an ordinary one.

    `conv` holds the weights. For the other variants it has stride `kernel` and reads what `sample_taps` laid out, so
    that whatever treats convolutions (folding, quantizers, packing) treats this one too.

    Args:
        before: input channels.
        after: output channels.
        deform: the variant.
        groups: of the convolution; `before` for a depthwise one.
        kernel: side, odd; `square` has 3.
        stride: of the output.
        offset_bound: B of the clip.
        bound_mode: which clip.
        round_offsets: whole offsets in eval mode.
        bias: whether the convolution has one.

    Raises:
        ModelError: the kernel does not go with the variant.
    """

    anchors: Tensor

    def __init__(
        self, before: int, after: int, deform: Variant = "square", *, groups: int = 1, kernel: int = 3, stride: int = 1,
        offset_bound: int = 8, bound_mode: BoundMode = "repo", round_offsets: bool = False, bias: bool = False,
    ):  # fmt: skip
        super().__init__()
        if kernel % 2 == 0:
            raise ModelError(f"deform: the kernel must be odd, got {kernel}")
        if deform == "square" and kernel != 3:
            raise ModelError(
                f"deform=square is defined for 3x3 kernels, got {kernel}x{kernel}; use kernel=3 or deform=full"
            )
        self.deform, self.kernel, self.stride = deform, kernel, stride
        self.round_offsets = round_offsets
        self.round_in_training = False
        self.neutral = 1.0 if deform == "square" and bound_mode == "repo" else 0.0
        """What the offset convolution gives at first: a plain convolution."""
        self.low, self.high = (
            (1.0 - offset_bound, float(offset_bound)) if bound_mode == "repo" else (0.0, float(offset_bound))
        )
        if deform == "full":
            self.low, self.high = -math.inf, math.inf
        self.offset: nn.Conv2d | None = None
        self.offset_tap = Tap()
        if deform == "none":
            self.conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=bias)
        else:
            self.conv = nn.Conv2d(before, after, kernel, kernel, 0, groups=groups, bias=bias)
            self.offset = nn.Conv2d(before, 1 if deform == "square" else 2 * kernel * kernel, 1, stride)
            nn.init.zeros_(self.offset.weight)
            assert self.offset.bias is not None
            nn.init.constant_(self.offset.bias, self.neutral)
        bound = 1 / math.sqrt(before * kernel * kernel)
        nn.init.uniform_(self.conv.weight, -bound, bound)
        self.register_buffer("anchors", torch.tensor(ANCHORS, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    @property
    def rounds(self) -> bool:
        """Whether the offsets are whole numbers now."""
        return self.round_offsets and (self.round_in_training or not self.training)

    def offset_map(self, x: Tensor) -> Tensor:
        """Return what the offsets are made of: s (N, 1, H', W'), or the offsets (N, 2 K, H', W'), clipped and rounded."""
        assert self.offset is not None
        found: Tensor = self.offset(x)
        found = found.clamp(self.low, self.high)  # never in place: that would cut the gradient
        return round_straight_through(found) if self.rounds else self.offset_tap(found)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, after, H', W').

        Raises:
            ValueError: the offset map does not have the size of the output.
        """
        if self.offset is None:
            plain: Tensor = self.conv(x)
            return plain
        offsets = self.offset_map(x)
        if self.deform == "square":
            offsets = self.anchors.to(x.dtype) * (offsets - self.neutral)
        nearest = self.rounds and not self.training
        sampled = sample_taps(x, offsets, self.kernel, self.stride, self.kernel // 2, nearest=nearest)
        output: Tensor = self.conv(sampled)
        return output

    def extra_repr(self) -> str:
        """Return the variant for printing."""
        return f"{self.deform}, bounds=[{self.low:g}, {self.high:g}], round_offsets={self.round_offsets}"
