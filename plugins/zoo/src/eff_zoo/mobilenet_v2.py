"""MobileNetV2 (Sandler, Howard, Zhu, Zhmoginov, Chen, CVPR 2018, arXiv:1801.04381, table 2).

An inverted residual expands its input t times with a 1 x 1 convolution, filters each channel with a 3 x 3
one, and projects to few channels without an activation; a shortcut joins the narrow ends. For small images
(CIFAR) the stem and the second stage keep the resolution, so that 32 x 32 ends as 4 x 4.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from eff_zoo.options import ZooOptions

_STAGES = (
    # expansion t, channels c, blocks n, stride s
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM, _HEAD = 32, 1280
_SMALL = 64


class MobileNetV2Options(ZooOptions):
    """Options of zoo:mobilenet_v2."""

    image_size: int = Field(224, ge=1, description="Side of the images in pixels; unset: the task's.")
    stem: Literal["imagenet", "cifar"] | None = Field(
        None, description="cifar keeps the resolution twice; unset: cifar up to 64 px."
    )
    width: float = Field(1.0, gt=0, le=4, description="Width multiplier.")
    dropout: float = Field(0.2, ge=0, lt=1, description="Dropout before the classifier.")

    @property
    def is_small(self) -> bool:
        """Whether the model keeps the resolution of small images."""
        return self.stem == "cifar" or (self.stem is None and self.image_size <= _SMALL)


def round_channels(channels: float, divisor: int = 8) -> int:
    """Return the multiple of 8 next to `channels`, at least 8 and never below 90 % of it."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution that keeps the resolution (but for its stride) and batch normalisation."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project (the paper's table 1)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [*conv_bn(in_channels, hidden, 1), nn.ReLU6()]
        layers += [*conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(), *conv_bn(hidden, out_channels, 1)]
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, H / stride, W / stride)."""
        out: Tensor = self.conv(x)
        return x + out if self.has_shortcut else out


class MobileNetV2(nn.Module):
    """The network of table 2."""

    def __init__(self, options: MobileNetV2Options):
        super().__init__()
        channels = round_channels(_STEM * options.width)
        head = round_channels(_HEAD * max(1.0, options.width))
        stem_stride = 1 if options.is_small else 2
        layers: list[nn.Module] = [nn.Sequential(*conv_bn(options.in_channels, channels, 3, stem_stride), nn.ReLU6())]
        for position, (expansion, width, blocks, stride) in enumerate(_STAGES):
            out_channels = round_channels(width * options.width)
            for block in range(blocks):
                block_stride = stride if block == 0 and not (options.is_small and position == 1) else 1
                layers.append(InvertedResidual(channels, out_channels, block_stride, expansion))
                channels = out_channels
        layers.append(nn.Sequential(*conv_bn(channels, head, 1), nn.ReLU6()))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(options.dropout), nn.Linear(head, options.num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # fan_in: torch's fan_out ignores groups
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, in_channels, H, W)."""
        logits: Tensor = self.classifier(self.pool(self.features(image)).flatten(1))
        return logits
