"""Fixed-point formats and how they change: PushDown by histograms, PushUp by gradient diversity.

Kummer, Sidak, Reichmann, Gansterer: Adaptive Precision Training (AdaPT), arXiv:2107.13490.
    <WL, FL>: step 2^-FL, range [-2^(WL-FL-1), 2^(WL-FL-1) - step]
    quantize: q = floor(x / step + u), u ~ U[0, 1), clipped
    PushDown: the smallest FL, then the smallest WL, whose histogram has KL(p || p^) <= tol
    PushUp:   l = ln(n / ||sum of n unit gradients||) - shift;  s1 = ceil(1 / l^2), s2 = ceil(32 l^2) - FL
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eff_quant_adapt.config import LONGEST, AdaPTConfig

STRATEGIES = ("min", "mean", "max")
SMALLEST_SHARE = 1e-12
EXACT_IN_FLOAT32 = 22
"""Word length up to which float32 holds x / step + u with the bits that rounding needs."""


def codes_of(x: Tensor, wl: int, fl: int, noise: Tensor | float = 0.5) -> Tensor:
    """Return the integers of `x` in the format <wl, fl>: floor(x 2^fl + noise), clipped; in the dtype it computes in.

    `noise` of 0.5 rounds to nearest, uniform noise without bias.
    """
    wide = x if wl <= EXACT_IN_FLOAT32 else x.double()
    return (wide * 2.0**fl + noise).floor().clamp(-(2.0 ** (wl - 1)), 2.0 ** (wl - 1) - 1)


def quantize(x: Tensor, wl: int, fl: int, stochastic: bool = True) -> Tensor:
    """Return `x` (any shape) in the format <wl, fl>, in its own dtype; random numbers are torch's."""
    noise = torch.rand_like(x) if stochastic else 0.5
    return (codes_of(x, wl, fl, noise) * 2.0**-fl).to(x.dtype)


def divergence(w: Tensor, quantized: Tensor, bins: int) -> float:
    """Return KL(p || p^), nats, of the histograms of `w` and of it quantized, both over the range of `w`."""
    low, high = float(w.min()), float(w.max())
    p = torch.histc(w.float(), bins, low, high).double() / w.numel()
    other = torch.histc(quantized.float().clamp(low, high), bins, low, high).double() / w.numel()
    some = p > 0
    return float((p[some] * (p[some] / (other[some] + SMALLEST_SHARE)).log()).sum())


def smallest_lossless(low: int, high: int, lossy: Callable[[int], bool]) -> int:
    """Return by bisection the smallest value in [low, high] that is not lossy; `high` where that is lossy itself."""
    if high <= low or lossy(high):
        return max(low, high)
    if not lossy(low):
        return low
    while high - low > 1:
        middle = -(-(high + low) // 2)
        if lossy(middle):
            low = middle
        else:
            high = middle
    return high


def push_down(w: Tensor, wl: int, fl: int, bins: int, config: AdaPTConfig) -> tuple[int, int]:
    """Return the smallest word and fraction length whose quantized weights have the histogram of `w`."""
    if float(w.min()) == float(w.max()):
        return config.fl_floor + 1, config.fl_floor

    def lossy(word: int, fraction: int) -> bool:
        draws = 3 if config.kl_rounding == "stochastic" else 1
        found = [divergence(w, quantize(w, word, fraction, draws > 1), bins) for _ in range(draws)]
        return sum(found) / draws > config.kl_tol

    fraction = smallest_lossless(min(config.fl_floor, fl), fl, lambda value: lossy(wl, value))
    word = smallest_lossless(min(fraction + 1, wl), wl, lambda value: lossy(value, fraction))
    return word, fraction


def push_up(wl: int, fl: int, diversity: float, strategy: str, config: AdaPTConfig) -> tuple[int, int]:
    """Return word and fraction length with the bits that gradient diversity asks for, and the buffer bits."""
    added = 1
    if config.push_up and 0 < diversity < math.inf:
        length = math.log(diversity) - config.log_shift
        if length > 0:
            few = max(math.ceil(min(1 / length**2, LONGEST)), 1)
            many = max(min(math.ceil(LONGEST * length**2), LONGEST) - fl, 0)
            added = {"min": min(few, many), "mean": -(-(few + many) // 2), "max": max(few, many)}[strategy]
    if config.push_up:
        fraction = min(fl + added, LONGEST)
        word = min(max(wl, fraction) + 1, LONGEST)
    else:
        word, fraction = max(wl, fl + 1), fl
        return min(word, LONGEST), fraction
    fraction = min(fraction, LONGEST - config.buffer_bits)
    return max(min(fraction + config.buffer_bits, LONGEST), word), fraction


@dataclass
class State:
    """What a weight remembers between steps."""

    wl: int
    fl: int
    lookback: int
    bins: int
    count: int = 0
    """Gradients collected since the last switch."""
    total: Tensor | None = None
    """Their sum, each of norm 1."""

    def diversity(self) -> float:
        """Return n / ||sum of unit gradients||, in [1, inf]; inf where they cancel or there are none."""
        norm = float(self.total.norm()) if self.total is not None else 0.0
        return self.count / norm if norm > 0 else math.inf

    def collect(self, gradient: Tensor) -> None:
        """Add a gradient; one of norm 0 counts and adds nothing."""
        norm = gradient.norm()
        unit = gradient / norm if float(norm) > 0 else gradient
        self.total = unit.clone() if self.total is None else self.total + unit
        self.count += 1

    def adjust(self, config: AdaPTConfig) -> None:
        """Move lookback and resolution by the diversity so far."""
        wanted = math.ceil(min(max(config.lb_max / self.diversity(), config.lb_min), config.lb_max))
        self.lookback = math.ceil(config.gamma * wanted + (1 - config.gamma) * self.lookback)
        if self.lookback == config.lb_max:
            self.bins = min(max(self.bins + 1, config.res_min), config.res_max)
        if self.lookback == config.lb_min:
            self.bins = min(max(self.bins - 1, config.res_min), config.res_max)

    def switch(self, w: Tensor, strategy: str, config: AdaPTConfig) -> bool:
        """Choose a new format for the master weight where enough gradients are there; return whether."""
        if self.count < self.lookback:
            return False
        word, fraction = push_down(w, self.wl, self.fl, self.bins, config)
        self.wl, self.fl = push_up(word, fraction, self.diversity(), strategy, config)
        self.count, self.total = 0, None
        return True


def next_strategy(strategy: str, losses: list[float], loss: float) -> str:
    """Return the push-up strategy of the next step: one further where |mean of the last losses| <= |loss|, else min."""
    if losses and abs(sum(losses) / len(losses)) <= abs(loss):
        return STRATEGIES[min(STRATEGIES.index(strategy) + 1, len(STRATEGIES) - 1)]
    return "min"
