"""The patch discriminator of VQGAN with two layers (pix2pix, Isola et al., CVPR 2017), and its hinge loss."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Discriminator(nn.Sequential):
    """Images (N, C, H, W) to logits of patches (N, 1, h, w), above 0 for real."""

    def __init__(self, channels: int, width: int = 64):
        super().__init__(
            nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, 1, 1, bias=False), nn.BatchNorm2d(4 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 4, 1, 1),
        )  # fmt: skip
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)


SMALLEST = 16
"""Side in pixels of the smallest image that leaves a patch."""


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return 0.5 (mean max(0, 1 - D(x)) + mean max(0, 1 + D(x^)))."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
