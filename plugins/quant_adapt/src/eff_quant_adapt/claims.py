"""The claim at desk scale: a LeNet-like network on digits, 30 epochs, batch 64, SGD on gradients of norm 1.

All settings share recipe, initialisation and order of the batches; `float32` has words of 32 bits with 24 of fraction for its
weights and leaves inputs, outputs and gradients alone. Accuracy in % on the held-out 40 %.
"""

from __future__ import annotations

import torch
from torch import nn

from eff.claims import ClaimRun
from eff.data import Data, load_data
from eff.measure import task_metrics
from eff.models import make_task
from eff.run import Run
from eff.schemas import CORE_TRAINING
from eff.seeding import seed_everything
from eff.session import Chosen, Plugins
from eff.training import Training
from eff_quant_adapt.config import AdaPTConfig
from eff_quant_adapt.plugin import AdaPT
from eff_quant_adapt.report import describe, of_training

FLOAT = {"adapt": False, "quant_inputs": False, "quant_outputs": False, "quant_grads": False}
SETTINGS = {
    "float32": AdaPTConfig(init="truncated", wl_init=32, fl_init=24, **FLOAT),
    "fixed_8_4": AdaPTConfig(init="truncated", adapt=False),
    "fixed_16_12": AdaPTConfig(init="truncated", wl_init=16, fl_init=12, adapt=False),
    "no_push_up": AdaPTConfig(init="truncated", push_up=False),
    "adapt": AdaPTConfig(init="truncated"),
}


def make_model() -> nn.Sequential:
    """Return two convolutions and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def digits(run: ClaimRun) -> dict[str, list[float]]:
    """Return accuracy, bits, sparsity and modelled speed-ups by setting and seed."""
    measured: dict[str, list[float]] = {}
    for seed in run.log.track(run.seeds, "digits"):
        data = load_data(f"digits?seed={seed}")
        for name, config in SETTINGS.items():
            for key, value in train(data, seed, config).items():
                measured.setdefault(f"{name}{key}", []).append(value)
    return measured


def train(data: Data, seed: int, config: AdaPTConfig) -> dict[str, float]:
    """Return what one setting reaches; the key of the accuracy is empty."""
    method = AdaPT(config)
    plugins = Plugins([Chosen("quant_adapt", "", "eff-quant-adapt", method)], extensions=())
    recipe = method.training().over(CORE_TRAINING.model_copy(update={"augment": False}))
    run = Run(make_task(data.task, plugins), torch.device("cpu"), seed, data, train=recipe, training=True)
    seed_everything(seed, "model")
    model = method.transform(model=make_model(), run=run)
    Training(model, run, plugins).run_all()
    assert method.trainer is not None
    found = describe(model.eval(), method.trainer, of_training(method.trainer), run).values
    return {
        "": task_metrics(model, data, run).values["accuracy"].value,
        "_mean_wl": found["mean_wl_in_training"].value,
        "_size_ratio": found["size_ratio"].value,
        "_sparsity": found["sparsity"].value,
        "_training_speedup": found["modelled_training_speedup"].value,
        "_inference_speedup": found["modelled_inference_speedup"].value,
    }
