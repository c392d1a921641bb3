"""Differentiable k-means (DKM; Cho et al., ICLR 2022, arXiv:2108.12659), the clustering inside the forward pass.

    D_nj = ||b_n - c_j||,   A_nj = softmax_j(-D_nj / tau)
    c_j <- sum_n A_nj b_n / sum_n A_nj                       until no codeword moves by eps, at most `rounds` times
    b~_n = sum_j A_nj c_j

Autograd runs through all rounds. As tau falls, A becomes one-hot and b~ the nearest codeword.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eff_quant_kit.codebooks import decode, nearest

UNDER_ROOT = 1e-8
"""The distance's slope is infinite at 0."""
SMALLEST_MASS = 1e-3
"""A codeword with less attention in all would become an average of everything."""


def attention(b: Tensor, c: Tensor, tau: float | Tensor) -> Tensor:
    """Return A (N, k) for b (N, d) and codewords c (k, d)."""
    squared = b.square().sum(1, keepdim=True) + c.square().sum(1) - 2 * b @ c.t()
    return (-(squared.clamp(min=0) + UNDER_ROOT).sqrt() / tau).softmax(1)


def dkm(b: Tensor, c: Tensor, tau: float | Tensor, rounds: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return b~ (N, d) and the codewords after the last round, without a gradient.

    Args:
        b: sub-vectors, shape (N, d).
        c: codewords to start from, shape (k, d).
        tau: temperature, > 0, in the unit of b.
        rounds: most rounds, at least 1.
        eps: largest change of an entry at which the rounds end.
    """
    for _ in range(rounds):
        a = attention(b, c, tau)
        mass = a.sum(0)[:, None]
        new = (a.t() @ b) / mass.clamp(min=SMALLEST_MASS)
        weak = mass < SMALLEST_MASS
        if bool(weak.any()):
            new = torch.where(weak, _worst(b.detach(), c.detach(), weak[:, 0]), new)
        change = float((new - c).detach().abs().max())
        c = new
        if change < eps:
            break
    return a @ c, c.detach()


def _worst(b: Tensor, c: Tensor, weak: Tensor) -> Tensor:
    """Return the codewords with the weak ones at the sub-vectors that are farthest from any codeword."""
    distances = nearest(b, c)[0][:, 0]
    places = weak.nonzero()[:, 0][: len(b)]
    moved = c.clone()
    moved[places] = b[distances.topk(len(places)).indices]
    return moved


def straight_through(b: Tensor, c: Tensor) -> Tensor:
    """Return the nearest codewords; the gradient reaches b unchanged, and a codeword as the sum over its members."""
    chosen = decode(nearest(b.detach(), c.detach())[1][:, 0], c)
    return chosen + (b - b.detach())


def temperature(progress: float, start: float, end: float) -> float:
    """Return the temperature at `progress` in [0, 1]: a cosine from `start` to `end`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
