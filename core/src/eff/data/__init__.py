"""Data: what a run trains and is measured on.

A source (corpus, csv, digits, folder, parquet, hf, npz, module:function) returns `Data`: splits that hand out
batches by index, and the task that the data is for. Images stay in [0, 1]; the task normalises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from eff.errors import DataError
from eff.schemas import DataSpec, TaskSpec

Batch = dict[str, Any]
"""Tensors by name with the sample as first dimension; which names there are is the task's."""


class Split(Protocol):
    """Samples of one split, by index."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return samples as one batch on the CPU; with a generator, with training augmentation."""
        ...

    def fingerprint(self) -> str:
        """Return a short hash that changes when the samples do."""
        ...


@dataclass(frozen=True)
class Data:
    """The splits of one data source."""

    spec: DataSpec
    task: TaskSpec
    train: Split | None = None
    test: Split | None = None
    notes: tuple[str, ...] = ()
    """What a user should know of how the samples were made to fit the model, to warn of."""

    def split(self, name: str) -> Split:
        """Return "train" or "test".

        Raises:
            DataError: this data has no such split.
        """
        chosen: Split | None = getattr(self, name)
        if chosen is None:
            other = "test" if name == "train" else "train"
            raise DataError(f"data '{self.spec}' has no {name} split; only {other}")
        return chosen

    def fingerprint(self) -> str:
        """Return one hash over the splits, for reports."""
        parts = [
            f"{name}={part.fingerprint()}" for name in ("train", "test") if (part := getattr(self, name)) is not None
        ]
        return " ".join(parts)


Source = Callable[[DataSpec, "TaskSpec | None"], Data]
"""A data source: gets the spec and, where a model is already there, the task it was made for."""


def load_data(spec: DataSpec | str, task: TaskSpec | None = None, sources: Mapping[str, str] | None = None) -> Data:
    """Return the data that `spec` names.

    Args:
        spec: a source, or what the user wrote, e.g. "folder:photos?train=256&seed=0".
        task: the task of a model that is already there, maybe with some options only: images get its
            input shape, its normalisation is kept, and classes that it knows by name get its indices.
        sources: scheme -> "package.module:function" of sources that extensions add.

    Raises:
        DataError: the source is unknown or the data cannot be used. Problems: several options are wrong.
        MissingDependencyError: the source needs a library that is not installed.
    """
    from eff.data.loading import load

    return load(DataSpec.parse(spec) if isinstance(spec, str) else spec, task, sources or {})


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Return `batch` with its tensors on `device`."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }


def batch_size_of(batch: Batch) -> int:
    """Return the number of samples in `batch`."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


def ordered_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """Yield all samples in their order, for evaluation."""
    for start in range(0, len(split), batch_size):
        yield split.batch(range(start, min(start + batch_size, len(split))))


def shuffled_batches(
    split: Split, batch_size: int, generator: torch.Generator, samples: int | None = None
) -> Iterator[Batch]:
    """Yield samples in random order without augmentation, at most `samples` of them."""
    order = torch.randperm(len(split), generator=generator)[:samples].tolist()
    for start in range(0, len(order), batch_size):
        yield split.batch(order[start : start + batch_size])
