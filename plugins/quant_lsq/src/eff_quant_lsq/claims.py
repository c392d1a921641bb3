"""The paper's claim at desk scale: 2-bit weights and inputs on scikit-learn's digits.

A small CNN (three convolutions, one linear layer) is trained for 12 epochs in float, then 8 epochs
with 2-bit weights and inputs (first and last layer 8 bit), SGD 0.01, cosine; all settings share the
schedule. Accuracy in % on the held-out 40 %.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from eff.claims import ClaimRun
from eff.data import Data, load_data
from eff.measure import task_metrics
from eff.models import make_task
from eff.run import Run
from eff.schemas import CORE_TRAINING, TrainOptions
from eff.seeding import seed_everything
from eff.session import Chosen, Plugins
from eff.training import Training
from eff_quant_kit.layers import initialise_inputs, quant_layers
from eff_quant_kit.observers import minmax_symmetric
from eff_quant_kit.quantizer import Quantizer, quantizers_of
from eff_quant_lsq.config import LSQConfig
from eff_quant_lsq.plugin import LSQ

FLOAT_EPOCHS = 12
W2A2 = LSQConfig(weight_bits=2, act_bits=2)


class DigitsCNN(nn.Sequential):
    """Three convolutions (8, 16, 16 channels) with batch norm and ReLU, then a linear layer."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in ((1, 8, 1), (8, 16, 2), (16, 16, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def w2a2_digits(run: ClaimRun) -> dict[str, list[float]]:
    """Return the accuracy of each setting for each seed."""
    measured: dict[str, list[float]] = {"float": [], "lsq": [], "minmax": [], "init_frozen": [], "no_grad_scale": []}
    for seed in run.log.track(run.seeds, "w2a2_digits"):
        data = load_data(f"digits?seed={seed}")
        seed_everything(seed, "model")
        model = DigitsCNN()
        recipe = CORE_TRAINING.model_copy(update={"epochs": FLOAT_EPOCHS, "augment": False})
        measured["float"].append(_train(model, data, seed, recipe, None, None))
        quantized = LSQ(W2A2).training().over(recipe)
        for name, config, prepare in (
            ("lsq", W2A2, None),
            ("minmax", W2A2, freeze_minmax),
            ("init_frozen", W2A2, freeze),
            ("no_grad_scale", W2A2.model_copy(update={"grad_scale": "none"}), None),
        ):
            measured[name].append(_train(copy.deepcopy(model), data, seed, quantized, LSQ(config), prepare))
    return measured


def _train(
    model: nn.Module,
    data: Data,
    seed: int,
    recipe: TrainOptions,
    method: LSQ | None,
    prepare: Callable[[nn.Module, Run], None] | None,
) -> float:
    chosen = [Chosen("quant_lsq", "", "eff-quant-lsq", method)] if method else []
    plugins = Plugins(chosen, extensions=())
    run = Run(make_task(data.task, plugins), torch.device("cpu"), seed, data, train=recipe, training=True)
    if method is not None:
        seed_everything(seed, "transform")
        model = method.transform(model=model, run=run)
    if prepare is not None:
        prepare(model, run)
    Training(model, run, plugins).run_all()
    return task_metrics(model, data, run).values["accuracy"].value


def freeze(model: nn.Module, run: Run) -> None:
    """Stop the training of all steps: LSQ's initial values stay."""
    for quantizer in quantizers_of(model):
        quantizer.scale.requires_grad_(False)


def freeze_minmax(model: nn.Module, run: Run) -> None:
    """Give every quantizer a frozen step that just covers the range of the weights or the first batch."""
    for layer in quant_layers(model).values():
        if layer.weight_quantizer is not None:
            quantizer = layer.weight_quantizer
            quantizer.set_scale(minmax_symmetric(layer.layer.weight, quantizer.q_max))  # type: ignore[arg-type]
        if layer.input_quantizer is not None:
            layer.input_quantizer.initialised.fill_(False)

    def initialise(quantizer: Quantizer, x: Tensor) -> None:
        quantizer.set_scale(minmax_symmetric(x, quantizer.q_max))

    batch = next(run.batches("train", W2A2.init_batch, W2A2.init_batch))
    initialise_inputs(model, initialise, lambda: run.forward(model, batch))
    freeze(model, run)
