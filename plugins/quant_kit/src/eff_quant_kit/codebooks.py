"""Vector quantization: k-means (Lloyd, 1982) from k-means++ seeds (Arthur and Vassilvitskii, 2007), nearest-codeword search.

    a_n = argmin_j ||x_n - c_j||        c_j = mean of the x_n with a_n = j

x holds N sub-vectors of d values, the codebook k codewords, a code is the index of one. The search holds at most
`block` distances at a time, so a large codebook costs time, not memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.nearest_code import nearest_code
from eff_kernels.packing import pack_bits, unpack_bits

BLOCK = 1 << 22
"""Distances held at once: 16 MiB of float32."""


def nearest(x: Tensor, codebook: Tensor, count: int = 1, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Return the distances and codes of the `count` nearest codewords, nearest first; equally near ones
    come in the order of their codes.

    Args:
        x: sub-vectors, shape (N, d), floating point.
        codebook: shape (k, d), k >= count.
        count: codewords per sub-vector, at least 1.
        block: distances held at once.

    Returns:
        Euclidean distances (N, count), and codes (N, count) in int64.

    Raises:
        ValueError: shapes or `count` do not fit, or a value is not finite.
    """
    _check(x, codebook, count)
    codes = nearest_codes(x, codebook, count, block)
    distances = torch.stack([(x - codebook[codes[:, j]]).square().sum(1) for j in range(count)], 1).sqrt()
    if count > 1:
        codes, distances = _in_order(codes, distances)
    return distances, codes


