"""The paper's claim at desk scale: attacks on convolutional nets for scikit-learn's digits, at 100 gradients each.

Per seed, three nets are trained for 12 epochs (Adam): plainly, on PGD images (eps 0.15), and with TRADES, all without
weight decay. 500 test images, Linf, eps 0.1 and 0.2; settings are named net_attack_eps. A fourth net, the PGD-trained
one with logits times 100, masks its gradients.

Every single attack has 100 gradients per image: PGD and APGD 100 steps, MD and PMA two searches of 50. PMA+ is PMA
(2 x 50) and APGD-T on its survivors; the mini AutoAttack is APGD-CE (100) and APGD-T (9 targets of 100 steps). These two
are run on the PGD-trained net.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from eff.claims import ClaimRun
from eff.data import Data, load_data
from eff.log import Log
from eff.models import make_task
from eff.run import Run
from eff.schemas import CORE_TRAINING
from eff.seeding import seed_everything
from eff.session import Plugins
from eff.training import Training
from eff_adv_kit.apgd import APGD, TargetedAPGD
from eff_adv_kit.checks import Subset
from eff_adv_kit.classifier import attacked
from eff_adv_kit.hunt import Attack
from eff_adv_kit.pgd import PGD
from eff_adv_kit.runner import Outcome, Plan, run_sequence
from eff_adv_kit.threat import Threat
from eff_adv_kit.training import AdversarialTraining, InnerAttack
from eff_adv_pma.attack import MarginAttack

IMAGES = 500
TRAIN_EPS = 0.15
EPS = (0.1, 0.2)
NETS = ("plain", "at", "trades")
RECIPE = CORE_TRAINING.model_copy(
    update={"epochs": 12, "optimizer": "adam", "lr": 0.003, "weight_decay": 0.0, "augment": False}
)
SINGLE: dict[str, Attack] = {
    "pgd_ce": PGD("ce"),
    "pgd_margin": PGD("margin"),
    "pgd_dlr": PGD("dlr"),
    "apgd_ce": APGD("ce"),
    "md": MarginAttack("margin", 50, name="md"),
    "pma": MarginAttack("pm", 50),
}
PMA_PLUS = (SINGLE["pma"], TargetedAPGD())
MINI_AA = (SINGLE["apgd_ce"], TargetedAPGD())


class DigitsNet(nn.Sequential):
    """Three convolutions (16, 32, 32 channels) with ReLU, then a linear layer."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(512, 10))


class Sharpened(nn.Module):
    """A model with its logits times 100: the same decisions, and a cross entropy without gradient in float32."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = 100 * self.model(x)
        return logits


def digits_budget(run: ClaimRun) -> dict[str, list[float]]:
    """Return robust accuracies and gradients of each setting for each seed."""
    rows = [_one_seed(seed) for seed in run.log.track(run.seeds, "digits_budget")]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _one_seed(seed: int) -> dict[str, float]:
    data = load_data(f"digits?seed={seed}")
    found: dict[str, float] = {}
    gradients = {"pma_plus": 0, "mini_aa": 0}
    for net in NETS:
        model = _trained(net, data, seed)
        found[f"{net}_clean"] = _attack(model, data, seed, (), EPS[0]).last.robust_accuracy
        for eps in EPS:
            for name, attack in SINGLE.items():
                found[f"{net}_{name}_{eps}"] = _attack(model, data, seed, (attack,), eps).last.robust_accuracy
            found[f"{net}_best_pgd_{eps}"] = min(found[f"{net}_pgd_{loss}_{eps}"] for loss in ("ce", "margin", "dlr"))
            if net == "at":
                for name, sequence in (("pma_plus", PMA_PLUS), ("mini_aa", MINI_AA)):
                    outcome = _attack(model, data, seed, sequence, eps)
                    found[f"{net}_{name}_{eps}"] = outcome.last.robust_accuracy
                    gradients[name] += sum(stage.gradients for stage in outcome.stages)
        if net == "at":
            for name in ("pgd_ce", "pgd_margin", "pma", "md"):
                outcome = _attack(Sharpened(model), data, seed, (SINGLE[name],), EPS[0])
                found[f"masked_{name}_{EPS[0]}"] = outcome.last.robust_accuracy
    found["gradients_share"] = 100 * gradients["pma_plus"] / gradients["mini_aa"]
    return found


def _run_of(data: Data, seed: int, plugins: Plugins, training: bool) -> Run:
    return Run(make_task(data.task, plugins), torch.device("cpu"), seed, data, train=RECIPE, training=training)


def _trained(net: str, data: Data, seed: int) -> nn.Module:
    plugins = Plugins((), extensions=())
    inner = InnerAttack(Threat("linf", TRAIN_EPS))
    if net != "plain":
        kind: Literal["at", "trades"] = "at" if net == "at" else "trades"
        plugins.manager.register(AdversarialTraining(inner, kind), "adversarial training")
    seed_everything(seed, "model")
    model = DigitsNet()
    Training(model, _run_of(data, seed, plugins, training=True), plugins).run_all()
    return model.eval()


def _attack(model: nn.Module, data: Data, seed: int, attacks: Sequence[Attack], eps: float) -> Outcome:
    run = _run_of(data, seed, Plugins((), extensions=()), training=False)
    with attacked(model, run) as classifier:
        plan = Plan(Threat("linf", eps), attacks, batch_size=IMAGES, seed=seed)
        return run_sequence(classifier, Subset(data.split("test"), range(IMAGES)), plan, run.device, Log())
