"""Source `scenes`: handwritten digits in several sizes, pasted without overlap onto a smooth texture.

scenes?train=1500&test=300&seed=0&classes=3&size=64. Every image has 1 to 4 digits of scikit-learn's set (8 x 8), enlarged
by a factor between 1 and 3, each at its own brightness; a box encloses the ink. Digits in training and test images are of
different writers' samples: the 60 % and 40 % of `digits`. The texture is a sum of blurred noise fields, because gradients
of sampling positions need neighbouring pixels that are alike. A function of the seed alone.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from eff.data import Data, load_data
from eff.data.options import ImageOptions, Size, read_options
from eff.errors import DataError
from eff.schemas import DataSpec, TaskSpec
from eff.seeding import named_generator
from eff_quant_codenet.split import DetectionSplit, Objects, make_data

DEFAULT_COUNTS = {"train": 1500, "test": 300}
CLASSES = {"1": ("digit",), "3": ("0-3", "4-6", "7-9"), "10": tuple(str(digit) for digit in range(10))}
MOST_OBJECTS, MOST_TRIES = 4, 50
LARGEST_FACTOR = 3.0
INK = 0.3  # of the brightest pixel: what is fainter is not enclosed


class SceneOptions(ImageOptions):
    """Options of `scenes`."""

    size: Size | None = Field((64, 64), description="N or HxW in pixels, each from 1 to 8192")
    classes: Literal["1", "3", "10"] = Field("3", description="1, 3 or 10")


def load(spec: DataSpec, task: TaskSpec | None) -> Data:
    """Return the scenes as grey images.

    Raises:
        DataError: a wrong option, or images too small for the digits.
    """
    options = read_options(spec, SceneOptions)
    if spec.location:
        raise DataError(f"data '{spec}': scenes has no location; write scenes?train=500")
    height, width = options.size or (64, 64)
    if min(height, width) < 8 * LARGEST_FACTOR:
        raise DataError(f"data '{spec}': size must be at least {8 * LARGEST_FACTOR:g}, got {height}x{width}")
    splits = {}
    for name, default in DEFAULT_COUNTS.items():
        given = getattr(options, name)
        if count := default if given is None else given:
            images, objects = _make(name, count, options.seed, height, width, len(CLASSES[options.classes]))
            mark = f"scenes/{name}/{count}/{options.seed}"
            splits[name] = DetectionSplit(images.__getitem__, objects, (1, height, width), mark)
    return make_data(spec, task, CLASSES[options.classes], splits, options.seed)


@functools.lru_cache(maxsize=4)
def _make(split: str, count: int, seed: int, height: int, width: int, classes: int) -> tuple[Tensor, list[Objects]]:
    digits = load_data("digits").split(split)
    generator = named_generator(seed, f"scenes/{split}")
    images = texture(count, height, width, generator)
    objects = [_paste(image, digits, classes, generator) for image in images]
    return images, objects


def texture(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return smooth grey images (count, 1, H, W) in [0, 0.6]: noise on grids of 4, 8 and 16 points, enlarged and summed."""
    total = torch.zeros(count, 1, height, width)
    for points, weight in ((4, 0.5), (8, 0.3), (16, 0.2)):
        coarse = torch.rand(count, 1, points, points, generator=generator)
        total += weight * F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return (0.6 * total).clamp_(0, 0.6)


def _paste(image: Tensor, digits: object, classes: int, generator: torch.Generator) -> Objects:
    """Paste digits into `image` (1, H, W), in place; return their boxes and classes."""
    wanted = int(torch.randint(1, MOST_OBJECTS + 1, (), generator=generator))
    height, width = image.shape[-2:]
    frames: list[tuple[int, int, int]] = []
    boxes, labels = [], []
    for _ in range(MOST_TRIES):
        if len(frames) == wanted:
            break
        draw = torch.rand(4, generator=generator).tolist()
        side = round(8 * (1 + (LARGEST_FACTOR - 1) * draw[0]))
        top, left = round(draw[1] * (height - side)), round(draw[2] * (width - side))
        if any(top < y + s and y < top + side and left < x + s and x < left + side for y, x, s in frames):
            continue
        sample = digits.batch([int(torch.randint(len(digits), (), generator=generator))])  # type: ignore[attr-defined, arg-type]
        ink = F.interpolate(sample["image"], size=(side, side), mode="bilinear", align_corners=False)[0].clamp(0, 1)
        part = image[:, top : top + side, left : left + side]
        part += ink * ((0.75 + 0.25 * draw[3]) - part)
        rows, columns = (ink[0] > INK * ink.max()).nonzero(as_tuple=True)
        boxes.append(
            [left + int(columns.min()), top + int(rows.min()), left + int(columns.max()) + 1, top + int(rows.max()) + 1]
        )
        labels.append(int(sample["label"][0]) * classes // 10)
        frames.append((top, left, side))
    return Objects(torch.tensor(boxes, dtype=torch.float32), torch.tensor(labels))
