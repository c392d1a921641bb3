"""PMA: margin decomposition with probabilities (Xie et al., CVPR 2025, arXiv:2411.15210).

Two runs r of K steps from a uniform start, K' = K / 2, every sample leaving when it is misclassified:

    i = 0          raise p_y                     a small kick
    0 < i < K'     r = 0: lower p_y, r = 1: raise p_j
    i >= K'        raise p_j - p_y
    moves          eps (1 + cos(pi (i - 1) / (K - K'))),  and i - K' - 1 in the place of i - 1 after K'

With logits in the place of probabilities it is the MD attack (Ma et al., Machine Learning 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from eff_adv_kit.classifier import Classifier, Objective
from eff_adv_kit.hunt import Ascent, Hunt, ascend
from eff_adv_kit.losses import of_class, runner_up
from eff_adv_kit.threat import Threat

Term = Callable[[Tensor, Tensor], Tensor]
RUNS = 2


@dataclass(frozen=True)
class PMA:
    """The decomposed attack.

    Args:
        of: "pm": probabilities; "margin": logits (MD).
        steps: K, of each of the two runs of a restart.
        restarts: R; at most 2 R K gradients.
        odi: the first two moves are eps.
        clamp_start: cut starts to [0, 1].
    """

    of: Literal["pm", "margin"] = "pm"
    steps: int = 100
    restarts: int = 1
    odi: bool = False
    clamp_start: bool = True

    @property
    def name(self) -> str:
        """Return "pma" or "md"."""
        return "pma" if self.of == "pm" else "md"

    def ticks(self, classes: int) -> int:
        """Return the gradients per sample."""
        return RUNS * self.steps * self.restarts

    def __call__(self, classifier: Classifier, threat: Threat, hunt: Hunt) -> None:
        """Attack the working batch."""
        for restart in range(self.restarts):
            for run in range(RUNS):
                if hunt.done:
                    return
                start = threat.random_start(hunt.x, hunt.draws, f"{self.name}/{restart}/{run}", self.clamp_start)
                ascent = Ascent(
                    self.steps,
                    lambda i, run=run: self.objective(i, run, hunt),  # type: ignore[misc]
                    lambda i: self.move(i, threat.eps),
                )
                ascend(classifier, threat, hunt, start, ascent)

    def objective(self, i: int, run: int, hunt: Hunt) -> Objective:
        """Return what step `i` of run 0 or 1 raises."""

        def value(logits: Tensor) -> Tensor:
            scores = logits.softmax(1) if self.of == "pm" else logits
            own = of_class(scores, hunt.y)
            if i == 0:
                return own
            if i < self.steps // 2 and run == 0:
                return -own
            other = of_class(scores, runner_up(logits, hunt.y))
            return other if i < self.steps // 2 else other - own

        return value

    def move(self, i: int, eps: float) -> float:
        """Return the length of step `i`: from 2 eps to about 0 in each half."""
        if self.odi and i < 2:
            return eps
        half = self.steps // 2
        passed = i - half - 1 if i > half else i - 1
        return eps * (1 + math.cos(math.pi * passed / (self.steps - half)))
