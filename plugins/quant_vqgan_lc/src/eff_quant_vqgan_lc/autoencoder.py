"""The convolutional autoencoder of VQGAN (Esser, Rombach, Ommer, CVPR 2021, arXiv:2012.09841), without its quantizer.

Levels of residual blocks with halved resolution between them, attention in the middle and, where asked for, at the coarsest
level. `stem` folds squares of pixels into channels first, which makes small models quick; the paper's have none.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from eff.errors import ModelError, did_you_mean, raise_problems
from eff.run import Run
from eff.schemas import ModelSpec, Schema
from eff.seeding import derive_seed

GROUPS = 32
"""Groups of a norm, as in VQGAN; narrow layers take one per four channels."""


class AutoencoderOptions(Schema):
    """Options of `vqgan:NAME`."""

    width: int = Field(128, ge=4, multiple_of=4, description="Channels of the first level.")
    multipliers: tuple[int, ...] = Field((1, 1, 2, 2, 4), min_length=1, description="Channels by level, in widths.")
    blocks: int = Field(2, ge=1, description="Residual blocks of a level; the decoder has one more.")
    attention: bool = Field(True, description="Attention in the coarsest level; the middle always has it.")
    z_channels: int = Field(256, ge=1, description="Channels of the latent before it is quantized.")
    stem: int = Field(1, ge=1, description="Side of the squares of pixels folded into channels first.")
    in_channels: int = Field(3, ge=1, description="Channels of the images.")

    @property
    def factor(self) -> int:
        """Pixels of an image's side per token."""
        return self.stem * 2 ** (len(self.multipliers) - 1)


