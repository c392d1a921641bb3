"""A sequence of attacks on a split, each on the survivors of those before: the worst case per sample.

Images are streamed in batches and read again for each attack; of a sample only a few numbers are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eff.data import Batch, Split, move_batch
from eff.errors import DataError
from eff.log import Advance, Log
from eff_adv_kit.classifier import Classifier, check_classes, check_images, check_labels, looks_like_probabilities
from eff_adv_kit.draws import Draws
from eff_adv_kit.hunt import Attack, Hunt
from eff_adv_kit.interval import wilson
from eff_adv_kit.losses import logit_margin
from eff_adv_kit.threat import Threat

Array = NDArray[Any]
CLEAN = -2
"""`Records.broken_by` of a sample that was misclassified before any attack; it counts as not robust."""
STANDING = -1
"""`Records.broken_by` of a sample that no attack broke."""
_SLACK = 1e-5  # rounding of x + delta - x in float32, relative to eps


@dataclass
class Records:
    """What is kept of each sample, in the order of the split; arrays (N,)."""

    label: Array
    prediction: Array
    """Of the clean image."""
    margin: Array
    """z_y minus the best other logit of the clean image; below 0 where it is misclassified."""
    broken_by: Array
    """Index of the attack, `STANDING` or `CLEAN`."""
    adversarial_prediction: Array
    """Of the adversarial image where there is one, else as clean."""
    adversarial_margin: Array
    distance: Array
    """Size of the perturbation that broke it, in the threat's norm; else 0."""

    @classmethod
    def of(cls, samples: int) -> Records:
        """Return empty records."""
        integers = [np.zeros(samples, np.int64) for _ in range(2)]
        return cls(
            *integers, np.zeros(samples, np.float32), np.full(samples, STANDING, np.int64),
            np.zeros(samples, np.int64), np.zeros(samples, np.float32), np.zeros(samples, np.float32),
        )  # fmt: skip

    @property
    def clean_ok(self) -> Array:
        """Whether the clean image is classified rightly."""
        return np.asarray(self.broken_by != CLEAN)

    @property
    def robust(self) -> Array:
        """Whether it still is under all attacks."""
        return np.asarray(self.broken_by == STANDING)


