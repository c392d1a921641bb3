"""Signs that a model only looks robust, because its gradients mislead (Athalye, Carlini, Wagner, ICML 2018).

Each is measured on some correctly classified samples:

    random          logits of two passes over the same images differ
    zero_ce         the gradient of the cross entropy is 0: confidence saturates float32
    zero_margin     that of the logit margin is 0: something in the model cannot be differentiated
    margin_beats_ce PGD on the logit margin breaks many that PGD on the cross entropy leaves
    black_box       Square, without gradients, breaks many that PGD on the margin leaves
    larger_eps      twice the budget breaks fewer
    unbounded       a budget that allows every image leaves some standing

None proves anything by itself; each asks for another attack before the figure is believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from eff.data import Batch, Split, move_batch
from eff.log import Log
from eff_adv_kit.classifier import Classifier, Objective
from eff_adv_kit.hunt import Attack
from eff_adv_kit.losses import cross_entropy, logit_margin
from eff_adv_kit.pgd import PGD
from eff_adv_kit.runner import Array, Plan, run_sequence
from eff_adv_kit.square import Square

STEPS = 20
QUERIES = 100


@dataclass(frozen=True)
class Finding:
    """One sign: what was measured, from where on it is one, and what to do then."""

    name: str
    value: float
    limit: float
    unit: str
    advice: str

    @property
    def flagged(self) -> bool:
        """Whether the sign is there."""
        return self.value > self.limit


class Subset:
    """Some samples of a split."""

    def __init__(self, split: Split, indices: Sequence[int]):
        self.split = split
        self.indices = list(indices)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.indices)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return samples by their index in the subset."""
        return self.split.batch([self.indices[index] for index in indices], generator)

    def fingerprint(self) -> str:
        """Return the hash of the whole split with the number of samples."""
        return f"{self.split.fingerprint()}/{len(self)}"


def find_signs(classifier: Classifier, split: Split, plan: Plan, chosen: Array, device: torch.device) -> list[Finding]:
    """Look for the signs on the samples `chosen` (indices of correctly classified ones); empty for none."""
    if not len(chosen):
        return []
    subset = Subset(split, chosen.tolist())
    batch = move_batch(subset.batch(range(min(len(subset), plan.batch_size))), device)
    x, y = batch["image"], batch["label"]
    if plan.own_labels:
        y = classifier.logits(x).argmax(1)
    found = [
        Finding(
            "random", random_share(classifier, x), 1e-4, "",
            "two passes over the same images give different logits; set eot to 10 or more, so that gradients are "
            "averaged over the randomness",
        ),
        Finding(
            "zero_ce", zero_share(classifier, x, lambda z: cross_entropy(z, y)), 5.0, "% of samples",
            "the cross entropy has no gradient, confidence saturates float32, and the probability margin suffers "
            "too; attack the logits: loss=margin",
        ),
        Finding(
            "zero_margin", zero_share(classifier, x, lambda z: logit_margin(z, y)), 5.0, "% of samples",
            "the logits have no gradient in the image; something in the model rounds, cuts or cannot be "
            "differentiated: give it a straight-through gradient, or trust black-box attacks only (sequence=square)",
        ),
    ]  # fmt: skip
    return found + _compared(classifier, subset, plan, x, device)


def random_share(classifier: Classifier, x: Tensor) -> float:
    """Return the largest difference of logits between two passes, relative to the largest logit."""
    first, second = classifier.logits(x), classifier.logits(x)
    return float((first - second).abs().max() / first.abs().max().clamp(min=1e-12))


def zero_share(classifier: Classifier, x: Tensor, objective: Objective) -> float:
    """Return the share of samples whose gradient is 0 in every pixel, in %."""
    _, gradient = classifier.gradient(x, objective)
    return 100 * float((gradient.flatten(1).abs().amax(1) == 0).float().mean())


def _compared(classifier: Classifier, subset: Subset, plan: Plan, x: Tensor, device: torch.device) -> list[Finding]:
    def accuracy(attack: Attack, eps: float | None = None) -> float:
        threat = plan.threat if eps is None else replace(plan.threat, eps=eps)
        short = replace(plan, threat=threat, attacks=(attack,), keep=0)
        return run_sequence(classifier, subset, short, device, Log()).last.robust_accuracy

    everything = 1.0 if plan.threat.norm == "linf" else float(np.sqrt(x[0].numel()))
    cross, margin = accuracy(PGD("ce", STEPS)), accuracy(PGD("margin", STEPS))
    double = accuracy(PGD("margin", STEPS), min(2 * plan.threat.eps, everything))
    unbounded, square = accuracy(PGD("margin", STEPS), everything), accuracy(Square(QUERIES))
    return [
        Finding(
            "margin_beats_ce", cross - margin, 10.0, "points",
            "PGD on the logit margin is far stronger than on the cross entropy, whose gradient is masked; do not "
            "believe attacks on the cross entropy",
        ),
        Finding(
            "black_box", margin - square, 5.0, "points",
            "an attack without gradients is stronger than one with them; gradients are masked: add square to the "
            "sequence and look for what blocks them",
        ),
        Finding(
            "larger_eps", double - margin, 2.0, "points",
            "a larger eps breaks fewer samples; the attack does not follow the model's gradient",
        ),
        Finding(
            "unbounded", unbounded, 5.0, "% standing",
            "samples withstand a budget that allows every image; the attack fails for another reason than robustness",
        ),
    ]  # fmt: skip
