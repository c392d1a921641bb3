"""The claim at desk scale: digits at four angles, -30 or 60 degrees held out, 4 and 3 bits.

A CNN (8, 16, 16 channels) is trained for 6 epochs in float on the three sources, then 5 epochs quantized with Adam 1e-3; K = 20,
tau = 0.3, batches of 16 images of every source. Each figure of a seed is the mean over both targets and both bit widths, the
last epoch counts, and no setting was chosen on a target.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from eff.claims import ClaimRun
from eff.data import Data, load_data
from eff.measure import task_metrics
from eff.models import make_task
from eff.run import Run
from eff.schemas import CORE_TRAINING, TrainOptions
from eff.seeding import seed_everything
from eff.session import Chosen, Plugins
from eff.training import Training
from eff_quant_gaqat.config import GAQATConfig
from eff_quant_gaqat.plugin import GAQAT, Domains

TARGETS, BITS = (-30, 60), (4, 3)
SETTINGS = {
    "lsq": {"flat_optimizer": "none"},
    "lsq_sagm": {"freeze_policy": "never"},
    "always_after_first": {"freeze_policy": "always_after_first"},
    "random": {"freeze_policy": "random"},
    "gaqat": {},
}


class DigitsCNN(nn.Sequential):
    """Three convolutions (8, 16, 16 channels) with batch norm and ReLU, then a linear layer."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in ((1, 8, 1), (8, 16, 2), (16, 16, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def rotated_digits(run: ClaimRun) -> dict[str, list[float]]:
    """Return target accuracies, the conflict rate and the frozen share by setting and seed."""
    measured: dict[str, list[float]] = {}
    for seed in run.log.track(run.seeds, "rotated_digits"):
        sums: dict[str, list[float]] = {}
        for target in TARGETS:
            data = load_data(f"rotated_digits?target={target}&seed={seed}", sources=Domains.data_sources)
            seed_everything(seed, "model")
            model = DigitsCNN()
            recipe = TrainOptions(epochs=6, batch_size=16, augment=False).over(CORE_TRAINING)
            sums.setdefault("float", []).append(train(model, data, seed, recipe, None))
            for bits in BITS:
                for name, options in SETTINGS.items():
                    config = GAQATConfig(weight_bits=bits, act_bits=bits, window=20, lr=1e-3, epochs=5, **options)  # type: ignore[arg-type]
                    method = GAQAT(config)
                    accuracy = train(copy.deepcopy(model), data, seed, method.training().over(recipe), method)
                    sums.setdefault(name, []).append(accuracy)
                    sums.setdefault(f"{name}_{bits}_bits", []).append(accuracy)
                    assert method.trainer is not None
                    if name == "gaqat":
                        sums.setdefault("frozen_share", []).append(100 * method.trainer.tracker.frozen_share())
                    if name == "lsq_sagm":
                        sums.setdefault("conflict_rate", []).append(100 * method.trainer.tracker.conflict_rate())
        for name, values in sums.items():
            measured.setdefault(name, []).append(sum(values) / len(values))
    return measured


def train(model: nn.Module, data: Data, seed: int, recipe: TrainOptions, method: GAQAT | None) -> float:
    """Train and return the accuracy on the target domain."""
    plugins = Plugins([Chosen("quant_gaqat", "", "eff-quant-gaqat", method)] if method else [], extensions=())
    run = Run(make_task(data.task, plugins), torch.device("cpu"), seed, data, train=recipe, training=True)
    if method is not None:
        seed_everything(seed, "transform")
        model = method.transform(model=model, run=run)
    Training(model, run, plugins).run_all()
    return task_metrics(model, data, run).values["accuracy"].value
