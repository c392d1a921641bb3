"""The claim at desk scale: a CNN on digits, its middle convolutions at 8, 6, 4 and 2 bits.

12 epochs in float, then 10 of joint training, Adam 1e-3, the same for every setting; ALRS as printed unless the name says
otherwise. `plain_2` is a model trained at 8 bits alone whose integers are shifted to 2 bits. `worst` is the lowest accuracy
over the widths.

And of the file: its bytes on disk, header included, beside one of 8 bits alone (of this method, and of quant_lsq, which must be
installed; the same layers in float), and the sum of four files of one width each. Training changes no size, so nothing is trained.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eff.claims import ClaimRun
from eff.data import Data, load_data
from eff.measure import task_metrics
from eff.models import make_task
from eff.run import Run
from eff.runner import apply
from eff.schemas import CORE_TRAINING, MethodUse, Metric, Recipe, TrainOptions
from eff.seeding import seed_everything
from eff.session import Chosen, Plugins
from eff.training import Training
from eff_quant_double_rounding.config import DoubleRoundingConfig
from eff_quant_double_rounding.layers import switch, switch_layers
from eff_quant_double_rounding.plugin import DoubleRounding
from eff_quant_kit.layers import initialise_inputs
from eff_quant_kit.learned_steps import lsq_step

SETTINGS: dict[str, dict[str, Any]] = {
    "double": {},
    "double_ratio": {"alrs": "ratio"},
    "double_off": {"alrs": "off"},
    "floor": {"rounding": "floor"},
    "floor_centred": {"rounding": "floor_centred"},
}

ENDS = ["conv1", "linear"]  # in float here; quant_lsq would have them at 8 bits
NETS = {"resnet20": "zoo:cifar_resnet20", "wide": "zoo:digits_cnn?width=128"}


class DigitsCNN(nn.Sequential):
    """Four convolutions (8, 16, 16, 16 channels) with batch norm and ReLU, then a linear layer."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in ((1, 8, 1), (8, 16, 2), (16, 16, 1), (16, 16, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def digits(run: ClaimRun) -> dict[str, list[float]]:
    """Return accuracies by setting, width and seed."""
    return run.by_seed("digits", _one_seed)


def _one_seed(seed: int) -> dict[str, float]:
    data = load_data(f"digits?seed={seed}")
    seed_everything(seed, "model")
    base: nn.Module = DigitsCNN()
    recipe = TrainOptions(epochs=12, augment=False).over(CORE_TRAINING)
    run = train(base, data, seed, recipe, None)[1]
    found = {"float": task_metrics(base, data, run).values["accuracy"].value}
    for name, options in SETTINGS.items():
        config = DoubleRoundingConfig(lr=1e-3, epochs=10, **options)
        method = DoubleRounding(config)
        model, run = train(copy.deepcopy(base), data, seed, method.training().over(recipe), method)
        accuracies = []
        for width in config.widths:
            switch(model, method.structure, width)
            accuracies.append(task_metrics(model, data, run).values["accuracy"].value)
            found[f"{name}_{width}"] = accuracies[-1]
        found[f"{name}_worst"] = min(accuracies)
        if name == "double":
            layers = switch_layers(model).values()
            found["nested"] = 100 * sum(layer.nested() for layer in layers) / len(layers)
    single = DoubleRounding(DoubleRoundingConfig(bits=(8,), lr=1e-3, epochs=10))
    model, run = train(copy.deepcopy(base), data, seed, single.training().over(recipe), single)
    switch(model, single.structure, 8)
    found["single_8"] = task_metrics(model, data, run).values["accuracy"].value
    found["plain_2"] = _shifted(model, single, data, run)
    return found


def _shifted(model: nn.Module, single: DoubleRounding, data: Data, run: Run) -> float:
    """Return the accuracy of an 8-bit model whose integers are shifted to 2 bits, its inputs' scales set for 2 bits."""
    config = single.config.model_copy(update={"bits": (8, 2)})
    for layer in switch_layers(model).values():
        layer.config = config
        quantizer = copy.deepcopy(layer.inputs["8"])
        quantizer.bits = 2
        quantizer.set_signed(quantizer.signed)
        quantizer.initialised.fill_(False)
        layer.inputs["2"] = quantizer
        layer.width = 2
    batch = next(run.batches("train", 256, 256))
    initialise_inputs(model, lambda q, x: q.set_scale(lsq_step(x, q.q_max)) and None, lambda: run.forward(model, batch))
    return task_metrics(model, data, run).values["accuracy"].value


def files(run: ClaimRun) -> dict[str, list[float]]:
    """Return bytes by net, file and seed: of files on disk, and of codes and norms in the file of all widths."""
    return run.by_seed(
        "files", lambda seed: {k: v for name, source in NETS.items() for k, v in _files(name, source, seed)}
    )


def _files(net: str, source: str, seed: int) -> Iterator[tuple[str, float]]:
    size, found = _file(source, seed, "quant_double_rounding", {})
    yield f"{net}_all", size
    for part in ("code", "norm"):
        yield f"{net}_all_{part}", found[f"{part}_bytes"].value
    alone = {b: _file(source, seed, "quant_double_rounding", {"bits": [b]})[0] for b in (8, 6, 4, 2)}
    yield f"{net}_8_alone", alone[8]
    yield f"{net}_8_lsq", _file(source, seed, "quant_lsq", {"weight_bits": 8, "act_bits": 8, "exclude": ENDS})[0]
    yield f"{net}_four_files", sum(alone.values())


def _file(source: str, seed: int, method: str, options: dict[str, Any]) -> tuple[int, dict[str, Metric]]:
    """Return the size of the packed file, untrained, and the metrics of the model."""
    recipe = Recipe(
        model=source, data="digits?train=256&test=64", device="cpu", seed=seed,
        methods=(MethodUse(name=method, options=options),), train=TrainOptions(epochs=0), export=("packed",),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        report = apply(recipe, Path(folder, "run"))
        return Path(folder, "run", "model.packed.safetensors").stat().st_size, report.after.metrics.values


def train(
    model: nn.Module, data: Data, seed: int, recipe: TrainOptions, method: DoubleRounding | None
) -> tuple[nn.Module, Run]:
    """Train and return the model in eval mode with its run."""
    plugins = Plugins(
        [Chosen("quant_double_rounding", "", "eff-quant-double-rounding", method)] if method else [], extensions=()
    )
    run = Run(make_task(data.task, plugins), torch.device("cpu"), seed, data, train=recipe, training=True)
    if method is not None:
        seed_everything(seed, "transform")
        model = method.transform(model=model, run=run)
    Training(model, run, plugins).run_all()
    return model.eval(), run
