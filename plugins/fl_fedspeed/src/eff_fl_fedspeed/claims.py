"""The paper's claim at desk scale: digits among 20 unlike clients, a quarter of them per round.

MLP 64-64-10, Dirichlet 0.1, 5 local epochs, batches of 32, lr 0.1 (x 0.998 per round), weight decay 1e-3,
clipping at 10, 60 rounds; all settings share data, division, initial weights and the draw of clients,
and average clients evenly, as the reference code does (`fedavg_by_samples` weighs them by their data).
Accuracy is the mean of the last five rounds, in % on the held-out 40 %. The ascent step doubles the
gradient evaluations, so FedAvg and SCAFFOLD are also measured with ten local epochs, the same number.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

from eff.claims import ClaimRun
from eff.data import Data, load_data
from eff.models import make_task
from eff.run import Run
from eff.schemas import CORE_TRAINING
from eff.seeding import seed_everything
from eff.session import Chosen, Plugins
from eff.training import Training
from eff_fl_fedspeed.config import FedSpeedConfig
from eff_fl_fedspeed.plugin import FedSpeed
from eff_fl_kit.baselines import AveragingConfig, FedAvg, Scaffold
from eff_fl_kit.config import FederatedConfig
from eff_fl_kit.diagnostics import train_loss
from eff_fl_kit.method import FederatedMethod
from eff_fl_kit.plugin import FLKit

SETTING: dict[str, Any] = {
    "rounds": 60, "n_clients": 20, "active_ratio": 0.25, "dirichlet": 0.1, "local_epochs": 5, "batch_size": 32,
    "eval_every": 1,
}  # fmt: skip
LAST_ROUNDS = 5


def digits_dirichlet(run: ClaimRun) -> dict[str, list[float]]:
    """Return the accuracy of each setting and FedSpeed's training loss over FedAvg's, for each seed."""
    longer = {**SETTING, "local_epochs": 2 * SETTING["local_epochs"]}
    makers: dict[str, Any] = {
        "fedavg": lambda: FedAvg(AveragingConfig(**SETTING)),
        "fedavg_by_samples": lambda: FedAvg(AveragingConfig(**SETTING, by_samples=True)),
        "fedprox": lambda: FedAvg(AveragingConfig(**SETTING, mu=0.1)),
        "fedsam": lambda: FedAvg(AveragingConfig(**SETTING, rho=0.1)),
        "scaffold": lambda: Scaffold(FederatedConfig(**SETTING)),
        "fedspeed_rho0": lambda: FedSpeed(FedSpeedConfig(**SETTING, rho=0.0)),
        "fedspeed": lambda: FedSpeed(FedSpeedConfig(**SETTING)),
        "fedavg_10_epochs": lambda: FedAvg(AveragingConfig(**longer)),
        "scaffold_10_epochs": lambda: Scaffold(FederatedConfig(**longer)),
    }
    measured: dict[str, list[float]] = {name: [] for name in (*makers, "loss_ratio")}
    for seed in run.log.track(run.seeds, "digits_dirichlet"):
        data = load_data(f"digits?seed={seed}")
        losses = {}
        for name, make in makers.items():
            accuracy, losses[name] = _train(make(), data, seed)
            measured[name].append(accuracy)
        measured["loss_ratio"].append(losses["fedspeed"] / losses["fedavg"])
    return measured


def _train(method: FederatedMethod[Any], data: Data, seed: int) -> tuple[float, float]:
    seed_everything(seed, "model")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    plugins = Plugins([Chosen("fl_fedspeed", "", "eff-fl-fedspeed", method)], extensions=[("fl_kit", FLKit())])
    recipe = method.training().over(CORE_TRAINING)
    run = Run(make_task(data.task, plugins), torch.device("cpu"), seed, data, train=recipe, training=True)
    Training(model, run, plugins).run_all()
    accuracy = statistics.fmean(row["accuracy"] for row in method.history[-LAST_ROUNDS:])
    return accuracy, train_loss(model, run)
