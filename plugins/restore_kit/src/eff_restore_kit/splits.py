"""Splits of restoration data: degraded images with their targets, cropped and turned for training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from eff.data import Batch
from eff.errors import DataError
from eff.seeding import named_generator
from eff_restore_kit.degradations import Degradation
from eff_restore_kit.photos import PhotoStore

Size = tuple[int, int]


class PhotoSplit:
    """Clear photos that are degraded when a batch is made.

    With a generator: random crops, mirrored and turned by quarters, a new degradation each time. Without:
    the centre crop (or the whole photo) with the degradation that belongs to (seed, index).

    Args:
        photos: the clear photos.
        degradation: what is done to them.
        size: of the crops of the target; None for whole photos.
        seed: of the fixed degradations, with the split's name, e.g. "0/test".
    """

    def __init__(self, photos: PhotoStore, degradation: Degradation, size: Size | None, seed: str):
        self.photos = photos
        self.degradation = degradation
        self.size = size
        self.seed = seed
        check_sizes(photos, size)

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self.photos)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return image and target (N, C, H, W), float32, target in [0, 1]; sizes (N, 2) of whole photos.

        Raises:
            DataError: a photo cannot be read; the message names it.
        """
        factor = self.degradation.factor
        targets = []
        for index in indices:
            pixels = self.photos.pixels(index)
            [cut] = crop([pixels], self.size, factor, generator)
            targets.append(cut)
        if self.size is not None and generator is not None:
            target = torch.stack(targets).float() / 255
            return {"image": self.degradation(target, generator), "target": target}
        images = []
        for index, cut in zip(indices, targets, strict=True):
            own = named_generator(0, f"degradation/{self.seed}/{index}")
            images.append(self.degradation(cut[None].float() / 255, own)[0])
        return collate(images, [cut.float() / 255 for cut in targets], factor)

    def fingerprint(self) -> str:
        """Return a hash of photos, crop and degradation."""
        own = f"{self.photos.fingerprint()} {self.degradation!r} {self.size} {self.seed}"
        return hashlib.blake2b(own.encode(), digest_size=8).hexdigest()


class PairSplit:
    """Degraded images and their targets from files.

    Args:
        images: the degraded images.
        targets: the clear ones, in the same order, `factor` times as large.
        size: of the crops of the target; None for whole images.
        factor: side of a target / side of its image.
    """

    def __init__(self, images: PhotoStore, targets: PhotoStore, size: Size | None, factor: int):
        self.images = images
        self.targets = targets
        self.size = size
        self.factor = factor
        check_sizes(targets, size)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.targets)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return image and target (N, C, H, W), float32 in [0, 1]; sizes (N, 2) of whole images."""
        images, targets = [], []
        for index in indices:
            pair = [self.targets.pixels(index), self.images.pixels(index)]
            target, image = crop(pair, self.size, self.factor, generator)
            targets.append(target.float() / 255)
            images.append(image.float() / 255)
        return collate(images, targets, self.factor)

    def fingerprint(self) -> str:
        """Return a hash of the files and the crop."""
        own = f"{self.images.fingerprint()} {self.targets.fingerprint()} {self.size}"
        return hashlib.blake2b(own.encode(), digest_size=8).hexdigest()


def check_sizes(photos: PhotoStore, size: Size | None) -> None:
    """Raise when a photo is smaller than the crop.

    Raises:
        DataError: the message names the first one.
    """
    if size is None:
        return
    for index in range(len(photos)):
        height, width = photos.size(index)
        if height < size[0] or width < size[1]:
            raise DataError(
                f"{photos.name(index)}: is {height}x{width}, smaller than the crop of {size[0]}x{size[1]}; use ?size="
            )


def crop(
    images: Sequence[Tensor], size: Size | None, factor: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Yield the same part of a target and (where given) of its image, which is `factor` times smaller.

    Args:
        images: the target (C, H, W) and perhaps the image.
        size: of the part of the target; None: all that is a multiple of `factor`.
        factor: side of the target / side of the image.
        generator: with one, a random place, mirrored and turned by quarters; None: the centre.
    """
    height, width = images[0].shape[-2:]
    rows, columns = size or (height // factor * factor, width // factor * factor)
    spare = ((height - rows) // factor, (width - columns) // factor)
    if generator is None:
        top, left, turns = spare[0] // 2, spare[1] // 2, 0
    else:
        draws = torch.rand(3, generator=generator)
        top, left = int(draws[0] * (spare[0] + 1)), int(draws[1] * (spare[1] + 1))
        turns = int(draws[2] * 8)
    for image, step in zip(images, (factor, 1), strict=False):
        part = image[
            :, top * step : top * step + rows * step // factor, left * step : left * step + columns * step // factor
        ]
        yield turned(part, turns, square=rows == columns)


def turned(image: Tensor, turns: int, square: bool) -> Tensor:
    """Return one of the 8 mirrored and quarter-turned forms; for oblong crops one of the 4 that keep the shape."""
    if turns >= 4:
        image = image.flip(-1)
    quarters = turns % 4 if square else 2 * (turns % 2)
    return torch.rot90(image, quarters, (-2, -1))


def collate(images: list[Tensor], targets: list[Tensor], factor: int) -> Batch:
    """Return one batch; unequal images are padded by repeating their edges, and `sizes` says where they end."""
    sizes = torch.tensor([target.shape[-2:] for target in targets])
    if (sizes == sizes[0]).all():
        return {"image": torch.stack(images), "target": torch.stack(targets)}
    height, width = sizes.amax(0).tolist()
    return {
        "image": torch.stack([_padded(image, height // factor, width // factor) for image in images]),
        "target": torch.stack([_padded(target, height, width) for target in targets]),
        "sizes": sizes,
    }


def _padded(image: Tensor, height: int, width: int) -> Tensor:
    right, bottom = width - image.shape[-1], height - image.shape[-2]
    return F.pad(image[None], (0, right, 0, bottom), mode="replicate")[0]
