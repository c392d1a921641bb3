"""The paper's claim at desk scale: W4A4 of a small diffusion transformer on scikit-learn's digits.

Width 48, 3 blocks, 1200 updates; 20 calibrated timesteps of 64 samples. Error: mean squared difference to the float
model's noise over the 20 timesteps of a path never used for calibration. Learning rates for so few updates: stage 1
2e-4 for weights and scales, stage 2 2e-5 and 5e-5. Frechet distances (prefix fd_): 500 samples against the training
digits, features of a small classifier (eff_quant_kit.diffusion.frechet.digit_features).
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from eff.claims import ClaimRun
from eff.data import load_data
from eff.run import Run
from eff_quant_kit.diffusion.frechet import digit_features, frechet_distance
from eff_quant_kit.diffusion.inputs import operand_quantizer
from eff_quant_kit.diffusion.models import trained_model
from eff_quant_kit.diffusion.sampling import path_error, trajectories
from eff_quant_kit.diffusion.task import Diffusion, DiffusionOptions
from eff_quant_quest.calibration import Calibrated, record_path
from eff_quant_quest.config import QuESTConfig
from eff_quant_quest.finetune import MAIN_BATCH, Finetuning, Stage

UPDATES, TIME_EPOCHS, MAIN_EPOCHS = 1200, 5, 2
QUEST = QuESTConfig(
    time_epochs=TIME_EPOCHS, main_epochs=MAIN_EPOCHS, lr_time_w=2e-4, lr_time_a=2e-4, lr_w=2e-5, lr_a=5e-5
)
PTQ = QUEST.model_copy(update={"finetune": False})
BASELINES = {
    "a_static": PTQ.model_copy(update={"time_aware": False, "act_granularity": "tensor"}),
    "static_channel": PTQ.model_copy(update={"time_aware": False}),
    "b_tensor": PTQ.model_copy(update={"act_granularity": "tensor"}),
}


def w4a4_digits(run: ClaimRun) -> dict[str, list[float]]:
    """Return error, sample error and Frechet distance of each setting for each seed."""
    measured: dict[str, list[float]] = {}
    task = Diffusion(DiffusionOptions(input_shape=(1, 8, 8), classes=tuple("0123456789")))
    for seed in run.log.track(run.seeds, "w4a4_digits"):
        teacher = trained_model("digits_dit", seed, UPDATES, width=48)
        inner = Run(task, torch.device("cpu"), seed)
        judge = _Judge(teacher, task, inner, seed)
        found = {name: _calibrated(teacher, config, inner).model for name, config in BASELINES.items()}
        settings = {name: judge(model) for name, model in found.items()}
        calibrated = _calibrated(teacher, QUEST, inner)
        settings["c_channel"] = judge(calibrated.model)
        everything = _all_layers(teacher, inner)
        stages = Finetuning(calibrated)
        for index in range(stages.steps):
            if index == stages.first_steps:
                settings["d_time_layers"] = judge(calibrated.model)
            stages.step(index)
        settings["e_quest"] = judge(calibrated.model)
        for index in range(stages.steps):
            everything.step(index)
        settings["f_all_layers"] = judge(everything.calibrated.model)
        settings["float"] = judge(teacher)
        for name, (error, difference, distance) in settings.items():
            measured.setdefault(name, []).append(error)
            measured.setdefault(f"samples_{name}", []).append(difference)
            measured.setdefault(f"fd_{name}", []).append(distance)
        means = {name: values[0] for name, values in settings.items()}
        measured.setdefault("c_per_half_a", []).append(means["c_channel"] / (0.5 * means["a_static"]))
        measured.setdefault("e_per_f", []).append(means["e_quest"] / means["f_all_layers"])
    return measured


def _calibrated(teacher: nn.Module, config: QuESTConfig, run: Run) -> Calibrated:
    return Calibrated(copy.deepcopy(teacher), config, {}, run)


def _all_layers(teacher: nn.Module, run: Run) -> Stage:
    """Return stage 2 over all layers and all scales: baseline (f)."""
    calibrated = _calibrated(teacher, QUEST.model_copy(update={"sensitive_layers": ("*",)}), run)
    scales = [operand_quantizer(calibrated.model, item) for item in calibrated.operands]
    return Stage(calibrated, list(calibrated.weights), scales, (QUEST.lr_w, QUEST.lr_a), (64, MAIN_BATCH), (), 1.0)


class _Judge:
    """Measures a model on a path and on noise of its own, the same for every setting."""

    def __init__(self, teacher: nn.Module, task: Diffusion, run: Run, seed: int):
        self.task, self.run = task, run
        split = load_data(f"digits?seed={seed}").split("train")
        self.real = digit_features(2 * split.batch(range(len(split)))["image"] - 1)
        self.path = record_path(teacher, task, task.schedule.respaced(20), QUEST, run, "held out")
        self.reference = self._samples(teacher)

    def _samples(self, model: nn.Module) -> torch.Tensor:
        generator = self.run.generator("claim/samples")
        labels = self.task.labels(500, generator)
        return trajectories(model, self.task.schedule, self.path.t, labels, self.task.shape, generator).samples

    def __call__(self, model: nn.Module) -> tuple[float, float, float]:
        errors, samples = path_error(model, self.path), self._samples(model)
        difference = float((samples - self.reference).square().mean())
        return sum(errors) / len(errors), difference, frechet_distance(digit_features(samples), self.real)
