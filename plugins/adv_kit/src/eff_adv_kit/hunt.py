"""The samples of one batch under attack: who still stands, and what broke the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from eff_adv_kit.classifier import Classifier, Objective
from eff_adv_kit.draws import Draws
from eff_adv_kit.threat import Threat


class Hunt:
    """Keeps the first adversarial image of each sample and takes the sample out of the working batch.

    Args:
        x: clean images (N, C, H, W).
        y: labels (N,).
        draws: random numbers of these samples.
    """

    def __init__(self, x: Tensor, y: Tensor, draws: Draws):
        self.all_x = x
        self.found = x.clone()
        """Adversarial images; the clean one where none was found."""
        self.left = torch.arange(len(x), device=x.device)
        """Which samples make the working batch; always one-dimensional, also for a single survivor."""
        self.x, self.y, self.draws = x, y, draws

    @property
    def done(self) -> bool:
        """Whether nobody stands."""
        return len(self.left) == 0

    def settle(self, x_adv: Tensor, logits: Tensor) -> Tensor:
        """Store the images that are misclassified; return the mask (n,) of the samples that still stand."""
        return self.drop(x_adv, logits.argmax(1) != self.y)

    def drop(self, x_adv: Tensor, broken: Tensor) -> Tensor:
        """Store `x_adv` where `broken` (n,) and go on with the others; return their mask."""
        self.found[self.left[broken]] = x_adv[broken]
        standing = ~broken
        self.left = self.left[standing]
        self.x, self.y, self.draws = self.x[standing], self.y[standing], self.draws.take(standing)
        return standing


class Attack(Protocol):
    """One attack; a sample that it breaks ends as its first adversarial image in `hunt.found`."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    def ticks(self, classes: int) -> int:
        """Return how many gradients or queries it takes at most per sample, for progress."""
        ...

    def __call__(self, classifier: Classifier, threat: Threat, hunt: Hunt) -> None:
        """Attack the working batch of `hunt`."""
        ...


@dataclass(frozen=True)
class Ascent:
    """Which way and how far a gradient attack goes at its steps 0, 1, ..."""

    steps: int
    objective: Callable[[int], Objective]
    """Step -> what to raise; called with the logits of the working batch."""
    size: Callable[[int], float]
    """Step -> size of the move, in the unit of the norm."""


def ascend(classifier: Classifier, threat: Threat, hunt: Hunt, start: Tensor, ascent: Ascent) -> None:
    """Move from `start` along gradients; every iterate is checked, the last one too.

    Uses `ascent.steps` gradients and one forward pass. An iterate outside the threat model, which only the
    start can be, is not counted as a success.
    """
    x_adv = start
    for i in range(ascent.steps):
        logits, gradient = classifier.gradient(x_adv, ascent.objective(i))
        allowed = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
        standing = hunt.drop(x_adv, (logits.argmax(1) != hunt.y) & allowed)
        if hunt.done:
            return
        move = ascent.size(i) * threat.direction(gradient[standing])
        x_adv = threat.project(x_adv[standing] + move, hunt.x)
    hunt.settle(x_adv, classifier.logits(x_adv))
