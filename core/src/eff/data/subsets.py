"""Choosing samples by seed, with the classes in the proportions they have."""

from __future__ import annotations

import torch
from torch import Tensor


def choose(labels: Tensor, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split the indices of `labels` into `samples` chosen ones and the rest, both in rising order.

    Every class gives its share of `samples`, rounded down; what is missing then comes from the
    classes with the largest remainders, ties at random. So a class of one image is chosen with the
    probability it would have without classes.

    Args:
        labels: (N,) int64, >= 0.
        samples: how many to choose, 0 to N.
        generator: the randomness.

    Returns:
        Indices (samples,) and (N - samples,), int64.
    """
    total = len(labels)
    order = torch.randperm(total, generator=generator)
    count = torch.bincount(labels)
    share = count * samples
    quota = share // max(total, 1)
    tie_break = torch.rand(len(count), generator=generator, dtype=torch.float64)
    remainder = (share % max(total, 1)).double() + tie_break
    quota[remainder.argsort(descending=True)[: samples - int(quota.sum())]] += 1
    # The rank of each shuffled sample within its class decides whether its class still wants it.
    by_class = order[labels[order].argsort(stable=True)]
    start = count.cumsum(0) - count
    rank = torch.arange(total) - start[labels[by_class]]
    is_chosen = rank < quota[labels[by_class]]
    return by_class[is_chosen].sort().values, by_class[~is_chosen].sort().values
