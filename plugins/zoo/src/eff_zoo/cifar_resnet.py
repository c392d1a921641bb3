"""ResNets for CIFAR (He, Zhang, Ren, Sun, CVPR 2016, arXiv:1512.03385, section 4.2).

A network of depth 6n + 2 has a 3 x 3 convolution, three stages of n blocks with 16, 32 and 64 channels
(the second and third start with stride 2), the mean over all positions and a linear layer. Where the
shape changes, the shortcut is the paper's option A: every second pixel, and zeros for the new channels.

Parameter names are those of akamaster/pytorch_resnet_cifar10 (BSD 2-clause), whose weights load as
they are. These were trained on images normalised with ImageNet's mean and standard deviation, so the
models ask for that.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from eff_zoo.options import IMAGENET_MEAN, IMAGENET_STD, ZooOptions

_STAGES = (16, 32, 64)


class CifarResNetOptions(ZooOptions):
    """Options of zoo:cifar_resnet20, 32, 44 and 56."""


class PadShortcut(nn.Module):
    """Option A: identity with stride 2 and zero channels, no parameters."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.pad = (0, 0, 0, 0, before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, H / 2, W / 2) of `x` (N, in_channels, H, W); half of the zeros on each side."""
        return F.pad(x[:, :, ::2, ::2], self.pad)


class Block(nn.Module):
    """Two convolutions and the shortcut (the paper's figure 2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity() if stride == 1 else PadShortcut(in_channels, out_channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, H / stride, W / stride)."""
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(residual + self.shortcut(x))
        return out


class CifarResNet(nn.Module):
    """A ResNet of depth 6n + 2 for 32 x 32 images; works from 4 x 4 on."""

    task_options: dict[str, Any]
    """What the task should use where no checkpoint says otherwise."""

    def __init__(self, depth: int, options: CifarResNetOptions):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(options.in_channels, _STAGES[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STAGES[0])
        self.relu1 = nn.ReLU()
        self.layer1 = _stage(_STAGES[0], _STAGES[0], blocks, stride=1)
        self.layer2 = _stage(_STAGES[0], _STAGES[1], blocks, stride=2)
        self.layer3 = _stage(_STAGES[1], _STAGES[2], blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(_STAGES[2], options.num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
        is_colour = options.in_channels == len(IMAGENET_MEAN)
        self.task_options = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)} if is_colour else {}

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, in_channels, H, W)."""
        features = self.relu1(self.bn1(self.conv1(image)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.linear(self.pool(features).flatten(1))
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(Block(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def cifar_resnet20(options: CifarResNetOptions) -> CifarResNet:
    """Return ResNet-20 (n = 3)."""
    return CifarResNet(20, options)


def cifar_resnet32(options: CifarResNetOptions) -> CifarResNet:
    """Return ResNet-32 (n = 5)."""
    return CifarResNet(32, options)


def cifar_resnet44(options: CifarResNetOptions) -> CifarResNet:
    """Return ResNet-44 (n = 7)."""
    return CifarResNet(44, options)


def cifar_resnet56(options: CifarResNetOptions) -> CifarResNet:
    """Return ResNet-56 (n = 9)."""
    return CifarResNet(56, options)
