"""The claim at desk scale: a diffusion transformer on digits, sub-vectors of 4, 32 codewords (1.25 bits a weight).

Width 64, 3 blocks, 1200 updates of training; calibration on 12 trajectories of 50 steps, 4 samples each. Error: mean squared
difference to the float model's noise over 20 timesteps of paths from noise that calibration never draws. `c_codebook_only`
takes the same paths and steps with fixed codes; its rate is the better of 1e-4 and 1e-3 on a validation path.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from eff.claims import ClaimRun
from eff.run import Run
from eff_quant_kit.diffusion.models import trained_model
from eff_quant_kit.diffusion.sampling import Trajectories, path_error
from eff_quant_kit.diffusion.task import Diffusion, DiffusionOptions
from eff_quant_kit.layers import replace_module
from eff_quant_kit.sensitivity import rounded
from eff_quant_vq4dit.calibrate import Calibration, choose_layers, insert, soft_layers, teacher_of
from eff_quant_vq4dit.config import VQ4DiTConfig
from eff_quant_vq4dit.report import held_out_path

UPDATES = 1200
VQ = VQ4DiTConfig(k=32, d=4, trajectories=12)
RATES = (1e-4, 1e-3)


def digits_dit(run: ClaimRun) -> dict[str, list[float]]:
    """Return errors by setting and seed."""
    measured: dict[str, list[float]] = {}
    task = Diffusion(DiffusionOptions(input_shape=(1, 8, 8), classes=tuple("0123456789")))
    for seed in run.log.track(run.seeds, "digits_dit"):
        teacher = trained_model("digits_dit", seed, UPDATES, width=64)
        inner = Run(task, torch.device("cpu"), seed)
        test, validation = held_out_path(teacher, inner), held_out_path(teacher, inner, "validation")
        found = {"a_rounding_2_bit": error(_rounded(teacher, 2), test)}
        found["b_kmeans"] = error(
            calibrated(teacher, VQ.model_copy(update={"n_candidates": 1, "trajectories": 0}), inner), test
        )
        only = [
            calibrated(teacher, VQ.model_copy(update={"n_candidates": 1, "lr_codebook": rate, "lr_bias": rate}), inner)
            for rate in RATES
        ]
        best = min(only, key=lambda model: error(model, validation))
        found["c_codebook_only"] = error(best, test)
        found["d_vq4dit"] = error(calibrated(teacher, VQ, inner), test)
        found["d_over_c"] = found["d_vq4dit"] / found["c_codebook_only"]
        for name, value in found.items():
            measured.setdefault(name, []).append(value)
    return measured


def calibrated(teacher: nn.Module, config: VQ4DiTConfig, run: Run) -> nn.Module:
    """Return a finished model."""
    student = insert(copy.deepcopy(teacher), config, {}, run)
    work = Calibration(teacher_of(teacher), student, config, run)
    for index in range(work.steps):
        work.step(index)
    work.finish()
    for name, layer in soft_layers(student).items():
        replace_module(student, name, layer.finished())
    return student


def _rounded(teacher: nn.Module, bits: int) -> nn.Module:
    """Return the model with the same layers rounded to nearest on a grid per output channel."""
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        for name in choose_layers(model, VQ):
            layer = model.get_submodule(name)
            layer.weight.copy_(rounded(layer.weight, bits))  # type: ignore[operator,union-attr,arg-type]
    return model


def error(model: nn.Module, path: Trajectories) -> float:
    """Return the mean noise error over a path."""
    errors = path_error(model, path)
    return sum(errors) / len(errors)
