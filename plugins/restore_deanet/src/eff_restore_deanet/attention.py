"""Content-guided attention and the fusion made of it (section III-B and III-C).

channel  W_c = conv1x1(relu(conv1x1(mean over positions of r)))         (N, C, 1, 1)
spatial  W_s = conv7x7([mean over channels of r, largest of r])         (N, 1, H, W)
coarse   W_co = W_c + W_s                                               (N, C, H, W)
map      W = sigmoid(conv7x7, C groups of (r_c, W_co_c))                one map for every channel
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
        self.pixel = nn.Conv2d(2 * channels, channels, 7, padding=3, padding_mode="reflect", groups=channels)

    def forward(self, r: Tensor) -> Tensor:
        """Return W (N, C, H, W), in (0, 1); H and W at least 4."""
        channel = self.excite(self.relu(self.squeeze(self.pool(r))))
        spatial = self.spatial(torch.cat((r.mean(1, keepdim=True), r.amax(1, keepdim=True)), dim=1))
        coarse = channel + spatial
        # Each group of the convolution sees a channel beside its own coarse map, so the two alternate.
        pairs = torch.stack((r, coarse), dim=2).flatten(1, 2)
        return torch.sigmoid(self.pixel(pairs))


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
