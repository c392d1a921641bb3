"""The paper's claim at desk scale: 2-bit weights and 4-bit inputs in the middle of a small CNN, 100 unlabelled digits."""

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
from eff_quant_adaquant.config import AdaQuantConfig
from eff_quant_adaquant.insert import convert
from eff_quant_adaquant.pipeline import Pipeline
from eff_quant_adaquant.plugin import AdaQuant
from eff_quant_adaquant.tuning import distillation_loss

FLOAT_EPOCHS = 12
LAYERS_ONLY = AdaQuantConfig(
    bits=(2,), act_bits=4, keep_first_last=True, calib_size=100, iters=200, lr_w=1e-4, lr_qx=1e-2,
    norm_tuning=False, bias_tuning=False,
)  # fmt: skip
"""The layers alone, without the later stages: what the claim is about."""


class DigitsCNN(nn.Sequential):
    """Three convolutions (8, 16, 16 channels) with batch norm and ReLU, then a linear layer."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in ((1, 8, 1), (8, 16, 2), (16, 16, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def w2a4_digits(run: ClaimRun) -> dict[str, list[float]]:
    """Return the accuracy of each setting for each seed."""
    measured: dict[str, list[float]] = {
        name: [] for name in ("float", "minmax", "parallel", "sequential", "all_stages", "end_to_end")
    }
    for seed in run.log.track(run.seeds, "w2a4_digits"):
        data = load_data(f"digits?seed={seed}")
        seed_everything(seed, "model")
        model = DigitsCNN()
        recipe = CORE_TRAINING.model_copy(update={"epochs": FLOAT_EPOCHS, "augment": False})
        _train(model, _run(data, seed, recipe), None)
        measured["float"].append(_accuracy(model, data, seed))
        for name, changes, trains in (
            ("minmax", {}, False),
            ("parallel", {"mode": "parallel"}, True),
            ("sequential", {}, True),
            ("all_stages", {"norm_tuning": True, "bias_tuning": True}, True),
        ):
            config = LAYERS_ONLY.model_copy(update=changes)
            measured[name].append(_accuracy(quantized(model, data, seed, config, trains), data, seed))
        measured["end_to_end"].append(_accuracy(end_to_end(model, data, seed), data, seed))
    return measured


def quantized(model: nn.Module, data: Data, seed: int, config: AdaQuantConfig, trains: bool) -> nn.Module:
    """Return a quantized copy; without training its ranges are those measured."""
    method = AdaQuant(config)
    run = _run(data, seed, CORE_TRAINING, trains)
    seed_everything(seed, "transform")
    changed = method.transform(model=copy.deepcopy(model), run=run)
    if trains:
        _train(changed, run, method)
    return method.finish(changed, run)


def end_to_end(model: nn.Module, data: Data, seed: int) -> nn.Module:
    """Return a copy that is distilled as a whole, on the same images, from the same start and for as many steps."""
    run = _run(data, seed, CORE_TRAINING)
    pipeline = Pipeline(copy.deepcopy(model), LAYERS_ONLY, {}, run)
    student = pipeline.model
    ranges = [parameter for name, parameter in student.named_parameters() if "quantizer" in name]
    weights = [parameter for name, parameter in student.named_parameters() if "quantizer" not in name]
    optimizer = torch.optim.Adam([{"params": weights, "lr": LAYERS_ONLY.lr_w}, {"params": ranges, "lr": 1e-3}])
    for index in range(pipeline.layer_steps):
        seed_everything(seed, f"end_to_end/{index}")
        batch = pipeline.calibration.draw(torch.randperm(len(pipeline.calibration))[: LAYERS_ONLY.batch])
        with torch.no_grad():
            target = run.forward(pipeline.teacher, batch)
        optimizer.zero_grad(set_to_none=True)
        distillation_loss(run.forward(student, batch), target, True).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    pipeline.calibration.close()
    return convert(student)


def _run(data: Data, seed: int, recipe: TrainOptions, training: bool = True) -> Run:
    task = make_task(data.task, Plugins((), extensions=()))
    return Run(task, torch.device("cpu"), seed, data, train=recipe, training=training)


def _train(model: nn.Module, run: Run, method: AdaQuant | None) -> None:
    chosen = [Chosen("quant_adaquant", "", "eff-quant-adaquant", method)] if method else []
    Training(model, run, Plugins(chosen, extensions=())).run_all()


def _accuracy(model: nn.Module, data: Data, seed: int) -> float:
    return task_metrics(model, data, _run(data, seed, CORE_TRAINING)).values["accuracy"].value
