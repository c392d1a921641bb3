"""How many entries are kept, and which are sampled for the threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Plan:
    """The numbers of one sparsification."""

    keep: int
    """K = ceil(n ratio)."""
    stride: int
    """Of the sample; 1: all entries, and the choice is exact."""
    start: int
    """First entry of the sample."""
    share: float
    """The ratio."""


def make_plan(size: int, ratio: float, sample_ratio: float, generator: torch.Generator | None = None) -> Plan:
    """Return the plan for `size` entries; at least ceil(2 / ratio) are sampled, so that two are expected to pass."""
    keep = math.ceil(size * ratio)
    least = max(math.ceil(size * sample_ratio), math.ceil(2 / ratio))
    if size <= least or keep == size:
        return Plan(keep, 1, 0, ratio)
    stride = math.ceil(size / least / 32) * 32 + 1  # odd: not in step with the rows of a weight
    while stride > 1 and size // stride < least:
        stride -= 8
    stride = max(1, stride)
    start = int(torch.randint(stride, (), generator=generator)) if generator is not None else 0
    return Plan(keep, stride, start, ratio)
