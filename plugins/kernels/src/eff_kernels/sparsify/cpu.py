"""sparsify on the CPU: the largest magnitude of each short block first, then only the few blocks that can hold an entry."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.sparsify.reference import accumulate_, check_nan, choose

__all__ = ["accumulate_", "sparsify"]

BLOCK = 128
"""Entries per block: at a ratio of 0.1 % an eighth of the blocks holds one of those that pass."""


def sparsify(
    v: Tensor, keep: int, stride: int, start: int, share: float, upper: float, lower: float, max_iterations: int,
    resample: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return values and indices."""
    flat = v.flatten()
    whole = len(flat) // BLOCK * BLOCK
    blocks, rest = flat[:whole].view(-1, BLOCK), flat[whole:]
    # Two vectorised passes without a temporary, a tenth of the time of one for the largest magnitude; NaN comes through.
    peaks = torch.maximum(blocks.amax(1), blocks.amin(1).neg_())
    check_nan(peaks.isnan().any() | rest.isnan().any())

    def passing(threshold: Tensor) -> Tensor:
        high = (peaks >= threshold).nonzero()
        if 2 * len(high) > len(blocks):  # nearly all: no detour
            return (flat.abs() >= threshold).nonzero().flatten()
        block, place = (blocks[high.flatten()].abs() >= threshold).nonzero().unbind(1)
        last = (rest.abs() >= threshold).nonzero().flatten() + whole
        return torch.cat([high.flatten()[block] * BLOCK + place, last])

    return choose(flat, passing, keep, stride, start, share, upper, lower, max_iterations, resample)
