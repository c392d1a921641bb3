"""How often gradients change their direction, and which scales are frozen for it.

Jiang, Meng, Tang, Yu, Li, Wang, Zhu: Gradient-Adaptive Quantization-Aware Training for domain generalization, arXiv:2412.05551.
    disorder(A, B) = share of positions with different signs; of one sequence: with itself shifted by one step
    frozen = disorder of the last K task gradients < tau, decided anew every K steps
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eff_quant_gaqat.config import GAQATConfig


def disorder(a: Tensor, b: Tensor) -> Tensor:
    """Return the share of different signs along the last dimension of (..., n) and (..., n); 0 equals either sign."""
    return (a.sign() * b.sign() < 0).float().mean(-1)


class Tracker:
    """The task gradients of each scale in the current window, and which scales are frozen."""

    def __init__(self, names: list[str], config: GAQATConfig):
        self.names, self.config = names, config
        self.window: list[Tensor] = []
        self.frozen = torch.zeros(len(names), dtype=torch.bool)
        self.decided = False
        self.latest = torch.full((len(names),), torch.nan)
        """Disorder of the last full window."""
        self.steps = self.skipped = 0
        self.frozen_steps = torch.zeros(len(names), dtype=torch.int64)
        self.conflicts = torch.zeros(len(names), dtype=torch.int64)
        """Steps on which task and smooth gradient differed in sign."""
        self.history: list[list[float]] = []
        """Disorder of each scale at every decision."""
        self.frozen_history: list[list[bool]] = []

    def note(self, task: Tensor, smooth: Tensor | None, generator: torch.Generator) -> None:
        """Take the gradients of all scales (S,) of one step; decide where a window is full."""
        self.steps += 1
        self.frozen_steps += self.frozen
        if smooth is not None:
            self.conflicts += task.sign() * smooth.sign() < 0
        self.window.append(task.detach().cpu().float())
        if len(self.window) == self.config.window:
            self._decide(torch.stack(self.window, 1), generator)
            self.window = []

    def _decide(self, gradients: Tensor, generator: torch.Generator) -> None:
        self.latest = disorder(gradients[:, :-1], gradients[:, 1:])
        wanted = self.latest < self.config.tau
        policy = self.config.freeze_policy
        if policy == "never":
            wanted = torch.zeros_like(wanted)
        elif policy == "always_after_first" and self.decided:
            wanted = self.frozen
        elif policy == "random":
            order = torch.randperm(len(wanted), generator=generator)
            wanted = torch.zeros_like(wanted).index_fill_(0, order[: int(wanted.sum())], True)
        self.frozen, self.decided = wanted, True
        self.history.append(self.latest.tolist())
        self.frozen_history.append(self.frozen.tolist())

    def conflict_rate(self) -> float:
        """Return the share of scale-steps whose gradients differed in sign."""
        return float(self.conflicts.sum()) / max(1, self.steps * len(self.names))

    def frozen_share(self) -> float:
        """Return the share of scale-steps that were frozen."""
        return float(self.frozen_steps.sum()) / max(1, self.steps * len(self.names))

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        return {key: value for key, value in vars(self).items() if key not in ("names", "config")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        for key, value in state.items():
            setattr(self, key, value)
