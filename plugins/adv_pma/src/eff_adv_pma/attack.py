"""The probability margin attack (Xie, Zheng, Huang, Ye, Ma, CVPR 2025, arXiv:2411.15210).

With p = softmax(f(x')), y the label and j the strongest other class, each of R restarts makes two searches of K
gradients from a random start, r = 0 and r = 1, which differ in what they raise:

    i = 0           p_y              a small kick in the wrong direction
    0 < i < K/2     -p_y (r = 0), p_j (r = 1)
    K/2 <= i        p_j - p_y        the probability margin

    x' <- clip(x' + alpha_i sign(grad)),    alpha_i = eps (1 + cos(pi (i' - 1) / (K - K/2)))

with i' = i up to K/2 and i - K/2 after it: the move falls from 2 eps to 0 in each half. A sample leaves at its first
misclassified iterate. With logits in the place of probabilities this is the margin decomposition attack MD (Ma et al.,
arXiv:2003.02460), on which the schedule stands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from eff_adv_kit.classifier import Classifier, Objective
from eff_adv_kit.hunt import Ascent, Hunt, ascend
from eff_adv_kit.losses import LOSSES, of_class, runner_up
from eff_adv_kit.threat import Threat


def half(steps: int) -> int:
    """Return K', the step from which the whole margin is raised."""
    return steps // 2


def move(i: int, steps: int, eps: float, odi: bool = False) -> float:
    """Return alpha_i; `odi`: the first two moves have size eps."""
    if odi and i < 2:
        return eps
    since = i - half(steps) if i > half(steps) else i
    return eps * (1 + math.cos(math.pi * (since - 1) / (steps - half(steps))))


def part_of_margin(loss: str, search: int, i: int, steps: int, logits: Tensor, y: Tensor) -> Tensor:
    """Return what search 0 or 1 raises at step `i`, (N,).

    Args:
        loss: "pm" (probabilities) or "margin" (logits).
        search: r.
        i: the step.
        steps: K.
        logits: (N, K).
        y: labels (N,).
    """
    if i >= half(steps):
        return LOSSES[loss](logits, y)
    values = logits.softmax(1) if loss == "pm" else logits
    if i == 0:
        return of_class(values, y)
    return -of_class(values, y) if search == 0 else of_class(values, runner_up(logits, y))


@dataclass(frozen=True)
class MarginAttack:
    """PMA, and MD with `loss="margin"`; with `decomposed=False` the whole loss at every step.

    Args:
        loss: a key of `eff_adv_kit.losses.LOSSES`; decomposed: "pm" or "margin".
        steps: gradients of each of the two searches.
        restarts: pairs of searches.
        decomposed: the schedule above.
        odi: see `move`.
        clamp_start: cut random starts to [0, 1].
        name: what reports call it.
    """

    loss: str = "pm"
    steps: int = 100
    restarts: int = 1
    decomposed: bool = True
    odi: bool = False
    clamp_start: bool = True
    name: str = "pma"

    def ticks(self, classes: int) -> int:
        """Return the gradients per sample."""
        return 2 * self.steps * self.restarts

    def __call__(self, classifier: Classifier, threat: Threat, hunt: Hunt) -> None:
        """Attack the working batch."""
        for restart in range(self.restarts):
            for search in (0, 1):
                if hunt.done:
                    return
                place = f"{self.name}/{restart}/{search}"
                start = threat.random_start(hunt.x, hunt.draws, place, self.clamp_start)
                ascend(classifier, threat, hunt, start, self._ascent(search, threat.eps, hunt))

    def _ascent(self, search: int, eps: float, hunt: Hunt) -> Ascent:
        def objective(i: int) -> Objective:
            if not self.decomposed:
                return lambda logits: LOSSES[self.loss](logits, hunt.y)
            return lambda logits: part_of_margin(self.loss, search, i, self.steps, logits, hunt.y)

        return Ascent(self.steps, objective, lambda i: move(i, self.steps, eps, self.odi))
