"""Bicubic resizing as Matlab's `imresize` does it: the degradation of super-resolution benchmarks.

Cubic convolution with a = -0.5 (Keys, IEEE TASSP 1981), stretched by 1 / scale when shrinking
(antialiasing), edges mirrored.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

_SUPPORT = 4  # width of the cubic kernel


def imresize(image: Tensor, scale: float) -> Tensor:
    """Return images resized by `scale`, not clamped.

    Args:
        image: (N, C, H, W), floating point.
        scale: output side / input side, > 0; the output has ceil(side * scale) pixels.

    Returns:
        (N, C, ceil(H * scale), ceil(W * scale)), dtype of `image`.
    """
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    rows, columns = (_matrix(side, scale).to(image) for side in image.shape[-2:])
    return rows @ image @ columns.T


@functools.lru_cache(maxsize=16)
def _matrix(side: int, scale: float) -> Tensor:
    """Return the weights (ceil(side * scale), side) of each input position for each output position."""
    size = math.ceil(side * scale)
    stretch = min(scale, 1.0)
    width = _SUPPORT / stretch
    # Output position x (from 1) lies at u in input coordinates; `index` are the taps around it.
    u = torch.arange(1, size + 1, dtype=torch.float64) / scale + 0.5 * (1 - 1 / scale)
    index = (u - width / 2).floor()[:, None] + torch.arange(math.ceil(width) + 2, dtype=torch.float64)
    weight = stretch * _cubic(stretch * (u[:, None] - index))
    weight = weight / weight.sum(1, keepdim=True)
    mirrored = (index.long() - 1) % (2 * side)
    mirrored = torch.where(mirrored < side, mirrored, 2 * side - 1 - mirrored)
    return torch.zeros(size, side, dtype=torch.float64).scatter_add_(1, mirrored, weight)


def _cubic(x: Tensor) -> Tensor:
    near = x.abs()
    inner = 1.5 * near**3 - 2.5 * near**2 + 1
    outer = -0.5 * near**3 + 2.5 * near**2 - 4 * near + 2
    return torch.where(near <= 1, inner, torch.where(near <= 2, outer, torch.zeros_like(x)))
