"""The paper's claim at desk scale: attacks on small networks for scikit-learn's digits at equal gradients.

Three networks per seed: trained plainly, by PGD-AT and by TRADES (both: 10 steps at eps 0.15), and the second again
with its logits multiplied by 100, which masks its gradients. 500 test images, eps 0.1 and 0.2, 100
gradients per sample: 100 steps of PGD and APGD, 2 x 50 of PMA and MD.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from eff_adv_kit.apgd import APGD, TargetedAPGD
from eff_adv_kit.classifier import attacked
from eff_adv_kit.hunt import Attack
from eff_adv_kit.obfuscation import Part
from eff_adv_kit.pgd import PGD
from eff_adv_kit.runner import Outcome, Plan, run_sequence
from eff_adv_kit.threat import Threat
from eff_adv_kit.training import InnerAttack, adversarial_loss
from eff_adv_pma.attack import PMA

BUDGET, IMAGES, EPSILONS = 100, 500, (0.1, 0.2)
TRAINING_EPS, EPOCHS, LR = 0.15, 30, 3e-3
SINGLE: dict[str, Attack] = {
    "pgd_ce": PGD("ce", BUDGET), "pgd_margin": PGD("margin", BUDGET), "pgd_dlr": PGD("dlr", BUDGET),
    "pgd_pm": PGD("pm", BUDGET), "apgd_ce": APGD("ce", BUDGET), "md": PMA("margin", BUDGET // 2),
    "pma": PMA("pm", BUDGET // 2),
}  # fmt: skip
PLAIN = ("pgd_ce", "pgd_margin", "pgd_dlr")


class DigitsCNN(nn.Sequential):
    """Two convolutions and two linear layers; images (N, 1, 8, 8) to logits (N, 10)."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.factor * super().forward(x)


def digits_budget(run: ClaimRun) -> dict[str, list[float]]:
    """Return robust accuracies in % per seed: `<network>_<attack>_<eps>`."""
    rows = [_one_seed(seed) for seed in run.log.track(run.seeds, "digits_budget")]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _one_seed(seed: int) -> dict[str, float]:
    data = load_data(f"digits?seed={seed}")
    run = Run(make_task(data.task, Plugins((), extensions=())), torch.device("cpu"), seed, data, train=CORE_TRAINING)
    nets = {kind: train(kind, run) for kind in ("standard", "at", "trades")}
    nets["masked"] = masked = DigitsCNN(100.0)
    masked.load_state_dict(nets["at"].state_dict())
    found: dict[str, float] = {}
    for kind, net in nets.items():
        for eps in EPSILONS:
            for name, attack in SINGLE.items():
                found[f"{kind}_{name}_{eps}"] = _robust([attack], net, run, data, eps).last.robust_accuracy
            found[f"{kind}_best_pgd_{eps}"] = min(found[f"{kind}_{name}_{eps}"] for name in PLAIN)
            found[f"{kind}_best_{eps}"] = min(found[f"{kind}_{name}_{eps}"] for name in SINGLE)
    eps = EPSILONS[-1]
    plus = _robust([PMA("pm", BUDGET // 2), TargetedAPGD(steps=BUDGET)], nets["at"], run, data, eps)
    mini = _robust([APGD("ce", BUDGET), TargetedAPGD(steps=BUDGET)], nets["at"], run, data, eps)
    found[f"at_pma_plus_{eps}"] = plus.last.robust_accuracy
    found[f"at_mini_aa_{eps}"] = mini.last.robust_accuracy
    found[f"at_pma_plus_gradients_{eps}"] = _gradients(plus) / _gradients(mini)
    found[f"at_pma_minus_md_{eps}"] = found[f"at_pma_{eps}"] - found[f"at_md_{eps}"]
    return found


def _gradients(outcome: Outcome) -> int:
    return sum(stage.gradients for stage in outcome.stages)


def _robust(attacks: Sequence[Attack], net: nn.Module, run: Run, data: Data, eps: float) -> Outcome:
    split = Part(data.split("test"), range(IMAGES))
    with attacked(net, run) as classifier:
        plan = Plan(Threat("linf", eps), attacks, IMAGES, run.seed)
        return run_sequence(classifier, split, plan, run.device, Log())


def train(kind: str, run: Run) -> DigitsCNN:
    """Train a network plainly, by PGD-AT or by TRADES (Adam, batches of 64)."""
    seed_everything(run.seed, f"adv_pma/{kind}")
    net = DigitsCNN()
    split = run.split("train")
    batch = split.batch(range(len(split)))
    inner = InnerAttack(Threat("linf", TRAINING_EPS))

    def plain(model: nn.Module, part: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        output = run.forward(model, part)
        return run.task.loss(output, part), output

    loss = plain if kind == "standard" else adversarial_loss(plain, run, inner, "at" if kind == "at" else "trades")
    optimizer = torch.optim.Adam(net.parameters(), LR)
    for _ in range(EPOCHS):
        order = torch.randperm(len(split))
        for chosen in order.split(64):
            optimizer.zero_grad()
            value, _ = loss(net, {key: values[chosen] for key, values in batch.items()})
            value.backward()
            optimizer.step()
    return net.eval()
