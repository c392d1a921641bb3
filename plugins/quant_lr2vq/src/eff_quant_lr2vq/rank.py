"""How many dimensions to cluster in: low-rank error against clustering error, before any training.

Sub-vectors s_n in R^m, M = S^T S / N with eigenvalues l_1 >= ... >= l_m (not centred: no mean is stored).

    approx(d) = l_{d+1} + ... + l_m                               least squares, P = the first d eigenvectors as rows
    clust(d)  = sum_{i <= d} min(theta, l_i),   where   sum_{i <= d} max(0, log2(l_i / theta) / 2) = log2 k
    total(d)  = approx(d) + clust(d)

clust is the distortion of a Gaussian source at log2 k bits (reverse water-filling; Cover and Thomas, sec. 10.3.3). Errors
are squared norms per sub-vector. Weight error is flat beyond the knee, so the knee is taken, not the minimum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eff_quant_kit.codebooks import decode, kmeans


def spectrum(s: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (m,) of the second moment of s (N, m), largest first, and the eigenvectors as rows."""
    moment = s.double().t() @ s.double() / len(s)
    values, vectors = torch.linalg.eigh(moment)
    rows = vectors.flip(1).t()
    # a direction and its opposite are the same; the sign is fixed so that results repeat across libraries
    signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    return values.flip(0).clamp(min=0), (rows * signs).to(s.dtype)


def approximation_error(eigenvalues: Sequence[float], d: int) -> float:
    """Return approx(d)."""
    return math.fsum(eigenvalues[d:])


def water_filling(eigenvalues: Sequence[float], bits: float) -> float:
    """Return the distortion of independent Gaussians of these variances, sorted downwards, at `bits` in all.

    With the j largest above the water, log2 theta = mean of their log2 - 2 bits / j; the right j is the largest whose
    smallest member is still above.
    """
    positive = [value for value in eigenvalues if value > 0]
    for j in range(len(positive), 0, -1):
        log_theta = math.fsum(math.log2(value) for value in positive[:j]) / j - 2 * bits / j
        if math.log2(positive[j - 1]) >= log_theta:
            return j * math.exp2(log_theta) + math.fsum(positive[j:])
    return 0.0


def predicted_errors(eigenvalues: Sequence[float], k: int) -> list[float]:
    """Return total(d) for d = 1 ... m."""
    bits = math.log2(k)
    return [
        approximation_error(eigenvalues, d) + water_filling(eigenvalues[:d], bits)
        for d in range(1, len(eigenvalues) + 1)
    ]


def measured_errors(s: Tensor, k: int, iterations: int, generator: torch.Generator) -> list[float]:
    """Return the total error of k-means at every d = 1 ... m."""
    eigenvalues, vectors = spectrum(s)
    known = eigenvalues.tolist()
    return [
        approximation_error(known, d) + clustering_error(s @ vectors[:d].t(), k, iterations, generator)
        for d in range(1, s.shape[1] + 1)
    ]


def clustering_error(b: Tensor, k: int, iterations: int, generator: torch.Generator) -> float:
    """Return the mean squared distance of b (N, d) to its codewords after k-means."""
    codebook, codes = kmeans(b, k, iterations, generator)
    return float((b - decode(codes, codebook)).square().sum(1).mean())


def knee(errors: Sequence[float], slack: float) -> int:
    """Return the smallest d with an error of at most (1 + slack) times the least."""
    limit = (1 + slack) * min(errors)
    return next(d for d, error in enumerate(errors, 1) if error <= limit)
