"""What partial_linear keeps of its input, in plain torch."""

from __future__ import annotations

from torch import Tensor


def select_columns(x: Tensor, index: Tensor) -> Tensor:
    """Return x[..., index], contiguous."""
    return x.index_select(-1, index)
