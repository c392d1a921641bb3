"""The split of the training data that bi-level search needs: one part for weights, one for the architecture."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eff.data import Batch, Split
from eff.errors import DataError


class PartOfSplit:
    """Some samples of a split."""

    def __init__(self, split: Split, indices: Sequence[int]):
        self.whole = split
        self.indices = list(indices)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.indices)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return samples of this part."""
        return self.whole.batch([self.indices[index] for index in indices], generator)

    def fingerprint(self) -> str:
        """Return the whole split's hash with the size of the part."""
        return f"{self.whole.fingerprint()}/{len(self)}"


def split_for_search(split: Split, portion: float, generator: torch.Generator) -> tuple[PartOfSplit, PartOfSplit]:
    """Divide a split at random; the parts have no sample in common.

    Args:
        split: the training data.
        portion: share of the first part, in (0, 1).
        generator: for the order.

    Raises:
        DataError: a part would be empty.
    """
    first = round(portion * len(split))
    if not 0 < first < len(split):
        raise DataError(
            f"{len(split)} training samples cannot be divided {portion:g} to {1 - portion:g} between weights and "
            "architecture; use ?train=N with more samples or another train_portion"
        )
    order = torch.randperm(len(split), generator=generator).tolist()
    return PartOfSplit(split, order[:first]), PartOfSplit(split, order[first:])
