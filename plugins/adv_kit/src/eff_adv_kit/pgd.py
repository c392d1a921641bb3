"""Projected gradient ascent on one loss (Madry et al., ICLR 2018), and plain noise to compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eff_adv_kit.classifier import Classifier
from eff_adv_kit.hunt import Ascent, Hunt, ascend
from eff_adv_kit.losses import LOSSES
from eff_adv_kit.threat import Threat


@dataclass(frozen=True)
class PGD:
    """PGD with uniform starts and moves that fall as a quarter of a cosine, `step * cos(pi i / (2 steps))`.

    Args:
        loss: a key of `losses.LOSSES`.
        steps: gradients per start.
        restarts: random starts.
        step: first move; None: eps / 4, which is 2/255 at 8/255.
        clamp_start: cut the start to [0, 1].
    """

    loss: str = "ce"
    steps: int = 100
    restarts: int = 1
    step: float | None = None
    clamp_start: bool = True

    @property
    def name(self) -> str:
        """Return e.g. "pgd_ce"."""
        return f"pgd_{self.loss}"

    def ticks(self, classes: int) -> int:
        """Return the gradients per sample."""
        return self.steps * self.restarts

    def __call__(self, classifier: Classifier, threat: Threat, hunt: Hunt) -> None:
        """Attack the working batch."""
        loss, first = LOSSES[self.loss], threat.eps / 4 if self.step is None else self.step
        ascent = Ascent(
            self.steps,
            lambda i: lambda logits: loss(logits, hunt.y),
            lambda i: first * math.cos(i / self.steps * math.pi / 2),
        )
        for restart in range(self.restarts):
            if not hunt.done:
                start = threat.random_start(hunt.x, hunt.draws, f"{self.name}/{restart}", self.clamp_start)
                ascend(classifier, threat, hunt, start, ascent)


@dataclass(frozen=True)
class Noise:
    """Random images from the ball: what any attack must beat."""

    queries: int = 20
    name: str = "noise"

    def ticks(self, classes: int) -> int:
        """Return the queries per sample."""
        return self.queries

    def __call__(self, classifier: Classifier, threat: Threat, hunt: Hunt) -> None:
        """Attack the working batch."""
        for index in range(self.queries):
            if not hunt.done:
                x_adv = threat.random_start(hunt.x, hunt.draws, f"noise/{index}")
                hunt.settle(x_adv, classifier.query(x_adv))
