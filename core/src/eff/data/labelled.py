"""Labelled samples of any kind: subsets, splits, and the model's order of the classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eff.data.augment import Augmentation
from eff.data.options import SampleOptions
from eff.data.subsets import choose
from eff.errors import DataError
from eff.schemas import DataSpec
from eff.seeding import named_generator


@dataclass(frozen=True)
class Labelled:
    """Samples with the index of their class, (N,) int64."""

    items: Any
    """A store: has a length, and `take(indices)` gives a store of these samples only."""
    labels: Tensor

    def take(self, indices: Tensor) -> Labelled:
        """Return these samples only."""
        if torch.equal(indices, torch.arange(len(self.labels))):
            return self
        return Labelled(self.items.take(indices.tolist()), self.labels[indices])


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
        noun: what the samples are, for messages.
    """

    classes: tuple[str, ...]
    train: Labelled | None = None
    test: Labelled | None = None
    whole: Labelled | None = None
    train_share: float = 0.8
    augmentation: Augmentation | None = None
    by_index: bool = False
    noun: str = "images"


def _check_labels(spec: DataSpec, part: Labelled, classes: int, noun: str) -> None:
    if len(part.items) != len(part.labels):
        raise DataError(f"data '{spec}': {len(part.items)} {noun}, but {len(part.labels)} labels")
    if not len(part.labels):
        raise DataError(f"data '{spec}' has no {noun}")
    low, high = int(part.labels.min()), int(part.labels.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise DataError(f"data '{spec}': label {wrong} is out of range; there are {classes} classes, from 0")


def with_model_classes(spec: DataSpec, found: Found, model_classes: object) -> Found:
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


def check(spec: DataSpec, found: Found) -> None:
    """Check the labels of all parts.

    Raises:
        DataError: a part is empty, has more labels than samples, or a label out of range.
    """
    for part in (found.train, found.test, found.whole):
        if part is not None:
            _check_labels(spec, part, len(found.classes), found.noun)


def split(spec: DataSpec, options: SampleOptions, found: Found) -> tuple[Labelled | None, Labelled | None]:
    """Return the train and test samples that the options ask for; None for a split without samples."""
    if options.train == 0 and options.test == 0:
        raise DataError(f"data '{spec}': train=0 and test=0 leave nothing")
    if found.whole is None:
        return (
            _subset(spec, "train", found.train, options.train, found.noun, options.seed),
            _subset(spec, "test", found.test, options.test, found.noun, options.seed),
        )
    total = len(found.whole.labels)
    train = options.train
    if train is None:
        asks_test = options.test is not None and found.train_share > 0
        train = max(0, total - (options.test or 0)) if asks_test else round(total * found.train_share)
    if train + (options.test or 0) > total:
        raise DataError(
            f"data '{spec}': there are {total} {found.noun} in all; train={options.train or 0} and "
            f"test={options.test or 0} ask for {(options.train or 0) + (options.test or 0)}"
        )
    chosen, rest = choose(found.whole.labels, train, named_generator(options.seed, "data/split"))
    remaining = found.whole.take(rest) if len(rest) else None
    return (
        found.whole.take(chosen) if train else None,
        _subset(spec, "test", remaining, options.test, found.noun, options.seed),
    )


def _subset(
    spec: DataSpec, name: str, part: Labelled | None, samples: int | None, noun: str, seed: int
) -> Labelled | None:
    if samples == 0 or (part is None and samples is None):
        return None
    available = 0 if part is None else len(part.labels)
    if part is None or (samples is not None and samples > available):
        raise DataError(f"data '{spec}': {name}={samples} asks for more than the {available} {name} {noun} there are")
    if samples is None or samples == available:
        return part
    return part.take(choose(part.labels, samples, named_generator(seed, f"data/{name}"))[0])
