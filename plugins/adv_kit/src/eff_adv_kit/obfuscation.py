"""Signs that a model hides its gradients instead of being robust (Athalye, Carlini, Wagner, ICML 2018, sec. 3.1).

On a few samples: gradients that are zero; logits that differ between two passes; random noise or a black-box
attack that breaks samples which gradients did not; a cross entropy that breaks far fewer than the margin;
a ball as large as the image in which gradients still break few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eff.data import Batch, Split
from eff.log import Log
from eff_adv_kit.classifier import Classifier
from eff_adv_kit.losses import cross_entropy
from eff_adv_kit.pgd import PGD, Noise
from eff_adv_kit.runner import Plan, run_sequence
from eff_adv_kit.square import Square
from eff_adv_kit.threat import Threat

PROBED = 100
STEPS = 20
QUERIES = 200
ZERO_SHARE = 0.05
"""Share of samples without a gradient from which on a model is flagged."""
LOST_SHARE = 0.05
"""Share of samples that the attack which should be weaker breaks in addition."""
UNBOUNDED_SHARE = 0.05
"""Share that may stand where the ball is as large as the image."""


class Part:
    """The samples of a split with these indices."""

    def __init__(self, split: Split, indices: Sequence[int]):
        self.split = split
        self.indices = list(indices)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.indices)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return samples of this part."""
        return self.split.batch([self.indices[index] for index in indices], generator)

    def fingerprint(self) -> str:
        """Return the whole split's hash with the size of the part."""
        return f"{self.split.fingerprint()}/{len(self)}"


@dataclass(frozen=True)
class Signs:
    """What was found on the probed samples; shares of those that are classified rightly."""

    samples: int
    zero_gradients: float
    randomised: bool
    noise_gains: float
    """Broken by noise, not by gradients."""
    black_box_gains: float
    """Broken by Square, not by gradients."""
    margin_gains: float
    """Broken with the logit margin, not with the cross entropy, minus the reverse."""
    standing_unbounded: float

    def warnings(self) -> list[str]:
        """Return what is suspicious, one sentence each."""
        found = {
            f"{100 * self.zero_gradients:.0f} % of the samples have no gradient": self.zero_gradients > ZERO_SHARE,
            "logits differ between two passes (a randomised model); average over passes with -o eot=20": self.randomised,
            f"random noise breaks {100 * self.noise_gains:.0f} % that gradients do not": self.noise_gains > LOST_SHARE,
            f"a black-box attack breaks {100 * self.black_box_gains:.0f} % that gradients do not":
                self.black_box_gains > LOST_SHARE,
            f"the margin breaks {100 * self.margin_gains:.0f} % more than the cross entropy, which saturates":
                self.margin_gains > LOST_SHARE,
            f"{100 * self.standing_unbounded:.0f} % stand even where every image is allowed":
                self.standing_unbounded > UNBOUNDED_SHARE,
        }  # fmt: skip
        return [text for text, holds in found.items() if holds]


def look_for_signs(
    classifier: Classifier, split: Split, threat: Threat, device: torch.device, log: Log, seed: int = 0
) -> Signs:
    """Probe the first `PROBED` samples of a split that the model classifies rightly."""
    right: list[int] = []
    zero, randomised = 0, False
    for start in range(0, len(split), PROBED):
        indices = np.arange(start, min(start + PROBED, len(split)))
        batch = split.batch(indices.tolist())
        x, y = batch["image"].to(device), batch["label"].to(device)
        logits, gradient = classifier.gradient(x, lambda z, y=y: cross_entropy(z, y))
        ok = (logits.argmax(1) == y).nonzero().flatten()[: PROBED - len(right)]
        randomised = randomised or not torch.equal(classifier.logits(x), classifier.logits(x))
        zero += int((gradient[ok].flatten(1).abs().amax(1) == 0).sum())
        right += indices[ok.cpu().numpy()].tolist()
        if len(right) >= PROBED:
            break
    if not right:
        return Signs(0, 0.0, randomised, 0.0, 0.0, 0.0, 0.0)
    part = Part(split, right)

    def standing(attack: object, ball: Threat = threat) -> np.ndarray:
        plan = Plan(ball, [attack], PROBED, seed)  # type: ignore[list-item]
        return np.asarray(run_sequence(classifier, part, plan, device, Log()).records.robust)

    step = threat.eps / 4
    ce, margin = (standing(PGD(loss, STEPS, step=step)) for loss in ("ce", "margin"))
    everything = Threat("linf", 1.0)
    return Signs(
        samples=len(right),
        zero_gradients=zero / len(right),
        randomised=randomised,
        noise_gains=float((ce & margin & ~standing(Noise(STEPS))).mean()),
        black_box_gains=float((ce & margin & ~standing(Square(QUERIES))).mean()),
        margin_gains=float(ce.mean() - margin.mean()),
        standing_unbounded=float(standing(PGD("margin", 4 * STEPS, step=0.1), everything).mean()),
    )
