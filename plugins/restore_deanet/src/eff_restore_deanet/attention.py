"""Content-guided attention and the fusion made of it (section III-B and III-C).

channel  W_c = conv1x1(relu(conv1x1(mean over positions of r)))         (N, C, 1, 1)
spatial  W_s = conv7x7([mean over channels of r, largest of r])         (N, 1, H, W)
coarse   W_co = W_c + W_s                                               (N, C, H, W)
map      W = sigmoid(conv7x7, C groups of (r_c, W_co_c))                one map for every channel
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SIDE = 7  # of the spatial and the pixel convolution


class PairConv(nn.Module):
    """A 7 x 7 convolution in C groups over (r_c, W_co_c): each channel beside its own coarse map, edges mirrored.

    The pairs are never built. W_co = W_c + W_s is a number per channel plus one map for all of them, so by
    linearity the second half of each group is W_c times the sum of its taps, plus an ordinary convolution
    of W_s. On CPUs this is several times faster than the grouped convolution.

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        # Shapes, names and initial values are those of nn.Conv2d(2 C, C, 7, groups=C).
        self.weight = nn.Parameter(torch.empty(channels, 2, _SIDE, _SIDE))
        self.bias = nn.Parameter(torch.empty(channels))
        bound = 1 / math.sqrt(2 * _SIDE**2)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, r: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
        """Return (N, C, H, W) of r (N, C, H, W), W_c (N, C, 1, 1) and W_s (N, 1, H, W)."""
        content, guide = self.weight[:, :1], self.weight[:, 1:]
        edges = (_SIDE // 2,) * 4
        out = F.conv2d(F.pad(r, edges, mode="reflect"), content, self.bias, groups=len(content))
        out = out + F.conv2d(F.pad(spatial, edges, mode="reflect"), guide)
        return out + channel * guide.sum((1, 2, 3)).view(1, -1, 1, 1)


class ContentGuidedAttention(nn.Module):
    """The map W of features r.

    Args:
        channels: C.
        reduction: C / width of the squeezed channels; divides C.
    """

    def __init__(self, channels: int, reduction: int = 8):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(channels, channels // reduction, 1)
        self.relu = nn.ReLU()
        self.excite = nn.Conv2d(channels // reduction, channels, 1)
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, padding_mode="reflect")
        self.pixel = PairConv(channels)

    def forward(self, r: Tensor) -> Tensor:
        """Return W (N, C, H, W), in (0, 1); H and W at least 4."""
        channel = self.excite(self.relu(self.squeeze(self.pool(r))))
        spatial = self.spatial(torch.cat((r.mean(1, keepdim=True), r.amax(1, keepdim=True)), dim=1))
        return torch.sigmoid(self.pixel(r, channel, spatial))


class CGAFusion(nn.Module):
    """Mixes encoder features x with decoder features y: conv1x1(x + y + w x + (1 - w) y).

    Args:
        channels: of x and of y.
        reduction: of the attention.
        double_sigmoid: w = sigmoid(W), as the published code has it, though W is one already: w stays in
            (0.5, 0.73). Otherwise w = W.
        attention: without it, conv1x1(x + y).
    """

    def __init__(self, channels: int, reduction: int, double_sigmoid: bool = True, attention: bool = True):
        super().__init__()
        self.attention = ContentGuidedAttention(channels, reduction) if attention else None
        self.double_sigmoid = double_sigmoid
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return (N, C, H, W) of x and y of that shape."""
        mixed = x + y
        if self.attention is not None:
            w = self.attention(mixed)
            if self.double_sigmoid:
                w = torch.sigmoid(w)
            mixed = mixed + w * x + (1 - w) * y
        out: Tensor = self.conv(mixed)
        return out
