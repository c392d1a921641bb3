"""Generated scenes for tests and contract checks: no files, no extras.

eff_restore_kit.samples:scenes?degrade=haze&train=16&test=4&size=32
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from eff.data import Batch, Data
from eff.data.options import read_options
from eff.schemas import DataSpec, TaskSpec
from eff.seeding import named_generator
from eff_restore_kit.degradations import Degradation
from eff_restore_kit.sources import PhotoOptions, degradation_of, merged_task, task_of


class SceneSplit:
    """Generated clear images with a degradation; each is a function of the seed and its index."""

    def __init__(self, clear: Tensor, degradation: Degradation, seed: str):
        self.clear = clear
        self.degradation = degradation
        self.seed = seed

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self.clear)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return image and target; a generator draws another degradation."""
        target = self.clear[torch.as_tensor(list(indices))]
        if generator is not None:
            return {"image": self.degradation(target, generator), "target": target}
        images = [
            self.degradation(target[row : row + 1], named_generator(0, f"{self.seed}/{index}"))
            for row, index in enumerate(indices)
        ]
        return {"image": torch.cat(images), "target": target}

    def fingerprint(self) -> str:
        """Return a hash of the images and the degradation."""
        digest = hashlib.blake2b(repr((self.degradation, self.seed)).encode(), digest_size=8)
        digest.update(self.clear.numpy().tobytes())
        return digest.hexdigest()


def scene_images(samples: int, channels: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return images (N, C, H, W) in [0, 1]: a smooth colour gradient with six rectangles and a texture."""
    coarse = torch.rand(samples, channels, 3, 3, generator=generator)
    image = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    rows, columns = torch.arange(height).view(1, 1, -1, 1) / height, torch.arange(width).view(1, 1, 1, -1) / width
    for _ in range(6):
        box = torch.rand(samples, 4, 1, 1, 1, generator=generator)
        colour = torch.rand(samples, channels, 1, 1, generator=generator)
        inside = ((rows - box[:, 0]).abs() < 0.3 * box[:, 2]) & ((columns - box[:, 1]).abs() < 0.3 * box[:, 3])
        image = torch.where(inside, colour, image)
    waves = torch.sin(40 * rows + 60 * columns * torch.rand(samples, 1, 1, 1, generator=generator))
    return (0.95 * image + 0.05 * (waves * 0.5 + 0.5)).clamp(0, 1)


def scenes(spec: DataSpec, task: TaskSpec | None = None) -> Data:
    """Return generated scenes; options as those of `photos`, by default 32 for training and 8 for testing."""
    degradation, own = degradation_of(spec)
    options = read_options(spec.model_copy(update={"options": own}), PhotoOptions)
    channels = int(options.channels)
    height, width = options.size or (64, 64)
    splits = {}
    for name, count in (("train", options.train), ("test", options.test)):
        wanted = (32 if name == "train" else 8) if count is None else count
        if wanted:
            clear = scene_images(wanted, channels, height, width, named_generator(options.seed, f"scenes/{name}"))
            splits[name] = SceneSplit(clear, degradation, f"{options.seed}/{name}")
    made = task_of(options, channels, spec.options.get("degrade", "haze"), degradation.factor)
    return Data(spec, merged_task(spec, made, task), **splits)