def nearest_codes(
    x: Tensor, codebook: Tensor, count: int = 1, block: int = BLOCK, columns: int | None = None
) -> Tensor:
    """Return the codes (N, count) of `nearest` alone, of values that the caller knows to be finite; for inner loops.

    One codeword per sub-vector is `eff_kernels.nearest_code`, which on a GPU holds no distances at all.

    Args:
        columns: codewords of one block; unset: chosen so that blocks are a few times as wide as high.
    """
    if count == 1:
        return nearest_code(x, codebook, block, columns or 0)[:, None]
    k = len(codebook)
    centre = codebook.mean(0)  # close to the data, so that |x|^2 - 2 x c + |c|^2 cancels little
    points, words = x - centre, codebook - centre
    columns = min(k, max(count, columns or int(block**0.5) * 4))
    rows = max(1, block // columns)
    codes = torch.empty(len(x), count, dtype=torch.int64, device=x.device)
    for start in range(0, len(x), rows):
        part = points[start : start + rows]
        best: Tensor | None = None
        chosen: Tensor | None = None
        for first in range(0, k, columns):
            some = words[first : first + columns]
            distance = torch.addmm(some.square().sum(1), part, some.t(), alpha=-2)
            value, index = distance.topk(min(count, len(some)), 1, largest=False)
            index = index + first
            if best is not None and chosen is not None:
                value, index = torch.cat([best, value], 1), torch.cat([chosen, index], 1)
                order = value.sort(dim=1, stable=True).indices[:, :count]
                value, index = value.gather(1, order), index.gather(1, order)
            best, chosen = value, index
        assert chosen is not None  # a codebook is not empty
        codes[start : start + rows] = chosen
    return codes


def _in_order(codes: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """Sort by exact distance, then by code."""
    first = codes.argsort(1)
    codes, distances = codes.gather(1, first), distances.gather(1, first)
    order = distances.sort(dim=1, stable=True).indices
    return codes.gather(1, order), distances.gather(1, order)


def _check(x: Tensor, codebook: Tensor, count: int) -> None:
    if x.ndim != 2 or codebook.ndim != 2 or x.shape[1] != codebook.shape[1]:
        raise ValueError(f"need x (N, d) and a codebook (k, d), got {tuple(x.shape)} and {tuple(codebook.shape)}")
    if not 1 <= count <= len(codebook):
        raise ValueError(f"count must be between 1 and the {len(codebook)} codewords, got {count}")
    if not bool(torch.isfinite(x).all()) or not bool(torch.isfinite(codebook).all()):
        raise ValueError("sub-vectors or codewords hold NaN or infinity")


def plus_plus_seeds(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return k rows of x (N, d), each drawn with probability proportional to its squared distance to those before.

    Where fewer than k rows differ the rest are drawn evenly. The generator is on the CPU.

    Raises:
        ValueError: k is not between 1 and N.
    """
    n = len(x)
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the {n} sub-vectors, got {k}")
    draws = torch.rand(k, generator=generator, dtype=torch.float64).to(x.device)
    picked = [(draws[0] * n).long().clamp(max=n - 1)]
    squared = torch.full((n,), float("inf"), device=x.device, dtype=x.dtype)
    for draw in draws[1:]:
        squared = torch.minimum(squared, (x - x[picked[-1]]).square().sum(1))
        total = squared.double().cumsum(0)
        even = torch.arange(1, n + 1, device=x.device, dtype=torch.float64)
        total = torch.where(total[-1] > 0, total, even)
        picked.append(torch.searchsorted(total, draw * total[-1], right=True).clamp(max=n - 1))
    return x[torch.stack(picked)]


def kmeans(x: Tensor, k: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a codebook (k, d) and the codes (N,) of x (N, d): at most `iterations` rounds, fewer once no code changes.

    A codeword that nobody uses moves to the sub-vector that is farthest from its own codeword.

    Raises:
        ValueError: k is not between 1 and N, or a value is not finite.
    """
    if not bool(torch.isfinite(x).all()):
        raise ValueError("sub-vectors hold NaN or infinity")
    codebook = plus_plus_seeds(x, k, generator)
    distances, codes = nearest(x, codebook)
    for _ in range(iterations):
        codebook = reseed_empty(x, codes[:, 0], distances[:, 0], centroids(x, codes[:, 0], codebook))
        before = codes
        distances, codes = nearest(x, codebook)
        if torch.equal(before, codes):
            break
    return codebook, codes[:, 0]


def centroids(x: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    """Return the mean of each codeword's members; a codeword without members stays as it is in `codebook`."""
    counts = torch.bincount(codes, minlength=len(codebook)).to(x.dtype)[:, None]
    sums = torch.zeros_like(codebook).index_add_(0, codes, x)
    return torch.where(counts > 0, sums / counts.clamp(min=1), codebook)


def reseed_empty(x: Tensor, codes: Tensor, distances: Tensor, codebook: Tensor) -> Tensor:
    """Return the codebook with the codewords without members at the sub-vectors that are worst off, one each."""
    empty = (torch.bincount(codes, minlength=len(codebook)) == 0).nonzero()[:, 0]
    if not len(empty):
        return codebook
    worst = distances.topk(min(len(empty), len(x))).indices
    worst = worst[distances[worst] > 0]
    moved = codebook.clone()
    moved[empty[: len(worst)]] = x[worst]
    return moved


def decode(codes: Tensor, codebook: Tensor) -> Tensor:
    """Return the codewords of `codes` (any shape), shape (..., d)."""
    return codebook[codes.long()]


def index_bits(k: int) -> int:
    """Return the bits of a code among k: ceil(log2 k), at least 1."""
    return max(1, (k - 1).bit_length())


def pack_indices(codes: Tensor, k: int) -> Tensor:
    """Return codes in [0, k) as bytes: `index_bits(k)` bits each. Beyond 8 bits the low bytes of all codes come first.

    Raises:
        ValueError: a code does not fit.
    """
    flat, bits = codes.flatten().long(), index_bits(k)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= k):
        raise ValueError(f"codes must be in [0, {k - 1}], got {int(flat.min())} to {int(flat.max())}")
    planes = [pack_bits((flat >> shift) & 255, min(8, bits - shift)) for shift in range(0, bits, 8)]
    return torch.cat(planes)


def unpack_indices(packed: Tensor, k: int, count: int) -> Tensor:
    """Return the `count` codes (int64) that `pack_indices` packed.

    Raises:
        ValueError: the bytes are too few, or hold a code that is not below k.
    """
    bits, start = index_bits(k), 0
    codes = torch.zeros(count, dtype=torch.int64)
    for shift in range(0, bits, 8):
        width = min(8, bits - shift)
        size = -(-count * width // 8)
        codes |= unpack_bits(packed[start : start + size], width, count).long() << shift
        start += size
    if count and int(codes.max()) >= k:
        raise ValueError(f"a code is {int(codes.max())}, but the codebook has {k} codewords")
    return codes
