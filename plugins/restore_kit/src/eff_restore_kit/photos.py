"""Photos where they lie, decoded at their own size and kept in memory as far as there is room."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eff.data.images import SUFFIXES, Shape, decode, native_shape
from eff.errors import DataError, MissingDependencyError

CACHE_BYTES = 2**30
_HASH_BYTES = 2**16

Box = tuple[int, int, int, int]
"""Top, left, height, width."""

# Bundled with scikit-image and scikit-learn: real colour photos for first uses and tests.
_SAMPLES = {
    "train": ("skimage/data/astronaut.png", "skimage/data/chelsea.png", "skimage/data/rocket.jpg",
              "skimage/data/motorcycle_left.png", "sklearn/datasets/images/flower.jpg"),
    "test": ("skimage/data/coffee.png", "sklearn/datasets/images/china.jpg"),
}  # fmt: skip
_SAMPLE_SIDE = 128


@dataclass(frozen=True)
class Photo:
    """A file, or a part of it."""

    path: Path
    box: Box | None = None


class PhotoStore:
    """Photos by index as uint8 tensors (channels, height, width) of their own sizes."""

    def __init__(self, photos: Sequence[Photo], channels: int):
        self.photos = list(photos)
        self.channels = channels
        self._kept: dict[int, Tensor] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self.photos)

    def name(self, index: int) -> str:
        """Return what to call a photo in messages."""
        return str(self.photos[index].path)

    def size(self, index: int) -> tuple[int, int]:
        """Return height and width from the file's header."""
        photo = self.photos[index]
        if photo.box is not None:
            return photo.box[2:]
        return native_shape(photo.path, str(photo.path))[1:]

    def pixels(self, index: int) -> Tensor:
        """Return one photo, uint8 (C, H, W), not to be written to.

        Raises:
            DataError: the file cannot be read.
        """
        if index in self._kept:
            return self._kept[index]
        photo = self.photos[index]
        pixels = read_photo(photo.path, self.channels)
        if photo.box is not None:
            top, left, height, width = photo.box
            pixels = pixels[:, top : top + height, left : left + width].clone()
        if self._kept_bytes + pixels.numel() <= CACHE_BYTES:
            self._kept[index] = pixels
            self._kept_bytes += pixels.numel()
        return pixels

    def fingerprint(self) -> str:
        """Return a hash of names, sizes in bytes, boxes and the first 64 KiB of every file."""
        digest = hashlib.blake2b(str(self.channels).encode(), digest_size=8)
        for photo in self.photos:
            digest.update(repr((photo.path.name, photo.path.stat().st_size, photo.box)).encode())
            with open(photo.path, "rb") as file:
                digest.update(file.read(_HASH_BYTES))
        return digest.hexdigest()


def read_photo(path: Path, channels: int) -> Tensor:
    """Return a photo as uint8 (C, H, W) in its own size, upright."""
    shape: Shape = (channels, *native_shape(path, str(path))[1:])
    return torch.from_numpy(decode(path, shape, str(path)).copy())


def photos_below(folder: Path) -> list[Photo]:
    """Return the image files below a folder in alphabetic order.

    Raises:
        DataError: there are none.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        raise DataError(f"{folder}: has no images (JPEG, PNG, ...)")
    return [Photo(path) for path in files]


def sample_photos(split: str) -> list[Photo]:
    """Return the photos that scikit-image and scikit-learn bring, cut into squares of 128 pixels.

    Raises:
        MissingDependencyError: one of the two is not installed.
    """
    found = []
    for name in _SAMPLES[split]:
        package, _, inner = name.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None or not (path := Path(spec.origin).parent / inner).exists():
            raise MissingDependencyError(
                f"the sample photos need {package}; pip install 'eff-restore-kit[samples]', or name a folder: photos:PATH"
            )
        _, height, width = native_shape(path, str(path))
        side = _SAMPLE_SIDE
        found += [
            Photo(path, (top, left, side, side))
            for top in range(0, height - side + 1, side)
            for left in range(0, width - side + 1, side)
        ]
    return found
