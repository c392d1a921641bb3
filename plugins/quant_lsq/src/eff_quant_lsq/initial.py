"""Initial steps and offsets, and the gradient scale (LSQ sec. 2.1 and 2.2; LSQ+ sec. 3.2)."""

from __future__ import annotations

import math

from torch import Tensor

from eff_quant_kit.observers import minmax_affine, mse_affine
from eff_quant_lsq.config import LSQConfig


def lsq_step(v: Tensor, q_max: int, axis: int | None = None) -> Tensor:
    """Return 2 mean|v| / sqrt(QP), per tensor or per index of `axis` (LSQ sec. 2.1)."""
    magnitude = v.detach().float().abs()
    mean = magnitude.mean() if axis is None else magnitude.mean([index for index in range(v.ndim) if index != axis])
    return 2 * mean / math.sqrt(q_max)


def lsq_plus_weight_step(v: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """Return max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(bits-1) (LSQ+ sec. 3.2)."""
    dims = None if axis is None else [index for index in range(v.ndim) if index != axis]
    v = v.detach().float()
    mu, sigma = v.mean(dims), v.std(dims, correction=0)
    return (mu - 3 * sigma).abs().maximum((mu + 3 * sigma).abs()) / 2 ** (bits - 1)


def lsq_plus_input(x: Tensor, q_min: int, q_max: int, how: str) -> tuple[Tensor, Tensor]:
    """Return scale and offset for inputs, by least squares or min-max (LSQ+ sec. 3.2)."""
    return mse_affine(x, q_min, q_max) if how == "mse" else minmax_affine(x, q_min, q_max)


def gradient_scale(config: LSQConfig, count: int, q_max: int) -> float:
    """Return g for a step that covers `count` elements (LSQ sec. 2.2)."""
    if config.grad_scale == "none":
        return 1.0
    return 1.0 / math.sqrt(count * (q_max if config.grad_scale == "lsq" else 1))
