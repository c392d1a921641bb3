"""From labelled images to `Data`: subsets, shape, normalisation and classes, the same for all sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eff.data import Data
from eff.data.augment import Augmentation
from eff.data.images import Shape
from eff.data.options import ImageOptions
from eff.data.splits import ImageSplit
from eff.data.stores import ImageStore
from eff.data.subsets import choose
from eff.errors import DataError
from eff.schemas import DataSpec, TaskSpec
from eff.seeding import named_generator

MIXED_SIDE = 224
"""Height and width where images differ in size and neither a model nor an option says otherwise."""
_STATISTICS_SAMPLES = 2000
_HEADERS = 200  # images whose size is looked at
_STATISTICS_BATCH = 100
_SMALLEST_STD = 1 / 255  # one grey level, for channels that are constant


@dataclass(frozen=True)
class Labelled:
    """Images with the index of their class, (N,) int64."""

    images: ImageStore
    labels: Tensor

    def take(self, indices: Tensor) -> Labelled:
        """Return these samples only."""
        if torch.equal(indices, torch.arange(len(self.labels))):
            return self
        return Labelled(self.images.take(indices.tolist()), self.labels[indices])


@dataclass(frozen=True)
class Found:
    """What a source found, before options and model have their say.

    Args:
        classes: names by label.
        train: the training samples, where the source has splits.
        test: the test samples, where the source has splits.
        whole: all samples, where it has none.
        train_share: share of `whole` that trains when no option says otherwise.
        augmentation: of training images; None: the standard one for their shape and colour.
        by_index: the labels are output indices of the model and are not to be matched by name.
    """

    classes: tuple[str, ...]
    train: Labelled | None = None
    test: Labelled | None = None
    whole: Labelled | None = None
    train_share: float = 0.8
    augmentation: Augmentation | None = None
    by_index: bool = False


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
    for part in (found.train, found.test, found.whole):
        if part is not None:
            _check_labels(spec, part, len(found.classes))
    found = _with_model_classes(spec, found, wanted.get("classes"))
    train, test = _split(spec, options, found)
    first = train or test
    assert first is not None  # _split refuses to return nothing
    native = _native_shape([part for part in (train, test) if part is not None], options.seed)
    shape = _shape_from(wanted.get("input_shape")) or (native[0], *(options.size or native[1:]))
    augmentation = found.augmentation or Augmentation.standard(shape, flip=native[0] > 1)
    train_split, test_split = (
        None if part is None else ImageSplit(part.images, part.labels, shape, augmentation) for part in (train, test)
    )
    mean, std = _normalisation(wanted, train_split, options.seed)
    result = TaskSpec(
        name="classification",
        options={"input_shape": list(shape), "classes": list(found.classes), "mean": list(mean), "std": list(std)},
    )
    return Data(spec=spec, task=result, train=train_split, test=test_split)


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


def _check_labels(spec: DataSpec, part: Labelled, classes: int) -> None:
    if len(part.images) != len(part.labels):
        raise DataError(f"data '{spec}': {len(part.images)} images, but {len(part.labels)} labels")
    if not len(part.labels):
        raise DataError(f"data '{spec}' has no images")
    low, high = int(part.labels.min()), int(part.labels.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise DataError(f"data '{spec}': label {wrong} is out of range; there are {classes} classes, from 0")


def _with_model_classes(spec: DataSpec, found: Found, model_classes: object) -> Found:
    """Give the samples the labels of the model, where its class names and the data's are the same kind.

    Data with some of the model's classes would otherwise be counted from 0 and all come out wrong.
    """
    if not isinstance(model_classes, (list, tuple)) or tuple(model_classes) == found.classes:
        return found
    names = tuple(str(name) for name in model_classes)
    if found.by_index:
        return replace(found, classes=names) if len(found.classes) <= len(names) else found
    unknown = [name for name in found.classes if name not in names]
    if len(unknown) == len(found.classes):  # other names altogether: the order of the outputs is all there is
        return found
    if unknown:
        raise DataError(
            f"data '{spec}' has class '{unknown[0]}', which the model does not know"
            + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
            + f"; it knows {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        )
    index = torch.tensor([names.index(name) for name in found.classes])

    def relabelled(part: Labelled | None) -> Labelled | None:
        return part and replace(part, labels=index[part.labels])

    return replace(
        found,
        classes=names,
        train=relabelled(found.train),
        test=relabelled(found.test),
        whole=relabelled(found.whole),
    )


def _split(spec: DataSpec, options: ImageOptions, found: Found) -> tuple[Labelled | None, Labelled | None]:
    """Return the train and test samples that the options ask for; None for a split without samples."""
    if options.train == 0 and options.test == 0:
        raise DataError(f"data '{spec}': train=0 and test=0 leave nothing")
    if found.whole is None:
        return (
            _subset(spec, "train", found.train, options.train, options.seed),
            _subset(spec, "test", found.test, options.test, options.seed),
        )
    total = len(found.whole.labels)
    train = options.train
    if train is None:
        asks_test = options.test is not None and found.train_share > 0
        train = max(0, total - (options.test or 0)) if asks_test else round(total * found.train_share)
    if train + (options.test or 0) > total:
        raise DataError(
            f"data '{spec}': there are {total} images in all; train={options.train or 0} and "
            f"test={options.test or 0} ask for {(options.train or 0) + (options.test or 0)}"
        )
    chosen, rest = choose(found.whole.labels, train, named_generator(options.seed, "data/split"))
    remaining = found.whole.take(rest) if len(rest) else None
    return (found.whole.take(chosen) if train else None, _subset(spec, "test", remaining, options.test, options.seed))


def _subset(spec: DataSpec, name: str, part: Labelled | None, samples: int | None, seed: int) -> Labelled | None:
    if samples == 0 or (part is None and samples is None):
        return None
    available = 0 if part is None else len(part.labels)
    if part is None or (samples is not None and samples > available):
        raise DataError(f"data '{spec}': {name}={samples} asks for more than the {available} {name} images there are")
    if samples is None or samples == available:
        return part
    return part.take(choose(part.labels, samples, named_generator(seed, f"data/{name}"))[0])


def _native_shape(parts: Sequence[Labelled], seed: int) -> Shape:
    """Return the images' own shape from the headers of some; 224 x 224 where they differ in size."""
    shapes: set[Shape] = set()
    for part in parts:
        some = torch.randperm(len(part.labels), generator=named_generator(seed, "data/headers"))[:_HEADERS]
        shapes |= {part.images.native_shape(index) for index in some.tolist()}
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
