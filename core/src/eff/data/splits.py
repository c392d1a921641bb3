"""A split of labelled images: batches by index and a fingerprint."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from eff.data import Batch
from eff.data.augment import Augmentation
from eff.data.images import Shape
from eff.data.stores import ImageStore
from eff.errors import DataError

_HASH_ALL_BYTES = 2**26
_HASH_SAMPLES = 256


class ImageSplit:
    """Labelled images in one shape.

    Args:
        images: where the images lie.
        labels: (N,) int64.
        shape: channels, height and width of what `batch` returns.
        augmentation: what `batch` does when it is given a generator.
    """

    def __init__(self, images: ImageStore, labels: Tensor, shape: Shape, augmentation: Augmentation):
        self.images = images
        self.labels = labels
        self.shape = shape
        self.augmentation = augmentation

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.labels)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return image (N, C, H, W), float32 in [0, 1], and label (N,), int64.

        Args:
            indices: which samples, from 0 to len - 1.
            generator: with one, the images are augmented; the same state gives the same batch.

        Raises:
            DataError: an image cannot be read; the message names it.
        """
        images = self.images.pixels(indices, self.shape)
        if generator is not None:
            images = self.augmentation(images, generator)
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        return {"image": images, "label": self.labels[torch.as_tensor(indices, dtype=torch.long)]}

    def fingerprint(self) -> str:
        """Return a hash of the labels, the shape, all sizes, and all bytes (of 256 samples beyond 64 MiB)."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        count = len(self)
        try:
            sizes = [self.images.raw_size(index) for index in range(count)]
            step = 1 if sum(sizes) <= _HASH_ALL_BYTES else max(1, count // _HASH_SAMPLES)
            digest = hashlib.blake2b(repr((self.shape, self.labels.tolist(), sizes)).encode(), digest_size=8)
            for index in range(0, count, step):
                digest.update(self.images.raw(index))
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
        return digest.hexdigest()
