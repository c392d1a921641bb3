"""Training on adversarial images: PGD-AT (Madry et al., ICLR 2018) and TRADES (Zhang et al., ICML 2019).

PGD-AT   min E max_{x'} L(f(x'), y)
TRADES   min E [ L(f(x), y) + beta max_{x'} KL(p(x) || p(x')) ]
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.hookspecs import hookimpl
from eff_adv_kit.classifier import Objective, attacked
from eff_adv_kit.losses import cross_entropy
from eff_adv_kit.threat import Threat

if TYPE_CHECKING:
    from eff.data import Batch
    from eff.run import Loss, Run, Step, StepResult


@dataclass(frozen=True)
class InnerAttack:
    """The attack inside training."""

    threat: Threat
    steps: int = 10
    step: float | None = None
    """Size of a move; None: a quarter of eps."""

    def __call__(self, model: nn.Module, run: Run, x: Tensor, objective: Objective) -> Tensor:
        """Return images that raise `objective`, from a random start in the ball; the model is in eval mode."""
        size = self.threat.eps / 4 if self.step is None else self.step
        noise = torch.rand_like(x) * 2 - 1
        x_adv = self.threat.project(x + self.threat.eps * noise, x)
        with attacked(model, run) as classifier:
            for _ in range(self.steps):
                _, gradient = classifier.gradient(x_adv, objective)
                x_adv = self.threat.project(x_adv + size * self.threat.direction(gradient), x)
        return x_adv


def adversarial_loss(
    loss: Loss, run: Run, inner: InnerAttack, kind: Literal["at", "trades"] = "at", beta: float = 6.0
) -> Loss:
    """Return `loss` made adversarial; put it into `step.loss` in a `train_step` wrapper.

    Args:
        loss: (model, batch) -> (loss, output), e.g. `step.loss`.
        run: the run, for how the task feeds the model.
        inner: the attack.
        kind: what is minimised.
        beta: weight of the second term of TRADES.
    """

    def at(model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        x_adv = inner(model, run, batch["image"], lambda logits: cross_entropy(logits, batch["label"]))
        return loss(model, {**batch, "image": x_adv})

    def trades(model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        with attacked(model, run) as classifier:
            clean = classifier.logits(batch["image"]).softmax(1)
        x_adv = inner(model, run, batch["image"], lambda logits: divergence(clean, logits))
        value, output = loss(model, batch)
        adversarial = run.forward(model, {**batch, "image": x_adv})
        return value + beta * divergence(output.softmax(1), adversarial).mean(), output

    return at if kind == "at" else trades


def divergence(p: Tensor, logits: Tensor) -> Tensor:
    """Return KL(p || softmax(logits)) in nats, (N,)."""
    return F.kl_div(logits.log_softmax(1), p, reduction="none").sum(1)


class AdversarialTraining:
    """Makes the training of a run adversarial, as a plugin of its session.

        plugins.manager.register(AdversarialTraining(InnerAttack(Threat("linf", 8 / 255))), "adversarial training")

    Args:
        inner: the attack.
        kind: PGD-AT or TRADES.
        beta: weight of the second term of TRADES.
    """

    def __init__(self, inner: InnerAttack, kind: Literal["at", "trades"] = "at", beta: float = 6.0):
        self.inner, self.kind, self.beta = inner, kind, beta

    @hookimpl(wrapper=True)
    def train_step(self, step: Step) -> Generator[None, StepResult, StepResult]:
        """Replace the loss of the step."""
        step.loss = adversarial_loss(step.loss, step.run, self.inner, self.kind, self.beta)
        return (yield)
