"""nearest_code on the CPU: products of blocks that stay in the caches, with a running minimum."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.nearest_code.reference import wide_dtype


def nearest_code(x: Tensor, codebook: Tensor, block: int, columns: int) -> Tensor:
    """Return (T,) for (T, d) and (N, d); the smaller of equal distances' codes, also across blocks."""
    wide = wide_dtype(x)
    entries = len(codebook)
    words = codebook.to(wide)
    centre = words.mean(0)  # close to the data, so that |c|^2 - 2 x c cancels little
    points, words = x.to(wide) - centre, words - centre
    columns = min(entries, columns or int(block**0.5) * 4)
    rows = max(1, block // columns)
    codes = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for start in range(0, len(x), rows):
        part = points[start : start + rows]
        best, chosen = _block(part, words[:columns])
        for first in range(columns, entries, columns):
            value, index = _block(part, words[first : first + columns])
            nearer = value < best
            best = torch.where(nearer, value, best)
            chosen = torch.where(nearer, index + first, chosen)
        codes[start : start + rows] = chosen
    return codes


def _block(points: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.addmm(words.square().sum(1), points, words.t(), alpha=-2).min(1)
    return found.values, found.indices
