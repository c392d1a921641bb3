"""The claim at desk scale: digits in several sizes on smooth textures, 64 x 64, found by a narrow CoDeNet.

1,500 training and 300 test scenes, one class. The variants start from the same seed and have the same
epochs, recipe and width; what differs is how the decoder samples. `square` is then quantized to W4A8 by training and by
rounding alone; `square_more` is the float detector trained for those epochs too, because they would help it as well.
Two more say what costs: `square_whole_offsets` is the float detector with whole offsets, `square_rounded_fine` rounds to W4A8
with offsets of 8 bits.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from eff.claims import ClaimRun
from eff.data import Data, load_data
from eff.measure import task_metrics
from eff.models import build_model, make_task
from eff.run import Run
from eff.schemas import CORE_TRAINING, ModelSpec, TaskSpec, TrainOptions
from eff.seeding import seed_everything
from eff.session import Chosen, Plugins
from eff.training import Training
from eff_quant_codenet.config import CoDeNetConfig
from eff_quant_codenet.deform import DeformConv2d
from eff_quant_codenet.extension import DetectionExtension
from eff_quant_codenet.plugin import CoDeNetMethod

DATA = "scenes?classes=1&seed={seed}"
FLOAT = TrainOptions(epochs=12, batch_size=32, lr=4e-3, optimizer="adam", weight_decay=0.0, augment=False).over(
    CORE_TRAINING
)
QAT = TrainOptions(epochs=6, lr=1e-3).over(FLOAT)


def scenes(run: ClaimRun) -> dict[str, list[float]]:
    """Return AP50 by setting and seed."""
    return run.by_seed(
        "scenes", lambda seed: measure(load_data(DATA.format(seed=seed), None, _sources()), seed, FLOAT, QAT)
    )


def _sources() -> dict[str, str]:
    return dict(DetectionExtension.data_sources)


def measure(data: Data, seed: int, float_recipe: TrainOptions, qat_recipe: TrainOptions) -> dict[str, float]:
    """Return AP50 of the variants in float, and of `square` with W4A8, for one seed."""
    found = {}
    base = None
    for deform in ("none", "full", "square"):
        base, run = make_detector(deform, data, seed)
        train(base, run, float_recipe)
        found[deform] = ap50(base, data, run)
    assert base is not None
    more, run = train(copy.deepcopy(base), _run(data, seed), qat_recipe)
    found["square_more"] = ap50(more, data, run)
    for name, epochs, whole in (
        ("square_w4a8", qat_recipe.epochs, True), ("square_rounded", 0, True), ("square_rounded_fine", 0, False),
    ):  # fmt: skip
        recipe = TrainOptions(epochs=epochs).over(qat_recipe)
        method = CoDeNetMethod(CoDeNetConfig(round_offsets=whole))
        quantized, run = train(copy.deepcopy(base), _run(data, seed), recipe, method)
        found[name] = ap50(quantized, data, run)
    for module in base.modules():
        if isinstance(module, DeformConv2d):
            module.round_offsets = True
    found["square_whole_offsets"] = ap50(base, data, run)
    return found


def make_detector(deform: str, data: Data, seed: int) -> tuple[nn.Module, Run]:
    """Return an untrained detector; the variants differ in the sampling alone."""
    run = _run(data, seed)
    spec = ModelSpec(source="codenet:small", options={"deform": deform, **run.task.model_options()})
    return build_model(spec, run, _plugins()), run


def train(
    model: nn.Module, run: Run, recipe: TrainOptions, method: CoDeNetMethod | None = None
) -> tuple[nn.Module, Run]:
    """Train `model` in place, quantized by `method` where there is one; return what is shipped."""
    plugins = _plugins(method)
    run.train, run.training = recipe, True
    if method is not None:
        seed_everything(run.seed, "transform")
        model = method.transform(model=model, run=run)
    if recipe.epochs:
        Training(model, run, plugins).run_all()
    if method is not None:
        model = method.finish(model, run)
    return model.eval(), run


def ap50(model: nn.Module, data: Data, run: Run) -> float:
    """Return AP50 on the test scenes, in %."""
    return task_metrics(model, data, run).values["AP50"].value


def _plugins(method: CoDeNetMethod | None = None) -> Plugins:
    chosen = [Chosen("quant_codenet", "", "eff-quant-codenet", method)] if method else []
    return Plugins(chosen, extensions=[("codenet_detection", DetectionExtension())])


def _run(data: Data, seed: int) -> Run:
    return Run(
        make_task(TaskSpec(name="detection", options=data.task.options), _plugins()), torch.device("cpu"), seed, data
    )
