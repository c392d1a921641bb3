"""What mutual_distances means, in plain torch; every kernel must agree with it."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(z: Tensor) -> torch.dtype:
    """Return the dtype of distances."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def mutual_distances(z: Tensor) -> Tensor:
    """Return (N, N, L) for (N, L, C)."""
    wide = z.to(wide_dtype(z))
    out = torch.stack([torch.cdist(one, wide).amin(-1) for one in wide])
    out.diagonal(dim1=0, dim2=1).fill_(torch.inf)
    return out
