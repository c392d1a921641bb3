"""One image from encoded bytes to pixels: the same way for training, evaluation and prediction.

Orientation from EXIF, then grey or RGB as the model wants it, then the shorter side resized
(bilinear with antialiasing, Pillow's) and the centre cropped. An image that already has the wanted
size is not resampled.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from eff.errors import DataError

Encoded = bytes | Path
"""An image as it is stored: its bytes, or the file that has them."""
Shape = tuple[int, int, int]
"""Channels, height, width."""

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"))
MAX_PIXELS = 89_478_485  # Pillow's own warning level: 1 GiB of 24-bit pixels over three
_ORIENTATION = 0x0112  # the EXIF tag
_SWAPS_SIDES = 5  # orientations 5 to 8 turn by 90 degrees
_MODES = {1: "L", 3: "RGB"}


def read_image(path: Path, input_shape: Shape) -> Tensor:
    """Return the image in `path` as a tensor (C, H, W), float32 in [0, 1].

    Raises:
        DataError: the file is missing, no image, damaged or unreasonably large.
    """
    return torch.from_numpy(decode(path, input_shape, str(path)).astype(np.float32)) / 255


def decode(source: Encoded, shape: Shape, name: str) -> NDArray[np.uint8]:
    """Return an encoded image as an array (C, H, W), uint8, not to be written to.

    Args:
        source: encoded bytes or a file.
        shape: wanted channels (1 or 3), height and width.
        name: what to call the image in messages.

    Raises:
        DataError: the image cannot be read, or `shape` asks for other channels than 1 or 3.
    """
    channels, height, width = shape
    if channels not in _MODES:
        raise DataError(f"{name}: the model wants {channels} channels; images give 1 (grey) or 3 (RGB)")
    with _opened(source, name) as image:
        pixels = np.asarray(fit(_in_mode(_upright(image), _MODES[channels], name), height, width))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def native_shape(source: Encoded, name: str) -> Shape:
    """Return channels (1 or 3), height and width of an encoded image from its header.

    Raises:
        DataError: the image cannot be read.
    """
    with _opened(source, name) as image:
        width, height = image.size
        if image.getexif().get(_ORIENTATION, 1) >= _SWAPS_SIDES:
            width, height = height, width
        return (1 if image.mode in ("1", "L", "LA") or image.mode.startswith("I") else 3), height, width


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Return `image` with its shorter side resized and its centre cropped to `height` x `width`."""
    if image.size == (width, height):
        return image
    scale = max(height / image.height, width / image.width)
    resized_width = max(width, round(image.width * scale))
    resized_height = max(height, round(image.height * scale))
    image = image.resize((resized_width, resized_height), Image.Resampling.BILINEAR)
    left, top = (resized_width - width) // 2, (resized_height - height) // 2
    return image.crop((left, top, left + width, top + height))


@contextmanager
def _opened(source: Encoded, name: str) -> Iterator[Image.Image]:
    """Open an image and say in eff's terms what is wrong with it."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name}: there is no such file") from error
    except IsADirectoryError as error:
        raise DataError(f"{name}: is a folder, not an image") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: is not an image that Pillow can read (JPEG, PNG, WebP, ...)") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{name}: has more than {MAX_PIXELS / 1e6:.1f} million pixels (a decompression bomb?); scale it down"
        ) from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"{name}: the image is damaged ({error}); replace or remove it") from error


def _upright(image: Image.Image) -> Image.Image:
    if image.getexif().get(_ORIENTATION, 1) == 1:
        return image
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _in_mode(image: Image.Image, mode: str, name: str) -> Image.Image:
    if image.mode == mode:
        image.load()
        return image
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DataError(f"{name}: has 32 bits per pixel, whose range is not known; save it with 8 or 16 bits")
    return image.convert(mode)