SIZES: dict[str, dict[str, Any]] = {
    "f16": {},
    "f8": {"multipliers": (1, 2, 2, 4), "attention": False},
    "small": {"width": 32, "multipliers": (1, 1), "blocks": 1, "attention": False, "z_channels": 64, "stem": 4},
    "tiny": {"width": 8, "multipliers": (1, 1), "blocks": 1, "attention": False, "z_channels": 8},
}


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(GROUPS, channels // 4), channels, eps=1e-6)


class ResBlock(nn.Module):
    """Norm, swish, convolution, twice; a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm1, self.norm2 = _norm(before), _norm(after)
        self.conv1, self.conv2 = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, after, H, W)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        out: Tensor = self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))
        return out


class Attention(nn.Module):
    """Self-attention of one head over all positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like x (N, C, H, W)."""
        q, k, v = (part.flatten(2).transpose(1, 2)[:, None] for part in self.qkv(self.norm(x)).chunk(3, 1))
        found = F.scaled_dot_product_attention(q, k, v)[:, 0]
        result: Tensor = x + self.out(found.transpose(1, 2).reshape(x.shape))
        return result


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(ResBlock(channels, channels), Attention(channels), ResBlock(channels, channels))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2, padded right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H / 2, W / 2)."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Pixels doubled, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, 2 H, 2 W)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0))
        return out


class Encoder(nn.Module):
    """Images to a latent of 1 / factor of their sides."""

    def __init__(self, options: AutoencoderOptions):
        super().__init__()
        widths = [options.width * multiplier for multiplier in options.multipliers]
        self.unfold = nn.PixelUnshuffle(options.stem)
        self.conv_in = nn.Conv2d(options.in_channels * options.stem**2, options.width, 3, padding=1)
        layers: list[nn.Module] = []
        before = options.width
        for level, width in enumerate(widths):
            is_last = level == len(widths) - 1
            for _ in range(options.blocks):
                layers.append(ResBlock(before, width))
                layers += [Attention(width)] if options.attention and is_last else []
                before = width
            layers += [] if is_last else [Downsample(width)]
        self.levels = nn.Sequential(*layers)
        self.middle = _middle(before)
        self.norm_out, self.conv_out = _norm(before), nn.Conv2d(before, options.z_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Return (N, z_channels, H / factor, W / factor) of images (N, C, H, W) in [-1, 1]."""
        hidden = self.middle(self.levels(self.conv_in(self.unfold(image))))
        out: Tensor = self.conv_out(F.silu(self.norm_out(hidden)))
        return out


class Decoder(nn.Module):
    """A latent back to images; its last layer is `conv_out`, which the weight of the GAN loss looks at."""

    def __init__(self, options: AutoencoderOptions):
        super().__init__()
        widths = [options.width * multiplier for multiplier in options.multipliers]
        before = widths[-1]
        self.conv_in = nn.Conv2d(options.z_channels, before, 3, padding=1)
        self.middle = _middle(before)
        layers: list[nn.Module] = []
        for level in reversed(range(len(widths))):
            for _ in range(options.blocks + 1):
                layers.append(ResBlock(before, widths[level]))
                layers += [Attention(widths[level])] if options.attention and level == len(widths) - 1 else []
                before = widths[level]
            layers += [] if level == 0 else [Upsample(before)]
        self.levels = nn.Sequential(*layers)
        self.norm_out = _norm(before)
        self.conv_out = nn.Conv2d(before, options.in_channels * options.stem**2, 3, padding=1)
        self.fold = nn.PixelShuffle(options.stem)

    def forward(self, z: Tensor) -> Tensor:
        """Return images (N, C, H, W), about [-1, 1], of a latent."""
        hidden = self.levels(self.middle(self.conv_in(z)))
        out: Tensor = self.fold(self.conv_out(F.silu(self.norm_out(hidden))))
        return out


class Autoencoder(nn.Module):
    """Encoder and decoder; the latent is not quantized."""

    def __init__(self, options: AutoencoderOptions):
        super().__init__()
        self.encoder, self.decoder = Encoder(options), Decoder(options)
        self.factor = options.factor

    def forward(self, image: Tensor) -> Tensor:
        """Return the reconstruction of images (N, C, H, W) in [-1, 1]."""
        out: Tensor = self.decoder(self.encoder(image))
        return out


def build(spec: ModelSpec, run: Run) -> Autoencoder:
    """Return the autoencoder of `vqgan:NAME`; initial weights depend on the run's seed and the source.

    Raises:
        ModelError: unknown name or option, or another task. Problems: several of them.
    """
    if run.task.name not in ("tokenization", "none"):
        raise ModelError(f"{spec.source} reconstructs images, the data is for {run.task.name}; use pictures:SOURCE")
    if spec.name not in SIZES:
        raise ModelError(
            f"{spec.source}: there is no such model{did_you_mean(spec.name, SIZES)}; known: {', '.join(SIZES)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.seed, f"build_model/{spec.source}"))
        return make_autoencoder(spec.name, **spec.options)


def make_autoencoder(size: str = "f16", **options: Any) -> Autoencoder:
    """Return an autoencoder, e.g. `make_autoencoder("small", width=16)`.

    Raises:
        ModelError: an option is unknown or out of range. Problems: several of them.
    """
    given = {key: _listed(value) if key == "multipliers" else value for key, value in options.items()}
    try:
        return Autoencoder(AutoencoderOptions.model_validate({**SIZES[size], **given}))
    except ValidationError as error:
        raise_problems([_fault(size, item) for item in error.errors()])
        raise  # not reached: there is at least one error


def _listed(value: Any) -> Any:
    """Read `1,2,2`, as it stands behind a question mark, and a single number."""
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
    return tuple(parts)


def _fault(size: str, item: Any) -> ModelError:
    option, known = str(item["loc"][0]), list(AutoencoderOptions.model_fields)
    if item["type"] == "extra_forbidden":
        return ModelError(
            f"vqgan:{size}: option '{option}' is unknown{did_you_mean(option, known)}; options are {', '.join(known)}"
        )
    message = item["msg"]
    return ModelError(f"vqgan:{size}: {option}: {message[0].lower() + message[1:]}, got {item['input']!r}")
