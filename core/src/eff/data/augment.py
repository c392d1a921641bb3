"""Standard training augmentation, for a whole batch at once and a function of the generator alone.

    images                                  augmentation
    colour, shorter side 128 or more        random resized crop, horizontal flip
    colour, smaller                         random shift (zero padding, random crop), horizontal flip
    grey                                    random shift
    the source `digits`                     none

A shift is at most 4 px from 32 px on, and an eighth of the side below (1 px for 8 x 8). Grey images
are often characters or scans, for which left and right matter: they are never flipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from eff.data.images import Shape

PHOTO_SIDE = 128
_AREA = (0.35, 1.0)  # share of the image that a crop keeps; Inception's 0.08 is for training from scratch on ImageNet
_ASPECT = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images.

    Args:
        shift: largest shift in pixels, each way.
        flip: flip every second image, at random, left to right.
        resized_crop: crop a random box and resize it to the full image.
    """

    shift: int = 0
    flip: bool = False
    resized_crop: bool = False

    @classmethod
    def standard(cls, shape: Shape, flip: bool) -> Augmentation:
        """Return the row of the table above for images of `shape`; `flip` says whether left and right may swap."""
        side = min(shape[1:])
        if flip and side >= PHOTO_SIDE:
            return cls(flip=True, resized_crop=True)
        return cls(shift=min(4, max(1, side // 8)), flip=flip)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return augmented copies of `images` (N, C, H, W), uint8 or float32 in [0, 1]."""
        if self.resized_crop:
            return _resized_crop(images, generator, self.flip)
        return _shifted(images, self.shift, self.flip, generator)


def _flips(images: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    draw = torch.rand(len(images), generator=generator)
    return (draw < 0.5) & flip


def _shifted(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    samples, _, height, width = images.shape
    padded = F.pad(images, (shift, shift, shift, shift))
    top, left = torch.randint(0, 2 * shift + 1, (2, samples), generator=generator)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(_flips(images, flip, generator)[:, None], columns.flip(1), columns)
    sample = torch.arange(samples)[:, None, None]
    # Indices around the channel slice put the channels last.
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _resized_crop(images: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    samples = len(images)
    images = images.float().div_(255) if images.dtype == torch.uint8 else images
    area, aspect, across, down = torch.rand(4, samples, generator=generator)
    area = _AREA[0] + area * (_AREA[1] - _AREA[0])
    low, high = (math.log(value) for value in _ASPECT)
    ratio = torch.exp(low + aspect * (high - low))
    width = (area * ratio).sqrt().clamp(max=1.0)  # as shares of the image
    height = (area / ratio).sqrt().clamp(max=1.0)
    mirror = torch.where(_flips(images, flip, generator), -1.0, 1.0)
    theta = torch.zeros(samples, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * mirror, height
    theta[:, 0, 2], theta[:, 1, 2] = (2 * across - 1) * (1 - width), (2 * down - 1) * (1 - height)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False).clamp(0, 1)
