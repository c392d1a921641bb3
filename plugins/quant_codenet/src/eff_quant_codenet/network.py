"""CoDeNet (Huang et al., FPGA 2021, sec. 4): ShuffleNetV2, a decoder of deformable convolutions, CenterNet heads.

Only concatenations, no sums. The output stride is 4: the stem divides the sides by 4, every stage by 2, every block of the
decoder multiplies them by 2. A `Tap` stands wherever an activation is quantized; the blocks of a stage share one, because
their channels are shuffled together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.errors import RequestError
from eff_quant_codenet.deform import BoundMode, DeformConv2d, Tap, Variant

STEM_STRIDE = 4
HEATMAP_BIAS = -2.19
"""Makes the first heatmaps sigmoid(-2.19) = 0.1 (CenterNet)."""


@dataclass(frozen=True)
class Deformation:
    """How the decoder samples: see `DeformConv2d`."""

    deform: Variant = "square"
    depthwise: bool = True
    kernel: int = 3
    offset_bound: int = 8
    bound_mode: BoundMode = "repo"
    round_offsets: bool = False

    def conv(self, before: int, after: int, groups: int = 1) -> DeformConv2d:
        """Return a convolution of this kind."""
        return DeformConv2d(
            before, after, self.deform, groups=groups, kernel=self.kernel, offset_bound=self.offset_bound,
            bound_mode=self.bound_mode, round_offsets=self.round_offsets,
        )  # fmt: skip


def conv_norm(before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution without bias and its batch norm."""
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after))


def channel_shuffle(x: Tensor, groups: int = 2) -> Tensor:
    """Return `x` (N, C, H, W) with its channels dealt out from `groups` halves in turn."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class BasicBlock(nn.Module):
    """Half of the channels pass, the other half goes through 1x1, depthwise 3x3, 1x1; concatenated and shuffled."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.right = nn.Sequential(
            conv_norm(half, half), nn.ReLU(), Tap(), conv_norm(half, half, 3, groups=half), Tap(), conv_norm(half, half), nn.ReLU()
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W)."""
        left, right = x.chunk(2, 1)
        return channel_shuffle(torch.cat([left, self.right(right)], 1))


class DownBlock(nn.Module):
    """Two branches over all channels, each with a depthwise 3x3 of stride 2; concatenated and shuffled."""

    def __init__(self, before: int, after: int):
        super().__init__()
        half = after // 2
        self.left = nn.Sequential(conv_norm(before, before, 3, 2, before), Tap(), conv_norm(before, half), nn.ReLU())
        self.right = nn.Sequential(
            conv_norm(before, half), nn.ReLU(), Tap(), conv_norm(half, half, 3, 2, half), Tap(), conv_norm(half, half), nn.ReLU()
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, after, H / 2, W / 2)."""
        return channel_shuffle(torch.cat([self.left(x), self.right(x)], 1))


class Stage(nn.Module):
    """A down block and basic blocks, whose outputs are quantized alike."""

    def __init__(self, before: int, after: int, blocks: int):
        super().__init__()
        self.blocks = nn.ModuleList([DownBlock(before, after), *(BasicBlock(after) for _ in range(blocks))])
        self.tap = Tap()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, after, H / 2, W / 2)."""
        for block in self.blocks:
            x = self.tap(block(x))
        return x


class DecoderBlock(nn.Module):
    """Deformable 3x3 and 1x1, batch norm, ReLU, nearest 2x; `mix_first` puts the 1x1 first, as the paper's figure does."""

    def __init__(self, before: int, after: int, kind: Deformation, mix_first: bool):
        super().__init__()
        if not kind.depthwise:
            layers = [kind.conv(before, after)]
        elif mix_first:
            layers = [nn.Conv2d(before, after, 1, bias=False), Tap(), kind.conv(after, after, after)]
        else:
            layers = [kind.conv(before, before, before), Tap(), nn.Conv2d(before, after, 1, bias=False)]
        self.layers = nn.Sequential(*layers, nn.BatchNorm2d(after), nn.ReLU(), Tap())

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, after, 2 H, 2 W)."""
        return F.interpolate(self.layers(x), scale_factor=2.0, mode="nearest")


def head(before: int, middle: int, after: int) -> nn.Sequential:
    """Return 1x1, depthwise 3x3 and a 1x1 with bias."""
    return nn.Sequential(
        conv_norm(before, middle), nn.ReLU(), Tap(), conv_norm(middle, middle, 3, groups=middle), nn.ReLU(), Tap(),
        nn.Conv2d(middle, after, 1),
    )  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """The widths of a CoDeNet."""

    channels: tuple[int, ...] = (24, 116, 232, 464, 1024)
    """Of the stem, of each stage, of the 1x1 that ends the backbone."""
    blocks: tuple[int, ...] = (3, 7, 3)
    """Basic blocks of each stage."""
    decoder: tuple[int, ...] = (256, 128, 64)
    head: int = 64
    stem: str = "stride4"
    mix_first: bool = False


class CoDeNet(nn.Module):
    """Images to heatmap logits, sizes and centre offsets, concatenated: (N, num_classes + 4, H / 4, W / 4)."""

    def __init__(
        self, num_classes: int, in_channels: int = 3, layout: Layout | None = None, kind: Deformation | None = None
    ):
        super().__init__()
        layout, kind = layout or Layout(), kind or Deformation()
        first, *stages, last = layout.channels
        if layout.stem == "maxpool":
            self.stem = nn.Sequential(conv_norm(in_channels, first, 3, 2), nn.ReLU(), Tap(), nn.MaxPool2d(3, 2, 1))
        else:
            self.stem = nn.Sequential(conv_norm(in_channels, first, 3, STEM_STRIDE), nn.ReLU(), Tap())
        widths = [first, *stages]
        self.stages = nn.Sequential(*(Stage(a, b, n) for a, b, n in zip(widths, stages, layout.blocks, strict=False)))
        self.last = nn.Sequential(conv_norm(widths[-1], last), nn.ReLU(), Tap())
        widths = [last, *layout.decoder]
        self.decoder = nn.Sequential(
            *(DecoderBlock(a, b, kind, layout.mix_first) for a, b in zip(widths, layout.decoder, strict=False))
        )
        outputs = {"heatmap": num_classes, "size": 2, "centre": 2}
        self.heads = nn.ModuleDict({name: head(widths[-1], layout.head, after) for name, after in outputs.items()})
        nn.init.constant_(self.heads["heatmap"][-1].bias, HEATMAP_BIAS)  # type: ignore[index, arg-type]
        self.multiple = STEM_STRIDE * 2 ** len(stages)

    def forward(self, image: Tensor) -> Tensor:
        """Return heatmap logits, then width and height, then the centre's (x, y) within its pixel, all in output pixels.

        Raises:
            RequestError: a side is no multiple of what the backbone divides by.
        """
        for side in image.shape[-2:]:
            if side % self.multiple:
                nearest = max(1, round(side / self.multiple)) * self.multiple
                raise RequestError(
                    f"CoDeNet takes sides that are multiples of {self.multiple}, got {image.shape[-2]}x{image.shape[-1]}; "
                    f"the nearest to {side} is {nearest}, e.g. ?size={nearest}"
                )
        x = self.decoder(self.last(self.stages(self.stem(image))))
        return torch.cat([part(x) for part in self.heads.values()], 1)
