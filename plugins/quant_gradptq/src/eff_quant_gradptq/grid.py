"""The grids: uniform, and the power grid of the authors' PowerQuant line of work; scales by search.

    power a:  q(w) = sign(w) (d k)^(1/a),  k = round(|w|^a / d)

A power grid is a uniform one for sign(w) |w|^a, so all else works on that; a = 1 is uniform.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHRINK = torch.linspace(1.0, 0.21, 80).tolist()
"""Factors on the largest weight: 1.00, 0.99, ..., 0.21 (BRECQ's search)."""
POWERS = [0.3 + 0.05 * index for index in range(15)]


def warp(w: Tensor, a: float) -> Tensor:
    """Return sign(w) |w|^a."""
    return w if a == 1.0 else w.sign() * w.abs().pow(a)


def unwarp(v: Tensor, a: float) -> Tensor:
    """Undo `warp`."""
    return v if a == 1.0 else v.sign() * v.abs().pow(1.0 / a)


def level_range(bits: Tensor, symmetric: bool, narrow: bool) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest level of each channel, before the zero point is taken off.

    Args:
        bits: (C,) integers.
        symmetric: signed around 0; else 0 to 2^b - 1.
        narrow: symmetric only: without the smallest level (power grids have a sign and a magnitude).
    """
    if not symmetric:
        return torch.zeros_like(bits), 2**bits - 1
    top = 2 ** (bits - 1) - 1
    return (-top if narrow else -top - 1), top


def search_scale(rows: Tensor, bits: Tensor, symmetric: bool, narrow: bool, p: float) -> tuple[Tensor, Tensor]:
    """Return scale and zero point per row that minimise mean |w - q(w)|^p over shrunken ranges.

    Args:
        rows: (C, n) weights, warped.
        bits: (C,) integers.
        symmetric, narrow: as for `level_range`.
        p: exponent, 2.4 in BRECQ.

    Returns:
        Scale (C,) > 0 and zero point (C,), whole numbers in the dtype of `rows`; 0 where symmetric.
    """
    low_level, high_level = (item.to(rows.dtype)[:, None] for item in level_range(bits, symmetric, narrow))
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        full, zero = rows.abs().amax(1, keepdim=True) / high_level, torch.zeros_like(low)
    else:
        full = (high - low) / (high_level - low_level)
        zero = torch.zeros_like(low)
    full = full.clamp(min=1e-8)
    best = torch.full_like(full, float("inf"))
    scale = full.clone()
    for factor in SHRINK:
        candidate = full * factor
        shift = zero if symmetric else (-low * factor / candidate).round().clamp(low_level, high_level)
        error = (fake_quantize(rows, candidate, shift, low_level, high_level) - rows).abs().pow(p).mean(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, candidate, scale)
        if not symmetric:
            zero = torch.where(better, shift, zero)
    return scale[:, 0], zero[:, 0]


def fake_quantize(rows: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Round to the nearest level and back."""
    return ((rows / scale).round() + zero).clamp(low, high).sub(zero) * scale


def search_power(rows: Tensor, bits: Tensor, p: float) -> float:
    """Return the power a whose grid has the least weight error, of one layer."""
    errors = []
    for a in POWERS:
        warped = warp(rows, a)
        scale, zero = search_scale(warped, bits, True, True, p)
        low, high = (item.to(rows.dtype)[:, None] for item in level_range(bits, True, True))
        errors.append(
            float((unwarp(fake_quantize(warped, scale[:, None], zero[:, None], low, high), a) - rows).square().sum())
        )
    return POWERS[errors.index(min(errors))]
