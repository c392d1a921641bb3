"""The paper's claim at desk scale: 729 convolutional networks for scikit-learn's digits.

Three convolutions of 4, 8 or 16 channels with kernels of 1, 3 or 5. Every search has 25 epochs on half of the
training data (batch 32, learning rates 0.003 for weights and 0.01 for the architecture: the paper's 3e-4
is for a hundred times more steps). Every network is then trained from scratch on all training data for 15
epochs, batch 64, and its error is measured on the held-out 40 %.
"""

from __future__ import annotations

import torch
from torch import nn

from eff.claims import ClaimRun
from eff.data import Data, load_data
from eff.measure import task_metrics
from eff.models import make_task
from eff.run import Run
from eff.schemas import CORE_TRAINING, TrainOptions
from eff.seeding import seed_everything
from eff.session import Chosen as ChosenMethod
from eff.session import Plugins
from eff.training import Training
from eff_nas_kit.layers import Selection
from eff_nas_kit.macro import DigitsMacroOptions, MacroNet
from eff_nas_kit.samplers import random_network
from eff_nas_kit.space import Chosen, SearchSpace
from eff_nas_kit.supernet import discretise
from eff_nas_tangle.config import TangleConfig
from eff_nas_tangle.cost import Size, largest_difference, measure_layer
from eff_nas_tangle.plugin import TangleNAS

SEARCH = TangleConfig(
    kernel_choices=(1, 3, 5), epochs=25, batch_size=32, lr=3e-3, arch_lr=1e-2, history_samples=0, search_samples=50
)
SEARCHES = {
    "tangle": SEARCH,
    "output_darts": SEARCH.model_copy(update={"optimizer": "darts", "mixing": "output"}),
    "spos": SEARCH.model_copy(update={"optimizer": "spos"}),
    "tangle_size": SEARCH.model_copy(update={"size_weight": 1.0}),
}
RANDOM = 20
ALONE = CORE_TRAINING.model_copy(
    update={
        "optimizer": "adam",
        "lr": 3e-3,
        "epochs": 15,
        "weight_decay": 5e-4,
        "schedule": "constant",
        "augment": False,
    }
)
LAYER = Size()


def digits_macro(run: ClaimRun) -> dict[str, list[float]]:
    """Return errors in %, parameters in % of the largest network, and the ratios of time and memory, for each seed."""
    rows = [_one_seed(seed) for seed in run.log.track(run.seeds, "digits_macro")]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _one_seed(seed: int) -> dict[str, float]:
    data = load_data(f"digits?seed={seed}")
    measured = _costs()
    space: SearchSpace | None = None
    for name, config in SEARCHES.items():
        space, chosen = search(config, data, seed)
        measured[f"error_{name}"], measured[f"share_{name}"] = train_alone(space, chosen, data, seed)
    assert space is not None  # there is at least one search
    generator = torch.Generator().manual_seed(seed)
    random = [train_alone(space, random_network(space, generator), data, seed) for _ in range(RANDOM)]
    measured["error_random"], measured["share_random"] = (sum(column) / RANDOM for column in zip(*random, strict=True))
    measured["error_largest"], _ = train_alone(space, space.largest, data, seed)
    measured["better_than_random"] = float(measured["error_tangle"] <= measured["error_random"])
    return measured


def _costs() -> dict[str, float]:
    few, many = (measure_layer(count, "entangled", LAYER) for count in (3, 27))
    output = measure_layer(27, "output", LAYER)
    return {
        "time_entangled_over_output_27": many.milliseconds / output.milliseconds,
        "time_entangled_27_over_3": many.milliseconds / few.milliseconds,
        "memory_entangled_27_over_3": many.kept_bytes / few.kept_bytes,
        "memory_output_over_entangled_27": output.kept_bytes / many.kept_bytes,
        "largest_difference": largest_difference(LAYER),
    }


def search(config: TangleConfig, data: Data, seed: int) -> tuple[SearchSpace, Chosen]:
    """Search once; return the space and the network chosen."""
    method = TangleNAS(config)
    plugins = Plugins([ChosenMethod("nas_tangle", "", "eff-nas-tangle", method)], extensions=())
    recipe = CORE_TRAINING.model_copy(update={"augment": False})
    run = _run(data, seed, method.training().over(recipe), plugins)
    run.training = True
    seed_everything(seed, "model")
    model = method.transform(model=MacroNet(DigitsMacroOptions()), run=run)
    training = Training(model, run, plugins)
    training.run_all()
    run.training = False
    method.finish(training.raw_model, run)
    chosen: dict[str, int] = method.structure["chosen"]  # type: ignore[assignment]
    return SearchSpace.model_validate(method.structure["space"]), chosen


def train_alone(space: SearchSpace, chosen: Chosen, data: Data, seed: int) -> tuple[float, float]:
    """Train one network from scratch; return its test error in % and its size in % of the largest."""
    seed_everything(seed, "alone")
    largest = MacroNet(DigitsMacroOptions())
    parameters = _parameters(largest)
    network = discretise(largest, Selection(space), chosen)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()
    plugins = Plugins((), extensions=())
    run = _run(data, seed, ALONE, plugins)
    Training(network, run, plugins).run_all()
    error = 100.0 - task_metrics(network, data, run).values["accuracy"].value
    return error, 100.0 * _parameters(network) / parameters


def _run(data: Data, seed: int, train: TrainOptions, plugins: Plugins) -> Run:
    return Run(make_task(data.task, plugins), torch.device("cpu"), seed, data, train=train)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
