"""Source `npz:PATH`: numpy arrays of images and labels.

    arrays                                                           meaning
    x_train, y_train, x_test, y_test                                 with splits
    train_images, train_labels, test_images, test_labels             with splits, as MedMNIST has them
    images, labels  or  x, y                                         without; 80 % train, 20 % test by seed
    classes                                                          class names, where given

`x_val`, `y_val` or `val_images`, `val_labels` stand in for a test split that is not there. Images are
(N, H, W), (N, C, H, W) or (N, H, W, C) with 1 or 3 channels: whole numbers from 0 to 255, or floats in
[0, 1]. Labels are whole numbers from 0, (N,) or (N, 1). Pickled objects are never loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from eff.data import Data
from eff.data.classification import make_data
from eff.data.labelled import Found, Labelled
from eff.data.labels import from_indices
from eff.data.options import ImageOptions, read_options
from eff.data.stores import ArrayStore
from eff.errors import DataError
from eff.schemas import DataSpec, TaskSpec

_TRAIN = (("x_train", "y_train"), ("train_images", "train_labels"))
_TEST = (
    ("x_test", "y_test"), ("test_images", "test_labels"), ("x_val", "y_val"), ("val_images", "val_labels"),
)  # fmt: skip
_WHOLE = (("images", "labels"), ("x", "y"))
_CHANNELS = (1, 3)


class NpzOptions(ImageOptions):
    """Options of `npz:PATH`."""

    layout: Literal["nchw", "nhwc"] | None = Field(None, description="nchw or nhwc")


def load_npz(spec: DataSpec, task: TaskSpec | None) -> Data:
    """Return the images and labels of an .npz file.

    Raises:
        DataError: the file cannot be read, or its arrays are not images and labels.
    """
    path = Path(spec.location)
    options = read_options(spec, NpzOptions, path)
    arrays = _read_arrays(path)
    train, test, whole = (_part(path, arrays, names, options) for names in (_TRAIN, _TEST, _WHOLE))
    if train is None and test is None and whole is None:
        raise DataError(
            f"{path}: has no images and labels; name the arrays x_train, y_train, x_test, y_test or images, labels; "
            f"found {', '.join(arrays) or 'no arrays'}"
        )
    labels = torch.cat([part.labels for part in (train, test, whole) if part is not None])
    names = [str(name) for name in arrays["classes"].tolist()] if "classes" in arrays else None
    classes = from_indices(str(path), labels, names)
    has_splits = train is not None or test is not None
    return make_data(spec, options, task, Found(classes, train, test, None if has_splits else whole))


def _read_arrays(path: Path) -> Mapping[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {}
            for name in file.files:
                try:
                    arrays[name] = file[name]
                except ValueError as error:
                    raise DataError(
                        f"{path}: array '{name}' holds pickled Python objects or is damaged; eff loads no pickles, "
                        "since they can run code: save plain numbers (and class names as a string array)"
                    ) from error
            return arrays
    except DataError:
        raise
    except Exception as error:  # a zip, zlib, header or memory fault, or no .npz at all
        raise DataError(f"{path}: is not an .npz file that numpy can read; write one with numpy.savez") from error


def _part(
    path: Path, arrays: Mapping[str, NDArray[Any]], names: tuple[tuple[str, str], ...], options: NpzOptions
) -> Labelled | None:
    """Return the first pair of arrays that is there."""
    for image_name, label_name in names:
        if image_name in arrays and label_name not in arrays:
            raise DataError(f"{path}: array '{image_name}' has no labels; add '{label_name}'")
        if image_name in arrays:
            images = _images(f"{path}: array '{image_name}'", arrays[image_name], options.layout)
            labels = _labels(f"{path}: array '{label_name}'", arrays[label_name])
            if len(images) != len(labels):
                raise DataError(
                    f"{path}: {len(images)} images in '{image_name}', but {len(labels)} labels in '{label_name}'"
                )
            return Labelled(ArrayStore(images), labels)
    return None


def _images(where: str, array: NDArray[Any], layout: str | None) -> Tensor:
    """Return images as (N, C, H, W), uint8 or float32 in [0, 1]."""
    if array.size == 0:
        raise DataError(f"{where} is empty")
    array = _channels_first(where, array, layout)
    if array.dtype.kind in "iu":
        if array.min() < 0 or array.max() > 255:
            raise DataError(f"{where} has values from {array.min()} to {array.max()}; whole numbers must be 0 to 255")
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.uint8))
    if array.dtype.kind != "f":
        raise DataError(f"{where} is of type {array.dtype}; images are whole numbers from 0 to 255 or floats in [0, 1]")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array.reshape(len(array), -1))).any(1).argmax())
        raise DataError(f"{where} has NaN or infinite values, first in image {bad}")
    if array.min() < 0 or array.max() > 1:
        raise DataError(
            f"{where} has values from {array.min():.6g} to {array.max():.6g}; floats must be in [0, 1]: "
            "undo a normalisation, divide by the largest value, or save uint8"
        )
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _channels_first(where: str, array: NDArray[Any], layout: str | None) -> NDArray[Any]:
    if array.ndim == 3:
        return array[:, None]
    shape = tuple(array.shape)
    fits = [] if array.ndim != 4 else [n for n, axis in (("nchw", 1), ("nhwc", 3)) if shape[axis] in _CHANNELS]
    if layout is not None and layout in fits:
        fits = [layout]
    if len(fits) == 2:
        raise DataError(f"{where} has shape {shape}, which may be NCHW or NHWC; add ?layout=nchw or ?layout=nhwc")
    if not fits or layout not in (None, fits[0]):
        raise DataError(
            f"{where} has shape {shape}; images are (N, H, W), (N, C, H, W) or (N, H, W, C) with 1 or 3 channels"
            + (f", and layout={layout} was asked for" if layout else "")
        )
    return array if fits == ["nchw"] else array.transpose(0, 3, 1, 2)


def _labels(where: str, array: NDArray[Any]) -> Tensor:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    is_whole = array.dtype.kind in "iu" or (array.dtype.kind == "f" and np.array_equal(array, np.round(array)))
    if array.ndim != 1 or not is_whole:
        raise DataError(
            f"{where} has shape {tuple(array.shape)} and type {array.dtype}; labels are whole numbers, one per image"
        )
    return torch.from_numpy(array.astype(np.int64))
