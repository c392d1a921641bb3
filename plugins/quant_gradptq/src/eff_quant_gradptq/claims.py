"""The paper's claim at desk scale: 2-bit weights on scikit-learn's digits, 128 unlabelled images, 250 steps a layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from eff.claims import ClaimRun
from eff.data import Data, load_data
from eff.measure import task_metrics
from eff.models import make_task
from eff.run import Run
from eff.schemas import CORE_TRAINING, TrainOptions
from eff.seeding import named_generator, seed_everything
from eff.session import Chosen, Plugins
from eff.training import Training
from eff_quant_gradptq.config import GradPTQConfig
from eff_quant_gradptq.plugin import GradPTQ

FLOAT_EPOCHS = 12
RANDOM_DRAWS = 5
SHARED: dict[str, Any] = {"bits": 2, "iters": 250, "lr": 1e-2, "calib_size": 128, "loss": "mse"}
"""One loss for all, so that settings differ in one choice at a time."""
MIXED: dict[str, Any] = SHARED | {
    "loss": "relu_mse",
    "mixed": "channel",
    "bits": 3,
    "candidates": (2, 3, 4),
    "iters": 50,
}


class DigitsCNN(nn.Sequential):
    """Three convolutions (8, 16, 16 channels) with batch norm and ReLU, then a linear layer."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in ((1, 8, 1), (8, 16, 2), (16, 16, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def w2_digits(run: ClaimRun) -> dict[str, list[float]]:
    """Return the accuracy of each setting for each seed."""
    settings: dict[str, dict[str, Any]] = {
        "adaround": {"preset": "base"},
        "bias": {},
        "relu_mse": {"loss": "relu_mse"},
        "bias_scale": {"dof": ("rounding", "bias", "scale")},
        "half": {"select": "random", "select_frac": 0.5},
        "qdrop": {"augment": "qdrop"},
        "power_grid": {"grid": "power"},
    }
    measured: dict[str, list[float]] = {
        name: [] for name in ("float", "nearest", *settings, "rotated", "importance", "random", "reversed")
    }
    for seed in run.log.track(run.seeds, "w2_digits"):
        data = load_data(f"digits?seed={seed}")
        seed_everything(seed, "model")
        model = DigitsCNN()
        recipe = CORE_TRAINING.model_copy(update={"epochs": FLOAT_EPOCHS, "augment": False})
        _train(model, _run(data, seed, recipe), None)
        measured["float"].append(_accuracy(model, data, seed))
        measured["nearest"].append(_accuracy(quantized(model, data, seed, GradPTQConfig(**SHARED), False), data, seed))
        for name, options in settings.items():
            config = GradPTQConfig(**{**SHARED, **options})
            measured[name].append(_accuracy(quantized(model, data, seed, config), data, seed))
        turned = quantized(model, data, seed, GradPTQConfig(**SHARED), rotate=True)
        measured["rotated"].append(_accuracy(turned, data, seed))
        for name, values in _mixed(model, data, seed).items():
            measured[name].append(values)
    return measured


def _mixed(model: nn.Module, data: Data, seed: int) -> dict[str, float]:
    """Return the accuracy of bits by importance, at random (mean of five) and by reversed importance, equal mean bits."""
    config = GradPTQConfig(**MIXED)
    found = {"importance": _accuracy(quantized(model, data, seed, config), data, seed)}
    for name in ("random", "reversed"):
        draws = RANDOM_DRAWS if name == "random" else 1
        generator = named_generator(seed, "random importance")
        values = [
            _accuracy(quantized(model, data, seed, config, change=(name, generator)), data, seed) for _ in range(draws)
        ]
        found[name] = sum(values) / draws
    return found


def quantized(
    model: nn.Module,
    data: Data,
    seed: int,
    config: GradPTQConfig,
    trains: bool = True,
    rotate: bool = False,
    change: tuple[str, torch.Generator] | None = None,
) -> nn.Module:
    """Return a quantized copy; `rotate` calibrates on turned digits, `change` replaces the importance."""
    from eff_quant_gradptq import pipeline as module

    method, run = GradPTQ(config), _run(data, seed, CORE_TRAINING, trains)
    seed_everything(seed, "transform")
    original, calibration = module.channel_importance, module.CalibrationSet
    if change is not None:

        def changed_importance(*arguments: Any) -> Any:
            importance = original(*arguments)
            flat = torch.cat(list(importance.values()))
            if change[0] == "random":
                flat = flat[torch.randperm(len(flat), generator=change[1])]
            else:
                flat = flat.sort(descending=True).values[flat.argsort().argsort()]
            return dict(zip(importance, flat.split([len(item) for item in importance.values()]), strict=True))

        module.channel_importance = changed_importance
    if rotate:

        def turned(*arguments: Any, **options: Any) -> Any:
            made = calibration(*arguments, **options)
            made.replace(_rotated)
            return made

        module.CalibrationSet = turned  # type: ignore[assignment,misc]
    try:
        changed = method.transform(model=copy.deepcopy(model), run=run)
    finally:
        module.channel_importance, module.CalibrationSet = original, calibration  # type: ignore[misc]
    if trains:
        _train(changed, run, method)
    return method.finish(changed, run)


def _rotated(images: torch.Tensor) -> torch.Tensor:
    """Return images (N, C, H, W) turned by 45 degrees, bilinear, zeros outside: another domain."""
    cosine = 2**-0.5
    turn = torch.tensor([[cosine, -cosine, 0.0], [cosine, cosine, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _run(data: Data, seed: int, recipe: TrainOptions, training: bool = True) -> Run:
    task = make_task(data.task, Plugins((), extensions=()))
    return Run(task, torch.device("cpu"), seed, data, train=recipe, training=training)


def _train(model: nn.Module, run: Run, method: GradPTQ | None) -> None:
    chosen = [Chosen("quant_gradptq", "", "eff-quant-gradptq", method)] if method else []
    Training(model, run, Plugins(chosen, extensions=())).run_all()


def _accuracy(model: nn.Module, data: Data, seed: int) -> float:
    return task_metrics(model, data, _run(data, seed, CORE_TRAINING)).values["accuracy"].value
