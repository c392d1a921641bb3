"""The paper's claims at desk scale: norm growth in a model of training, and digits with batch norm."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from eff.claims import ClaimRun
from eff.data import load_data
from eff.measure import task_metrics
from eff.models import make_task
from eff.run import Run
from eff.schemas import CORE_TRAINING, TrainOptions
from eff.seeding import seed_everything
from eff.session import Chosen, Plugins
from eff.training import Training
from eff_train_adamp.config import AdamPConfig
from eff_train_adamp.optimizers import SGDP, AdamP
from eff_train_adamp.plugin import ProjectedOptimizers, ProjectedTraining
from eff_train_adamp.tracking import mean_norm

TOY_STEPS = 100
VALLEY = (0.0, 0.05, 1.0)
GROWTH_STEPS = 2000
EPOCHS = 30
# The same rate and decay on both sides of each pair; AdamW's are torch's defaults, SGD's core's.
ADAM = TrainOptions(lr=1e-3, weight_decay=1e-2)
SGD = TrainOptions(lr=0.05, weight_decay=5e-4, momentum=0.9)
SETTINGS = {"adamw": ADAM, "adamp": ADAM, "sgd": SGD, "sgdp": SGD}


def norm_growth(run: ClaimRun) -> dict[str, list[float]]:
    """Return the growth factors per seed."""
    return {f"factor_b{beta}": [growth_factor(beta, seed) for seed in run.seeds] for beta in (0.5, 0.9)}


def toy_descent(run: ClaimRun) -> dict[str, list[float]]:
    """Return the share of steps after the first at which the projected side has the smaller norm, and final angles."""
    measured: dict[str, list[float]] = {}
    for seed in run.log.track(run.seeds, "toy_descent"):
        for plain, projected, makers in (
            ("sgd", "sgdp", (_sgd, _sgdp)),
            ("adam", "adamp", (lambda w: torch.optim.Adam([w], lr=0.05), lambda w: AdamP([w], lr=0.05))),
        ):
            (plain_norms, plain_angle), (norms, angle) = (descend(make, seed) for make in makers)
            # The first step is the same for SGD: its momentum is the gradient, which is orthogonal to the weight.
            smaller = 100.0 * (norms[1:] < plain_norms[1:]).double().mean().item()
            found = {f"{projected}_smaller_norm": smaller, f"{plain}_angle": plain_angle, f"{projected}_angle": angle}
            for name, value in found.items():
                measured.setdefault(name, []).append(value)
    return measured


def _sgd(weight: Tensor) -> torch.optim.Optimizer:
    return torch.optim.SGD([weight], lr=0.1, momentum=0.9)


def _sgdp(weight: Tensor) -> torch.optim.Optimizer:
    return SGDP([weight], lr=0.1, momentum=0.9)


def growth_factor(momentum: float, seed: int) -> float:
    """Return the growth of |w|^2 over the sum of lr^2 |p_t|^2, for random gradients orthogonal to w.

    The paper's limit is 1 + 2 momentum / (1 - momentum). The rate is so small that the norm stays.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1000, generator=generator, dtype=torch.float64)
    lr = 1e-3
    start, momentum_buffer, squares = weight.square().sum(), torch.zeros_like(weight), torch.zeros(())
    for _ in range(GROWTH_STEPS):
        gradient = torch.randn(1000, generator=generator, dtype=torch.float64)
        gradient -= weight * (gradient @ weight) / weight.square().sum()
        momentum_buffer = momentum * momentum_buffer + gradient
        weight = weight - lr * momentum_buffer
        squares = squares + lr**2 * momentum_buffer.square().sum()
    return float((weight.square().sum() - start) / squares)


def descend(make: Callable[[Tensor], torch.optim.Optimizer], seed: int) -> tuple[Tensor, float]:
    """Minimise a Rayleigh quotient w'Aw / w'w in three dimensions, with a narrow valley: A = diag(0, 0.05, 1).

    Returns:
        The norm after each step, and the angle to the minimising axis at the end in degrees.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    weight = nn.Parameter(start / start.norm())
    eigenvalues = torch.tensor(VALLEY, dtype=torch.float64)
    optimizer = make(weight)
    norms = []
    for _ in range(TOY_STEPS):
        optimizer.zero_grad()
        (eigenvalues * weight.square()).sum().div(weight.square().sum()).backward()
        optimizer.step()
        norms.append(weight.detach().norm())
    first, *others = weight.detach()[0].tolist()
    return torch.stack(norms), math.degrees(math.atan2(math.hypot(*others), abs(first)))


class DigitsCNN(nn.Sequential):
    """Three convolutions (8, 16, 16 channels), each with batch norm and ReLU, then a linear layer."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in ((1, 8, 1), (8, 16, 2), (16, 16, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def digits_effective_step(run: ClaimRun) -> dict[str, list[float]]:
    """Return accuracy, mean final norm and late effective step of the convolutions, per setting and seed."""
    measured: dict[str, list[float]] = {}
    for seed in run.log.track(run.seeds, "digits_effective_step"):
        for name, options in SETTINGS.items():
            for key, value in _train(name, options, seed).items():
                measured.setdefault(f"{name}_{key}", []).append(value)
    return measured


def _train(optimizer: str, options: TrainOptions, seed: int) -> dict[str, float]:
    data = load_data(f"digits?seed={seed}")
    seed_everything(seed, "model")
    model = DigitsCNN()
    method = ProjectedTraining(AdamPConfig())  # follows the steps of any optimizer
    plugins = Plugins([Chosen("train_adamp", "", "", method)], extensions=[("adamp", ProjectedOptimizers())])
    recipe = options.over(CORE_TRAINING).model_copy(update={"optimizer": optimizer, "epochs": EPOCHS, "augment": False})
    run = Run(make_task(data.task, plugins), torch.device("cpu"), seed, data, train=recipe, training=True)
    Training(model, run, plugins).run_all()
    assert method.track is not None
    followed = [index for index, name in enumerate(method.track.names) if model.get_parameter(name).ndim == 4]
    convolutions = nn.ModuleList(module for module in model if isinstance(module, nn.Conv2d))
    return {
        "accuracy": task_metrics(model, data, run).values["accuracy"].value,
        "norm": mean_norm(convolutions),
        "step": 1000.0 * method.track.late_steps()[followed].mean().item(),
    }
