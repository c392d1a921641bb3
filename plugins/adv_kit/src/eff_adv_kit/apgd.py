"""APGD and APGD-T: gradient ascent that chooses its own step sizes (Croce and Hein, ICML 2020, arXiv:2003.01690).

    z_{k+1} = P(x_k + alpha_k d(grad))
    x_{k+1} = P(x_k + a (z_{k+1} - x_k) + (1 - a) (x_k - x_{k-1})),    a = 0.75, 1 in the first step

alpha starts at 2 eps. At each checkpoint it is halved, and the search goes back to its best point, where fewer than
75 % of the steps since the last one raised the loss, or where neither alpha nor the best loss changed there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eff_adv_kit.classifier import Classifier, Objective
from eff_adv_kit.hunt import Hunt
from eff_adv_kit.losses import LOSSES, TARGETED_LOSSES
from eff_adv_kit.threat import Threat, per_sample

MOMENTUM = 0.75
ENOUGH = 0.75  # rho: share of steps that must raise the loss


def checkpoints(steps: int) -> list[int]:
    """Return the steps after which the step size is judged; for 100: 22, 41, 57, 70, 80, 87, 93, 99."""
    window, shrink, smallest = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    found, at = [], window
    while at <= steps:
        found.append(at)
        window = max(window - shrink, smallest)
        at += window
    return found


@dataclass
class _State:
    """What APGD remembers of each standing sample."""

    x: Tensor
    x_before: Tensor
    gradient: Tensor
    x_best: Tensor
    gradient_best: Tensor
    value: Tensor
    best: Tensor
    best_at_check: Tensor
    alpha: Tensor
    raised: Tensor
    """Steps since the last checkpoint that raised the loss."""
    halved: Tensor
    """Whether alpha was halved at the last checkpoint."""

    def take(self, standing: Tensor) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value[standing])

    def judge(self, window: int) -> None:
        """Halve alpha and go back to the best point where the last `window` steps were no good."""
        halve = (self.raised < ENOUGH * window) | (~self.halved & (self.best_at_check >= self.best))
        self.alpha = torch.where(halve, self.alpha / 2, self.alpha)
        back = per_sample(halve, self.x)
        self.x = torch.where(back, self.x_best, self.x)
        self.gradient = torch.where(back, self.gradient_best, self.gradient)
        self.halved, self.best_at_check = halve, self.best.clone()
        self.raised = torch.zeros_like(self.raised)


def ascend_adaptively(
    classifier: Classifier, threat: Threat, hunt: Hunt, start: Tensor, steps: int, objective: Objective
) -> None:
    """Run APGD from `start`: `steps` gradients and one forward pass; every iterate is checked."""
    logits, gradient = classifier.gradient(start, objective)
    value = objective(logits)
    none = torch.zeros_like(value)
    state = _State(
        start, start, gradient, start, gradient, value, value, value, none + 2 * threat.eps, none, none.bool()
    )
    state.take(hunt.settle(start, logits))
    checks, last_check = set(checkpoints(steps)), 0
    for i in range(steps):
        if hunt.done:
            return
        z = threat.project(state.x + per_sample(state.alpha, state.x) * threat.direction(state.gradient), hunt.x)
        a = MOMENTUM if i else 1.0
        x = threat.project(state.x + a * (z - state.x) + (1 - a) * (state.x - state.x_before), hunt.x)
        if i == steps - 1:
            hunt.settle(x, classifier.logits(x))
            return
        logits, gradient = classifier.gradient(x, objective)
        value = objective(logits)
        state.raised = state.raised + (value > state.value)
        better = value > state.best
        state.x_best = torch.where(per_sample(better, x), x, state.x_best)
        state.gradient_best = torch.where(per_sample(better, x), gradient, state.gradient_best)
        state.best = torch.where(better, value, state.best)
        state.x, state.x_before, state.gradient, state.value = x, state.x, gradient, value
        state.take(hunt.settle(x, logits))
        if i + 1 in checks:
            state.judge(i + 1 - last_check)
            last_check = i + 1


@dataclass(frozen=True)
class APGD:
    """APGD on one loss."""

    loss: str = "ce"
    steps: int = 100
    restarts: int = 1

    @property
    def name(self) -> str:
        """Return e.g. "apgd_ce"."""
        return f"apgd_{self.loss}"

    def ticks(self, classes: int) -> int:
        """Return the gradients per sample."""
        return self.steps * self.restarts

    def __call__(self, classifier: Classifier, threat: Threat, hunt: Hunt) -> None:
        """Attack the working batch."""
        loss = LOSSES[self.loss]
        for restart in range(self.restarts):
            if not hunt.done:
                start = threat.random_start(hunt.x, hunt.draws, f"{self.name}/{restart}")
                ascend_adaptively(classifier, threat, hunt, start, self.steps, lambda z: loss(z, hunt.y))


@dataclass(frozen=True)
class TargetedAPGD:
    """APGD towards the likeliest other classes of the clean image, one after the other."""

    loss: str = "dlr"
    steps: int = 100
    targets: int = 9
    name: str = "apgd_t"

    def ticks(self, classes: int) -> int:
        """Return the gradients per sample."""
        return self.steps * min(self.targets, classes - 1)

    def __call__(self, classifier: Classifier, threat: Threat, hunt: Hunt) -> None:
        """Attack the working batch."""
        loss = TARGETED_LOSSES[self.loss]

        def towards(rank: int, target: Callable[[], Tensor]) -> None:
            start = threat.random_start(hunt.x, hunt.draws, f"{self.name}/{rank}")
            ascend_adaptively(classifier, threat, hunt, start, self.steps, lambda z: loss(z, hunt.y, target()))

        for_each_target(classifier, hunt, self.targets, towards)


def for_each_target(
    classifier: Classifier, hunt: Hunt, targets: int, attack: Callable[[int, Callable[[], Tensor]], None]
) -> None:
    """Call `attack(rank, target)` for the likeliest classes other than the label, most likely first.

    `target()` gives the target classes (n,) of the working batch as it is at that moment.
    """
    if hunt.done:
        return
    logits = classifier.logits(hunt.x).scatter(1, hunt.y[:, None], -torch.inf)
    order, first = logits.argsort(dim=1, descending=True, stable=True), hunt.left
    position = torch.zeros(len(hunt.all_x), dtype=torch.long, device=first.device)
    position[first] = torch.arange(len(first), device=first.device)
    for rank in range(min(targets, logits.shape[1] - 1)):
        if not hunt.done:
            attack(rank, lambda rank=rank: order[position[hunt.left], rank])  # type: ignore[misc]
