"""From labelled images to `Data`: subsets, shape, normalisation and classes, the same for all sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from eff.data import Data
from eff.data.augment import Augmentation
from eff.data.images import Shape
from eff.data.labelled import Found, Labelled, check, split, with_model_classes
from eff.data.options import ImageOptions
from eff.data.splits import ImageSplit
from eff.errors import DataError
from eff.schemas import DataSpec, TaskSpec
from eff.seeding import named_generator

MIXED_SIDE = 224
"""Height and width where images differ in size and neither a model nor an option says otherwise."""
_STATISTICS_SAMPLES = 2000
_HEADERS = 200  # images whose size is looked at
_STATISTICS_BATCH = 100
_SMALLEST_STD = 1 / 255  # one grey level, for channels that are constant


def make_data(spec: DataSpec, options: ImageOptions, task: TaskSpec | None, found: Found) -> Data:
    """Return the data that `found`, the options and the model's task make together.

    Args:
        spec: the source as the user wrote it.
        options: its options, checked.
        task: the task of a model that is already there; may leave options out. Its input shape and
            normalisation are kept, and class names that the model knows get the model's indices.
        found: what the source found.

    Raises:
        DataError: labels and images do not fit each other, the options or the task.
    """
    wanted = task.options if task is not None else {}
    _check_task(spec, options, task)
    check(spec, found)
    found = with_model_classes(spec, found, wanted.get("classes"))
    train, test = split(spec, options, found)
    first = train or test
    assert first is not None  # split refuses to return nothing
    native = _native_shape([part for part in (train, test) if part is not None], options.seed)
    shape = _shape_from(wanted.get("input_shape")) or (native[0], *(options.size or native[1:]))
    augmentation = found.augmentation or Augmentation.standard(shape, flip=native[0] > 1)
    train_split, test_split = (
        None if part is None else ImageSplit(part.items, part.labels, shape, augmentation) for part in (train, test)
    )
    mean, std = _normalisation(wanted, train_split, options.seed)
    result = TaskSpec(
        name="classification",
        options={"input_shape": list(shape), "classes": list(found.classes), "mean": list(mean), "std": list(std)},
    )
    return Data(spec, result, train_split, test_split, tuple(_notes(wanted, found.classes, native, shape)))


def _notes(wanted: Mapping[str, object], classes: Sequence[str], native: Shape, shape: Shape) -> Iterator[str]:
    """Yield what fits by its shape alone and may be other data than the model was made for."""
    known = wanted.get("classes")
    if isinstance(known, (list, tuple)) and not set(map(str, known)) & set(classes):
        yield (
            f"none of its classes ({_some(classes)}) is one of the model's ({_some(known)}); "
            "they are taken for the model's outputs in this order"
        )
    if "input_shape" in wanted and native[0] != shape[0]:
        kinds = {1: "grey", 3: "colour"}
        yield f"its {kinds.get(native[0], native[0])} images are made {kinds.get(shape[0], shape[0])} for the model"


def _some(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")


def _shape_from(value: object) -> Shape | None:
    if not isinstance(value, (list, tuple)):
        return None
    channels, height, width = (int(side) for side in value)
    return channels, height, width


def _check_task(spec: DataSpec, options: ImageOptions, task: TaskSpec | None) -> None:
    if task is None:
        return
    if task.name != "classification":
        raise DataError(f"data '{spec}' has images with classes; the model's task is {task.name}, not classification")
    shape = _shape_from(task.options.get("input_shape"))
    if shape is not None and options.size is not None and options.size != shape[1:]:
        raise DataError(
            f"data '{spec}': the model takes {shape[1]}x{shape[2]} images, size says "
            f"{options.size[0]}x{options.size[1]}; leave size out"
        )


def _native_shape(parts: Sequence[Labelled], seed: int) -> Shape:
    """Return the images' own shape from the headers of some; 224 x 224 where they differ in size."""
    shapes: set[Shape] = set()
    for part in parts:
        some = torch.randperm(len(part.labels), generator=named_generator(seed, "data/headers"))[:_HEADERS]
        shapes |= {part.items.native_shape(index) for index in some.tolist()}
    sizes = {shape[1:] for shape in shapes}
    height, width = sizes.pop() if len(sizes) == 1 else (MIXED_SIDE, MIXED_SIDE)
    return max(shape[0] for shape in shapes), height, width


Statistics = tuple[float, ...]


def _normalisation(wanted: Mapping[str, object], train: ImageSplit | None, seed: int) -> tuple[Statistics, Statistics]:
    """Return mean and std per channel: the model's, else the training images', else none."""
    mean, std = wanted.get("mean"), wanted.get("std")
    if isinstance(mean, (list, tuple)) and isinstance(std, (list, tuple)):
        return tuple(mean), tuple(std)
    return ((), ()) if train is None else channel_statistics(train, seed)


def channel_statistics(split: ImageSplit, seed: int) -> tuple[Statistics, Statistics]:
    """Return mean and standard deviation per channel over up to 2000 samples, of images in [0, 1]."""
    generator = named_generator(seed, "data/statistics")
    order = torch.randperm(len(split), generator=generator)[:_STATISTICS_SAMPLES].tolist()
    total = torch.zeros(split.shape[0], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for start in range(0, len(order), _STATISTICS_BATCH):
        images = split.batch(order[start : start + _STATISTICS_BATCH])["image"].double()
        total += images.sum((0, 2, 3))
        squares += images.square().sum((0, 2, 3))
    values = len(order) * split.shape[1] * split.shape[2]
    mean = total / values
    std = (squares / values - mean.square()).clamp(min=0).sqrt().clamp(min=_SMALLEST_STD)
    return tuple(round(value, 6) for value in mean.tolist()), tuple(round(value, 6) for value in std.tolist())
