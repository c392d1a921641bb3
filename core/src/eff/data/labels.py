"""Class names and output indices from whatever a source calls its labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eff.errors import DataError

MAX_CLASSES = 100_000
"""Labels from here on are taken for something else, e.g. an identifier."""


def from_names(names: Sequence[str], numeric: bool = True) -> tuple[tuple[str, ...], Tensor]:
    """Return the distinct names in order and the index of each sample's name.

    The order is alphabetic; with `numeric`, numeric where all names are whole numbers.
    """
    distinct = set(names)
    is_numeric = numeric and all(name.isascii() and name.isdigit() for name in distinct)
    classes = tuple(sorted(distinct, key=lambda name: (int(name), name)) if is_numeric else sorted(distinct))
    index = {name: position for position, name in enumerate(classes)}
    return classes, torch.tensor([index[name] for name in names], dtype=torch.long)


def from_indices(where: str, labels: Tensor, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the class names of labels that are output indices: the given ones, else the numbers.

    Args:
        where: what to call the labels in messages.
        labels: (N,) int64.
        names: class names by index where the source knows them.

    Raises:
        DataError: labels that cannot be output indices.
    """
    if names is not None:
        return tuple(names)
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0 or high >= MAX_CLASSES:
        wrong = low if low < 0 else high
        raise DataError(f"{where}: label {wrong} is out of range; labels count the classes from 0")
    return tuple(str(index) for index in range(high + 1))
