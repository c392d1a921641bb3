"""Images where they lie: as arrays in memory, or encoded and decoded when a batch asks for them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from eff.data.images import Encoded, Shape, decode, native_shape

CACHE_BYTES = 2**30
"""Decoded pixels kept by one split; images beyond this are decoded anew in every epoch."""
_WORTH_A_THREAD = 2**13  # encoded bytes; smaller images decode faster than threads can take them
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow converts RGB to grey


class ImageStore(Protocol):
    """Images by index, read in any shape."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def native_shape(self, index: int) -> Shape:
        """Return channels, height and width of one image as it is stored."""
        ...

    def pixels(self, indices: Sequence[int], shape: Shape) -> Tensor:
        """Return images (N, C, H, W) in `shape`: uint8, or float32 in [0, 1]. Not to be written to."""
        ...

    def raw(self, index: int) -> bytes:
        """Return what is stored of one image, for hashing."""
        ...

    def raw_size(self, index: int) -> int:
        """Return the number of bytes of `raw(index)`."""
        ...

    def take(self, indices: Sequence[int]) -> ImageStore:
        """Return a store of these images only."""
        ...


class ArrayStore:
    """Images that are decoded already: (N, C, H, W), uint8 or float32 in [0, 1]."""

    def __init__(self, images: Tensor):
        self._images = images

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    def native_shape(self, index: int) -> Shape:
        """Return channels, height and width; the same for all images of an array."""
        channels, height, width = self._images.shape[1:]
        return channels, height, width

    def pixels(self, indices: Sequence[int], shape: Shape) -> Tensor:
        """Return images, converted to the channels of `shape`, resized and centre cropped where they must be."""
        chosen = self._images[torch.as_tensor(indices, dtype=torch.long)]
        if chosen.shape[1:] == shape:
            return chosen
        images = chosen.float() / 255 if chosen.dtype == torch.uint8 else chosen
        return _resize(_with_channels(images, shape[0]), shape[1], shape[2])

    def raw(self, index: int) -> bytes:
        """Return the bytes of one image's array."""
        return self._images[index].contiguous().numpy().tobytes()

    def raw_size(self, index: int) -> int:
        """Return the number of bytes of one image's array."""
        return self._images[index].numel() * self._images.element_size()

    def take(self, indices: Sequence[int]) -> ArrayStore:
        """Return a store with a copy of these images."""
        return ArrayStore(self._images[torch.as_tensor(indices, dtype=torch.long)])


def _with_channels(images: Tensor, channels: int) -> Tensor:
    if images.shape[1] == channels:
        return images
    if channels == 1 and images.shape[1] == len(_LUMA):
        return (images * images.new_tensor(_LUMA).view(1, -1, 1, 1)).sum(1, keepdim=True)
    return images[:, :1].expand(-1, channels, -1, -1)


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resize the shorter side and crop the centre, as `eff.data.images.fit` does for files."""
    old_height, old_width = images.shape[2:]
    if (old_height, old_width) == (height, width):
        return images
    scale = max(height / old_height, width / old_width)
    size = [max(height, round(old_height * scale)), max(width, round(old_width * scale))]
    images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return images[:, :, top : top + height, left : left + width]


class EncodedStore:
    """Images as encoded bytes or files; photos are decoded by a few threads; all are kept decoded up to `CACHE_BYTES`.

    Args:
        items: encoded images by index; may itself be lazy.
        name: index -> what to call the image in messages.
        order: the items that are in the store; None for all.
    """

    def __init__(self, items: Sequence[Encoded], name: Callable[[int], str], order: Sequence[int] | None = None):
        self._items = items
        self._name = name
        self._order = range(len(items)) if order is None else order
        self._cache: _Cache | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._order)

    def native_shape(self, index: int) -> Shape:
        """Return channels, height and width from the header of one image."""
        item = self._order[index]
        return native_shape(self._items[item], self._name(item))

    def pixels(self, indices: Sequence[int], shape: Shape) -> Tensor:
        """Return images (N, C, H, W), uint8, by the pipeline of `eff.data.images`.

        Raises:
            DataError: an image cannot be read; the message names it.
        """
        if self._cache is None or self._cache.shape != shape:
            self._cache = _Cache(len(self), shape)
        out, missing = self._cache.read(indices)
        array = out.numpy()

        def fill(row: int) -> None:
            item = self._order[indices[row]]
            array[row] = decode(self._items[item], shape, self._name(item))

        in_threads = len(missing) > 1 and self._is_large(indices[missing[0]])
        for _ in (_threads(os.getpid()).map if in_threads else map)(fill, missing):
            pass
        if missing:
            self._cache.write(indices, missing, out)
        return out

    def _is_large(self, index: int) -> bool:
        item = self._items[self._order[index]]
        return isinstance(item, Path) or len(item) >= _WORTH_A_THREAD

    def raw(self, index: int) -> bytes:
        """Return the encoded bytes of one image."""
        item = self._items[self._order[index]]
        return item.read_bytes() if isinstance(item, Path) else item

    def raw_size(self, index: int) -> int:
        """Return the number of encoded bytes of one image."""
        item = self._items[self._order[index]]
        return item.stat().st_size if isinstance(item, Path) else len(item)

    def take(self, indices: Sequence[int]) -> EncodedStore:
        """Return a store of these images, with a cache of its own."""
        return EncodedStore(self._items, self._name, [self._order[index] for index in indices])


class _Cache:
    """Decoded images of one shape, the first that fit into `CACHE_BYTES`."""

    def __init__(self, images: int, shape: Shape):
        self.shape = shape
        slots = min(images, CACHE_BYTES // (shape[0] * shape[1] * shape[2]))
        self._images = torch.empty((slots, *shape), dtype=torch.uint8)  # the system gives the pages when written
        self._filled = torch.zeros(images, dtype=torch.bool)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Return a new batch with what is here, and the rows of it that are still to be filled."""
        index = torch.as_tensor(indices, dtype=torch.long)
        here = self._filled[index]
        if here.all():
            return self._images[index], []
        batch = torch.empty((len(index), *self.shape), dtype=torch.uint8)
        batch[here] = self._images[index[here]]
        return batch, (~here).nonzero().flatten().tolist()

    def write(self, indices: Sequence[int], rows: list[int], images: Tensor) -> None:
        """Keep the given rows of `images` where there is room for them."""
        kept = [row for row in rows if indices[row] < len(self._images)]
        index = torch.tensor([indices[row] for row in kept], dtype=torch.long)
        self._images[index] = images[kept]
        self._filled[index] = True


@functools.lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """Return the decoding threads of this process; a forked one must not use its parent's."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="eff-decode")
