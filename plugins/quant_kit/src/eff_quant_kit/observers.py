"""Scales and offsets from data, without training."""

from __future__ import annotations

import torch
from torch import Tensor

SEARCH_SAMPLES = 1 << 16
"""Elements that the search looks at; more change the result by less than its grid."""


def minmax_symmetric(x: Tensor, q_max: int, axis: int | None = None) -> Tensor:
    """Return max|x| / q_max, per tensor or per index of `axis`."""
    largest = x.detach().abs()
    if axis is None:
        return largest.amax() / q_max
    return largest.amax([index for index in range(x.ndim) if index != axis]) / q_max


def minmax_affine(x: Tensor, q_min: int, q_max: int) -> tuple[Tensor, Tensor]:
    """Return scale and offset that map [min, max] of `x` onto the whole range."""
    low, high = x.detach().amin(), x.detach().amax()
    scale = (high - low) / (q_max - q_min)
    return scale, low - q_min * scale


def mse_affine(x: Tensor, q_min: int, q_max: int, steps: int = 16) -> tuple[Tensor, Tensor]:
    """Return scale and offset that minimise ||x_hat - x||^2 over ranges inside [min, max].

    Both ends of the range move inwards on a grid of `steps`, down to a fifth of the width; LSQ+
    (sec. 3.2) asks for this minimum and leaves the search open.
    """
    flat = x.detach().float().flatten()
    stride = max(1, flat.numel() // SEARCH_SAMPLES)
    flat = flat[::stride]
    low, high = flat.amin(), flat.amax()
    width = high - low
    best_error, best = torch.tensor(float("inf")), minmax_affine(x, q_min, q_max)
    for cut_low in torch.linspace(0, 0.4, steps).tolist():
        for cut_high in torch.linspace(0, 0.4, steps).tolist():
            scale = width * (1 - cut_low - cut_high) / (q_max - q_min)
            offset = low + cut_low * width - q_min * scale
            levels = ((flat - offset) / scale).round_().clamp_(q_min, q_max)
            error = (levels.mul_(scale).add_(offset) - flat).square_().mean()
            if error < best_error:
                best_error, best = error, (scale, offset)
    return best
