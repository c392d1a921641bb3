"""The paper's claim at desk scale: W4A4 of a small diffusion transformer on scikit-learn's digits.

Width 48, 3 blocks, 1200 updates in float; then 12 trajectories of 50 steps (600 updates) for every trained setting,
all at the reference's learning rates. Error: mean squared difference to the float model's noise on a fresh path.
Frechet distances (fd_ digit_features, fd_pca_ 32 principal components of real digits): 500 samples, training digits.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from eff.claims import ClaimRun
from eff.data import load_data
from eff.run import Run
from eff_quant_efficientdm.config import EfficientDMConfig
from eff_quant_efficientdm.distill import Distillation, evaluation_path
from eff_quant_kit.diffusion.frechet import digit_features, frechet_distance, pca_features
from eff_quant_kit.diffusion.models import trained_model
from eff_quant_kit.diffusion.sampling import path_error, trajectories
from eff_quant_kit.diffusion.task import Diffusion, DiffusionOptions

FULL = EfficientDMConfig(steps=50, epochs=12)
SETTINGS = {
    "qalora": FULL.model_copy(update={"scale_aware": False, "temporal": False}),
    "scale_aware": FULL.model_copy(update={"temporal": False}),
    "efficientdm": FULL,
}


def w4a4_digits(run: ClaimRun) -> dict[str, list[float]]:
    """Return error and Frechet distances of each setting for each seed."""
    measured: dict[str, list[float]] = {}
    task = Diffusion(DiffusionOptions(input_shape=(1, 8, 8), classes=tuple("0123456789")))
    for seed in run.log.track(run.seeds, "w4a4_digits"):
        teacher = trained_model("digits_dit", seed, 1200, width=48)
        inner = Run(task, torch.device("cpu"), seed)
        path = evaluation_path(teacher, task, task.schedule.respaced(50), inner, 64)
        split = load_data(f"digits?seed={seed}").split("train")
        real = 2 * split.batch(range(len(split)))["image"] - 1
        models: dict[str, nn.Module] = {"float": teacher}
        for name, config in SETTINGS.items():
            torch.manual_seed(seed)
            distillation = Distillation(copy.deepcopy(teacher), config, {}, inner)
            models.setdefault("calibrated", distillation.ptq)
            for index in range(distillation.steps):
                distillation.step(index)
            distillation.finish()
            models[name] = distillation.model
        pca = pca_features(real)
        for name, model in models.items():
            errors, samples = path_error(model, path), _samples(model, task, inner)
            measured.setdefault(name, []).append(sum(errors) / len(errors))
            distance = frechet_distance(digit_features(samples), digit_features(real))
            measured.setdefault(f"fd_{name}", []).append(distance)
            measured.setdefault(f"fd_pca_{name}", []).append(frechet_distance(pca(samples), pca(real)))
        ratio = measured["efficientdm"][-1] / measured["calibrated"][-1]
        measured.setdefault("efficientdm_per_calibrated", []).append(ratio)
    return measured


def _samples(model: nn.Module, task: Diffusion, run: Run) -> Tensor:
    generator = run.generator("claim/samples")
    labels = task.labels(500, generator)
    return trajectories(model, task.schedule, task.schedule.respaced(50), labels, task.shape, generator).samples
