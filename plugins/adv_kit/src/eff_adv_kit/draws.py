"""Random numbers that belong to a sample, not to a batch.

A number is a hash (splitmix64; Steele, Lea, Flood, OOPSLA 2014) of seed, name of the draw, index of the sample in
its split, and element. What an attack draws for a sample is then the same whatever the batch size, the
device and the other samples still under attack.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eff.seeding import derive_seed

_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _signed(value: int) -> int:
    """Return 64 bits as the int64 that has them."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right without the sign, which int64's own shift would copy."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: Tensor) -> Tensor:
    for bits, factor in _MIX:
        x = (x ^ _shift(x, bits)) * _signed(factor)
    return x ^ _shift(x, 31)


class Draws:
    """Random numbers for the samples with these indices."""

    def __init__(self, seed: int, ids: Tensor):
        self.seed = seed
        self.ids = ids

    def take(self, chosen: Tensor) -> Draws:
        """Return the draws of some of the samples; `chosen` is a mask or indices."""
        return Draws(self.seed, self.ids[chosen])

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return numbers in [0, 1), (N, *shape) float32, that depend on seed, `name` and sample alone."""
        key = _signed(derive_seed(self.seed, name))
        count = math.prod(shape)
        step = torch.arange(1, count + 1, device=self.ids.device, dtype=torch.int64) * _signed(_GAMMA)
        sample = _mixed(self.ids.to(torch.int64) * _signed(_GAMMA) + key)
        bits = _mixed(sample[:, None] + step)
        return (_shift(bits, 40).to(torch.float32) / 2**24).view(-1, *shape)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return standard normal numbers, (N, *shape) float32 (Box and Muller)."""
        radius = (-2 * (1 - self.uniform(f"{name}/radius", shape)).log()).sqrt()
        return radius * (2 * math.pi * self.uniform(f"{name}/angle", shape)).cos()
