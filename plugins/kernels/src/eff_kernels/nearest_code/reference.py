"""What nearest_code means, in plain torch; every kernel must agree with it up to entries that are nearly equally near."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 22
"""Distances held at once: 16 MiB of float32."""


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of distances."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def nearest_code(x: Tensor, codebook: Tensor, block: int, columns: int) -> Tensor:
    """Return (T,) for (T, d) and (N, d), from differences; `columns` is for other paths."""
    wide = codebook.to(wide_dtype(x))
    rows = max(1, block // wide.numel())
    parts = [(part[:, None] - wide).square().sum(2).argmin(1) for part in x.to(wide.dtype).split(rows)]
    return torch.cat(parts)
