"""mutual_distances on the CPU: a matrix product per pair of images, whose row and column maxima serve both of them.

With two more channels the product itself is -|a - b|^2 / 2:

    (a, 1, -|a|^2 / 2) . (b, -|b|^2 / 2, 1) = ab - |a|^2 / 2 - |b|^2 / 2
"""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.mutual_score.reference import wide_dtype

TILE = 1 << 18
"""Elements of a product that is looked at while it is in the cache (1 MiB in float32)."""


def mutual_distances(z: Tensor) -> Tensor:
    """Return (N, N, L) for (N, L, C)."""
    images, patches, channels = z.shape
    wide = z.to(wide_dtype(z))
    half = wide.square().sum(-1, keepdim=True).mul_(-0.5)
    one = torch.ones_like(half)
    left, right = torch.cat([wide, one, half], -1), torch.cat([wide, half, one], -1)
    nearest = torch.full((images, images, patches), -torch.inf, dtype=wide.dtype, device=z.device)
    rows = max(1, min(patches, TILE // patches))
    together = max(1, TILE // (rows * patches))
    tile = torch.empty(rows * together * patches, dtype=wide.dtype, device=z.device)
    for i in range(images - 1):
        for start in range(i + 1, images, together):
            stop = min(start + together, images)
            others = right[start:stop].view(-1, channels + 2).t()
            for row in range(0, patches, rows):
                part = left[i, row : row + rows]
                product = tile[: len(part) * others.shape[1]].view(len(part), -1)
                torch.mm(part, others, out=product)
                by_image = product.view(len(part), stop - start, patches)
                nearest[i, start:stop, row : row + rows] = by_image.amax(2).t()
                torch.maximum(nearest[start:stop, i], by_image.amax(0), out=nearest[start:stop, i])
    return nearest.mul_(-2).clamp_(min=0).sqrt_()
