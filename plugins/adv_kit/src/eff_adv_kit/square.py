"""Square attack: random search with square patches, no gradients (Andriushchenko et al., ECCV 2020, arXiv:1912.00049).

Each query changes one random square; the change stays where it raises the logit margin. The squares
shrink on a fixed schedule. Linf: the square gets one colour of x - eps or x + eps per channel. L2: the
norm of a second square moves into the first, shaped as two opposite bumps (eta).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from eff_adv_kit.classifier import Classifier
from eff_adv_kit.draws import Draws
from eff_adv_kit.hunt import Hunt
from eff_adv_kit.losses import logit_margin
from eff_adv_kit.threat import Threat, per_sample

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10000 queries
_TINY = 1e-10


def changed_share(query: int, queries: int, first: float) -> float:
    """Return the share of pixels that the square of this query covers."""
    at = int(query / queries * 10_000)
    return float(first / 2 ** sum(at > halving for halving in _HALVINGS))


def side(share: float, height: int, width: int, odd: bool) -> int:
    """Return the side of the square; odd and at least 3 where asked for and possible."""
    s = max(round((share * height * width) ** 0.5), 3 if odd else 1)
    s = min(s + (odd and s % 2 == 0), height, width)
    return s - 1 if odd and s % 2 == 0 and s > 1 else s


@lru_cache(maxsize=64)
def bump(rows: int, columns: int) -> Tensor:
    """Return the pyramid h of the paper, (rows, columns), of length 1: sums of 1 / k^2 rising to the middle."""
    distance = torch.maximum(
        (torch.arange(rows) - rows // 2).abs()[:, None], (torch.arange(columns) - columns // 2).abs()[None]
    )
    layers = max(rows, columns) // 2 + 1
    heights = (1.0 / torch.arange(1, layers + 1) ** 2).flip(0).cumsum(0).flip(0)
    height = heights[distance]
    return height / height.norm()


@lru_cache(maxsize=64)
def two_bumps(s: int) -> Tensor:
    """Return eta, (s, s) of length 1: a bump above one of opposite sign."""
    parts = [bump(s // 2, s)] if s > 1 else []
    eta = torch.cat([*parts, -bump(s - s // 2, s)])
    return eta / eta.norm()


def windows(draws: Draws, name: str, s: int, height: int, width: int) -> Tensor:
    """Return the flat pixel indices of one random s x s square per sample, (N, s * s)."""
    corner = draws.uniform(name, (2,))
    row = (corner[:, 0] * (height - s + 1)).long()
    column = (corner[:, 1] * (width - s + 1)).long()
    inside = torch.arange(s, device=corner.device)
    offsets = (inside[:, None] * width + inside).flatten()
    return (row * width + column)[:, None] + offsets


def _signs(draws: Draws, name: str, shape: tuple[int, ...]) -> Tensor:
    return (draws.uniform(name, shape) < 0.5).float() * 2 - 1


@dataclass(frozen=True)
class Square:
    """Square attack on the logit margin.

    Args:
        queries: forward passes per sample, the start included.
        first_share: share of pixels that the first squares cover (AutoAttack: 0.8).
    """

    queries: int = 5000
    first_share: float = 0.8
    name: str = "square"

    def ticks(self, classes: int) -> int:
        """Return the queries per sample."""
        return self.queries

    def __call__(self, classifier: Classifier, threat: Threat, hunt: Hunt) -> None:
        """Attack the working batch."""
        if hunt.done:
            return
        start, move = (stripes, move_linf) if threat.norm == "linf" else (tiles, move_l2)
        x_best = threat.project(start(threat, hunt.x, hunt.draws), hunt.x)
        best = torch.full((len(x_best),), -torch.inf, dtype=x_best.dtype, device=x_best.device)
        for query in range(self.queries):
            x_new = x_best if query == 0 else self._changed(move, threat, hunt, x_best, query)
            logits = classifier.query(x_new)
            value = logit_margin(logits, hunt.y)
            better = value > best
            x_best = torch.where(per_sample(better, x_new), x_new, x_best)
            best = torch.where(better, value, best)
            standing = hunt.settle(x_new, logits)
            x_best, best = x_best[standing], best[standing]
            if hunt.done:
                return

    def _changed(self, move: Move, threat: Threat, hunt: Hunt, x_best: Tensor, query: int) -> Tensor:
        height, width = x_best.shape[2:]
        s = side(changed_share(query, self.queries, self.first_share), height, width, odd=threat.norm == "l2")
        delta = move((x_best - hunt.x).flatten(2), threat, hunt.draws, f"square/{query}", (s, height, width))
        return threat.project(hunt.x + delta.view_as(x_best), hunt.x)


Move = Callable[[Tensor, Threat, Draws, str, tuple[int, int, int]], Tensor]
"""(perturbation (N, C, H * W), threat, draws, name, (side, H, W)) -> another perturbation."""


def stripes(threat: Threat, x: Tensor, draws: Draws) -> Tensor:
    """Return the start for Linf: columns of x - eps or x + eps."""
    return x + threat.eps * _signs(draws, "square/start", (x.shape[1], 1, x.shape[3])).to(x.dtype)


def move_linf(delta: Tensor, threat: Threat, draws: Draws, name: str, size: tuple[int, int, int]) -> Tensor:
    """Set one square to -eps or eps, a sign per channel."""
    window = windows(draws, f"{name}/window", *size)[:, None].expand(-1, delta.shape[1], -1)
    colour = threat.eps * _signs(draws, f"{name}/sign", (delta.shape[1], 1)).to(delta.dtype)
    return delta.scatter(2, window, colour.expand(-1, -1, window.shape[2]))


def tiles(threat: Threat, x: Tensor, draws: Draws) -> Tensor:
    """Return the start for L2: a 5 x 5 grid of bumps with random signs, of length eps."""
    channels, height, width = x.shape[1:]
    s = max(min(height, width) // 5, 1)
    rows, columns = height // s, width // s
    signs = _signs(draws, "square/start", (channels, rows, 1, columns, 1)).to(x)
    grid = (signs * two_bumps(s).to(x)[:, None, :]).reshape(len(x), channels, rows * s, columns * s)
    delta = torch.zeros_like(x)
    delta[:, :, : rows * s, : columns * s] = grid
    return x + threat.eps * threat.direction(delta)


def move_l2(delta: Tensor, threat: Threat, draws: Draws, name: str, size: tuple[int, int, int]) -> Tensor:
    """Empty a second square and give its length, and what was unused, to the first."""
    channels, s = delta.shape[1], size[0]
    first, second = (
        windows(draws, f"{name}/window{i}", *size)[:, None].expand(-1, channels, -1) for i in (1, 2)
    )  # fmt: skip
    old = delta.gather(2, first)
    length_first = old.norm(dim=2, keepdim=True)
    emptied = delta.scatter(2, first, 0.0).scatter(2, second, 0.0)
    length_both = (delta - emptied).norm(dim=2, keepdim=True)
    unused = (threat.eps**2 - delta.flatten(1).square().sum(1)).clamp(min=0)
    upright = two_bumps(s).to(delta)
    turned = draws.uniform(f"{name}/turned", (1,)) < 0.5
    eta = torch.where(turned, upright.T.flatten(), upright.flatten())[:, None]
    new = eta * _signs(draws, f"{name}/sign", (channels, 1)).to(delta.dtype) + old / (length_first + _TINY)
    length = (per_sample(unused, delta) / channels + length_both.square()).sqrt()
    changed = emptied.scatter(2, first, new / (new.norm(dim=2, keepdim=True) + _TINY) * length)
    return threat.eps * threat.direction(changed)
