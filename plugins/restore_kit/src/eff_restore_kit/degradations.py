"""What is done to clear photos to train and test restoration: haze, noise, bicubic down-sampling.

A degradation is a frozen set of options; calling it with clear images in [0, 1] and a generator gives
the degraded ones. What it draws, it draws per image.

    haze (atmospheric scattering; Koschmieder 1924, Narasimhan and Nayar, IJCV 2002):
        I = J t + A (1 - t),  t = exp(-beta d)
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from eff.schemas import Schema
from eff_restore_kit.resize import imresize

_COARSE = 4  # cells along each side of the noise that the depth field is made of


def _parse_range(value: object) -> object:
    """Read "0.6-1.8" or "25" as (low, high)."""
    if not isinstance(value, str):
        return value
    low, dash, high = value.partition("-")
    return (float(low), float(high if dash else low))


Range = Annotated[tuple[float, float], BeforeValidator(_parse_range)]
"""Lowest and highest value; written "low-high" or as one number."""


class Degradation(Schema):
    """Base of all degradations."""

    @property
    def factor(self) -> int:
        """Side of the clear image / side of the degraded one."""
        return 1

    def __call__(self, clear: Tensor, generator: torch.Generator) -> Tensor:
        """Return the degraded images of `clear` (N, C, H, W) in [0, 1]."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Degradation:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, tuple) and not 0 <= value[0] <= value[1]:
                raise ValueError(f"{name} must be low-high with 0 <= low <= high, got {value[0]:g}-{value[1]:g}")
        return self


class Haze(Degradation):
    """Haze over a smooth random depth, farther at the top: strength beta, airlight A, one each per image."""

    beta: Range = Field((0.6, 1.8), description="low-high, the scattering coefficient")
    airlight: Range = Field((0.7, 1.0), description="low-high in [0, 1], the light of the haze")
    depth: Range = Field((0.3, 1.5), description="low-high, the depth of the scene")

    def __call__(self, clear: Tensor, generator: torch.Generator) -> Tensor:
        """Return I = J t + A (1 - t)."""
        samples, _, height, width = clear.shape
        beta, airlight = (draw(bounds, samples, generator).to(clear) for bounds in (self.beta, self.airlight))
        depth = depth_field(samples, height, width, self.depth, generator).to(clear)
        transmission = torch.exp(-beta * depth)
        return clear * transmission + airlight * (1 - transmission)


def depth_field(samples: int, height: int, width: int, bounds: Range, generator: torch.Generator) -> Tensor:
    """Return smooth random depths (N, 1, H, W) that span `bounds`: low-pass noise plus a vertical ramp."""
    coarse = torch.rand(samples, 1, _COARSE, _COARSE, generator=generator)
    noise = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)
    field = noise + torch.linspace(1, 0, height).view(1, 1, -1, 1)  # what is high in a photo is far away
    low, high = field.amin((2, 3), keepdim=True), field.amax((2, 3), keepdim=True)
    return bounds[0] + (bounds[1] - bounds[0]) * (field - low) / (high - low).clamp(min=1e-12)


class Noise(Degradation):
    """Additive white Gaussian noise, not clipped, as denoising papers have it."""

    sigma: Range = Field((25.0, 25.0), description="low-high, the standard deviation of 8-bit values")

    def __call__(self, clear: Tensor, generator: torch.Generator) -> Tensor:
        """Return J + sigma / 255 n."""
        sigma = draw(self.sigma, len(clear), generator).to(clear)
        return clear + sigma / 255 * torch.randn(clear.shape, generator=generator).to(clear)


class Bicubic(Degradation):
    """Bicubic down-sampling by `scale`; with `resized`, back up to the old size."""

    scale: int = Field(4, ge=1, le=16, description="a whole number from 1 to 16")
    resized: bool = Field(False, description="true or false: blown up to the old size again")

    @property
    def factor(self) -> int:
        """Side of the clear image / side of the degraded one."""
        return 1 if self.resized else self.scale

    def __call__(self, clear: Tensor, generator: torch.Generator) -> Tensor:
        """Return the small images, or the blurred ones of the old size."""
        small = imresize(clear, 1 / self.scale).clamp(0, 1)
        return imresize(small, self.scale).clamp(0, 1) if self.resized else small


def draw(bounds: Range, samples: int, generator: torch.Generator) -> Tensor:
    """Return uniform values (N, 1, 1, 1) between the bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(samples, 1, 1, 1, generator=generator)


KINDS: dict[str, type[Degradation]] = {"haze": Haze, "noise": Noise, "bicubic": Bicubic}
