"""The Frechet distance between two sets of samples (Heusel et al., 2017, arXiv:1706.08500) in two feature spaces.

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

`digit_features`: the 32 inputs of the last layer of a small CNN trained on the digits (seed 0), images in [-1, 1].
`pca_features`: the first principal components of a reference set. Distances of one space do not compare with others'.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the (squared) Frechet distance of features (N, D) and (M, D), in float64.

    Raises:
        ValueError: fewer than two samples, or different numbers of features.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(f"need (N, D) and (M, D) with N, M >= 2, got {tuple(first.shape)} and {tuple(second.shape)}")
    a, b = first.double(), second.double()
    c1, c2 = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    root = _root(c1)
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * cross)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def pca_features(reference: Tensor, components: int = 32) -> Callable[[Tensor], Tensor]:
    """Return a function from images (N, ...) to their first principal components, fitted on `reference`."""
    flat = reference.flatten(1).double()
    mean = flat.mean(0)
    basis = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:components].T
    return lambda images: (images.flatten(1).double() - mean) @ basis


@cache
def _digit_network() -> nn.Sequential:
    from eff.data import load_data

    split = load_data("digits?seed=0").split("train")
    batch = split.batch(range(len(split)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(network.parameters(), 2e-3)
        for _ in range(10):
            for rows in torch.randperm(len(split)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(network(2 * batch["image"][rows] - 1), batch["label"][rows]).backward()
                optimizer.step()
    return network.eval().requires_grad_(False)


def digit_features(images: Tensor) -> Tensor:
    """Return (N, 32) features of digits (N, 1, 8, 8) in [-1, 1]; the network is trained once per process, in 2 s."""
    features: Tensor = _digit_network()[:-1](images.cpu().float())
    return features
