"""Distances between a unit's quantized and float outputs (axis 1 of the paper)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FEATURES = 1


def feature_dim(y: Tensor) -> int:
    """Return the dimension of features: 1 for (N, C, ...) maps and (N, C), the last for (N, tokens, C)."""
    return y.ndim - 1 if y.ndim == 3 else FEATURES


def distance(kind: str, out: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the distance, summed over features and averaged over samples and positions.

    The sum over features is BRECQ's; with a mean instead, lambda would mean something else for every width.

    Args:
        kind: mse, l1, lp, cosine, kl, fisher_diag.
        out: outputs of the quantized unit.
        y: outputs of the float unit, same shape.
        weight: squared gradients of the task loss, for fisher_diag.
    """
    dim = feature_dim(y)
    if kind == "cosine":
        return (1 - F.cosine_similarity(out, y, dim=dim)).mean()
    if kind == "kl":
        p, q = y.log_softmax(dim), out.log_softmax(dim)
        return (p.exp() * (p - q)).sum(dim).mean()
    gap = out - y
    if kind == "l1":
        terms = gap.abs()
    elif kind == "lp":
        terms = (gap.abs() + 1e-12).pow(2.4)
    elif kind == "fisher_diag":
        assert weight is not None
        terms = gap.square() * weight
    else:
        terms = gap.square()
    return terms.sum(dim).mean()


def beta_at(progress: float, start: float, end: float, warmup: float) -> float | None:
    """Return the exponent of the penalty at a share of the steps: none in the warm-up, then linear to `end`."""
    if progress < warmup:
        return None
    return start + (end - start) * (progress - warmup) / (1.0 - warmup)


def uniform_like(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return uniform noise (N, C, ...) with the mean and standard deviation of each channel of `values`."""
    dims = [index for index in range(values.ndim) if index != 1]
    mean, std = values.mean(dims, keepdim=True), values.std(dims, keepdim=True)
    noise = torch.rand(values.shape, generator=generator, dtype=values.dtype) * 2 - 1
    return mean + noise * std * 3**0.5