@dataclass(frozen=True)
class Stage:
    """What one attack did."""

    name: str
    attacked: int
    broken: int
    standing: int
    samples: int
    gradients: int
    """Images passed backward."""
    forwards: int
    seconds: float

    @property
    def robust_accuracy(self) -> float:
        """Share of all samples that stand after this attack, in %."""
        return 100 * self.standing / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of it, in %."""
        low, high = wilson(self.standing, self.samples)
        return 100 * low, 100 * high


@dataclass
class Examples:
    """The adversarial images that were kept, at most `limit`."""

    limit: int = 0
    index: list[int] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)

    def add(self, index: Tensor, images: Tensor) -> None:
        """Keep what there is room for."""
        room = max(0, self.limit - len(self.index))
        self.index += index[:room].tolist()
        self.images += list(images[:room].cpu())


@dataclass
class Outcome:
    """The result of a sequence."""

    records: Records
    clean: Stage
    stages: list[Stage]
    examples: Examples

    @property
    def last(self) -> Stage:
        """The state after all attacks."""
        return self.stages[-1] if self.stages else self.clean


@dataclass(frozen=True)
class Plan:
    """How a split is attacked."""

    threat: Threat
    attacks: Sequence[Attack]
    batch_size: int = 256
    seed: int = 0
    keep: int = 0
    """Adversarial images to keep."""
    own_labels: bool = False
    """Take what the model says of the clean image as its label, for images without labels."""


def run_sequence(classifier: Classifier, split: Split, plan: Plan, device: torch.device, log: Log) -> Outcome:
    """Attack the samples of `split`.

    Raises:
        DataError: no samples, images outside [0, 1], labels without an output.
        UnsupportedModelError: fewer than 2 outputs.
        RunError: the model gives NaN.
    """
    if not len(split):
        raise DataError("no samples to attack; the test split is empty")
    going = _SequenceRun(classifier, split, plan, device, log)
    clean = going.clean()
    stages = [going.attack(number, attack) for number, attack in enumerate(plan.attacks)]
    return Outcome(going.records, clean, stages, going.examples)


class _SequenceRun:
    """The state of one sequence while it goes on."""

    def __init__(self, classifier: Classifier, split: Split, plan: Plan, device: torch.device, log: Log):
        self.classifier, self.split, self.plan, self.device, self.log = classifier, split, plan, device, log
        self.records = Records.of(len(split))
        self.examples = Examples(plan.keep)
        self.classes = 0

    def _read(self, indices: Array) -> Batch:
        return move_batch(self.split.batch(indices.tolist()), self.device)

    def _batches(self, indices: Array) -> list[Array]:
        size = self.plan.batch_size
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def _stage(self, name: str, attacked: int, work: Callable[[], None]) -> Stage:
        """Do `work` and say what changed."""
        model, records = self.classifier, self.records
        before, gradients, forwards = int(records.robust.sum()), model.gradients, model.forwards
        started = time.monotonic()
        work()
        standing = int(records.robust.sum())
        return Stage(
            name, attacked, before - standing, standing, len(self.split), model.gradients - gradients,
            model.forwards - forwards, time.monotonic() - started,
        )  # fmt: skip

    def clean(self) -> Stage:
        """Classify the clean images; check them."""
        batches = self._batches(np.arange(len(self.split)))

        def work() -> None:
            probabilities = True
            for indices in self.log.track(batches, "clean"):
                batch, first = self._read(indices), int(indices[0])
                check_images(batch["image"], first)
                logits = self.classifier.logits(batch["image"])
                self.classes = logits.shape[1]
                check_classes(self.classes)
                y = logits.argmax(1) if self.plan.own_labels else batch["label"]
                check_labels(y, self.classes, first)
                probabilities = probabilities and looks_like_probabilities(logits)
                self._note_clean(indices, y, logits)
            if probabilities:
                self.log.warn(
                    "the model returns probabilities (rows sum to 1), attacks expect logits: softmax is taken twice "
                    "and gradients shrink; remove the softmax from the model"
                )

        return self._stage("clean", len(self.split), work)

    def _note_clean(self, indices: Array, y: Tensor, logits: Tensor) -> None:
        records, prediction = self.records, logits.argmax(1)
        margin = -logit_margin(logits, y)
        records.label[indices] = y.cpu().numpy()
        records.prediction[indices] = records.adversarial_prediction[indices] = prediction.cpu().numpy()
        records.margin[indices] = records.adversarial_margin[indices] = margin.cpu().numpy()
        records.broken_by[indices] = np.where((prediction == y).cpu().numpy(), STANDING, CLEAN)

    def attack(self, number: int, attack: Attack) -> Stage:
        """Attack the survivors."""
        survivors = np.flatnonzero(self.records.robust)
        batches = self._batches(survivors)
        ticks = attack.ticks(self.classes)

        def work() -> None:
            with self.log.progress(f"attack {attack.name}", len(batches) * ticks) as advance:
                for indices in batches:
                    used = self._attack_batch(number, attack, indices, advance)
                    advance(max(0, ticks - used), note=self._note())  # what was saved as samples dropped out

        return self._stage(attack.name, len(survivors), work)

    def _note(self) -> str:
        return f"{100 * self.records.robust.mean():.1f} % robust"

    def _attack_batch(self, number: int, attack: Attack, indices: Array, advance: Advance) -> int:
        """Attack one batch of survivors; return the steps it took."""
        used, note = 0, self._note()

        def tick() -> None:
            nonlocal used
            used += 1
            advance(1, note=note)

        x = self._read(indices)["image"]
        y = torch.as_tensor(self.records.label[indices], device=self.device)
        draws = Draws(self.plan.seed, torch.as_tensor(indices, device=self.device))
        hunt = Hunt(x, y, draws)
        self.classifier.tick = tick
        try:
            attack(self.classifier, self.plan.threat, hunt)
        finally:
            self.classifier.tick = lambda: None
        self._keep(number, indices, hunt, x, y)
        return used

    def _keep(self, number: int, indices: Array, hunt: Hunt, x: Tensor, y: Tensor) -> None:
        # What an attack claims is looked at again, as a whole: in the ball, in the box, misclassified.
        tried = torch.ones(len(x), dtype=torch.bool, device=x.device)
        tried[hunt.left] = False
        if not bool(tried.any()):
            return
        x_adv, clean, label, at = hunt.found[tried], x[tried], y[tried], indices[tried.cpu().numpy()]
        logits = self.classifier.logits(x_adv)
        distance = self.plan.threat.distance(x_adv, clean)
        broken = (logits.argmax(1) != label) & (distance <= self.plan.threat.eps * (1 + _SLACK) + 1e-7)
        broken &= ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
        mask = broken.cpu().numpy()
        records, at = self.records, at[mask]
        records.broken_by[at] = number
        records.adversarial_prediction[at] = logits.argmax(1).cpu().numpy()[mask]
        records.adversarial_margin[at] = -logit_margin(logits, label).cpu().numpy()[mask]
        records.distance[at] = distance.cpu().numpy()[mask]
        self.examples.add(torch.as_tensor(at), x_adv[broken])
