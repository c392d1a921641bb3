"""The claims at desk scale, on digits at 16 x 16 with light noise; 20 epochs for every setting.

`digits`: formats int2, int4 and int8, 1.1 times the cost of int4. Five convolutions and a linear layer (59 thousand
weights), SGD 0.01 (core's 0.05 diverges with int2); first and last layer at int8 throughout. `random` is the mean over
three assignments within 5 % of the target, each trained from scratch; `sensitivity` quantizes the float model without
training, formats by each layer's own rise of the training loss; `retrained` trains anew at the formats found. The reward
sees training batches alone.

`floating`: FP4 (e2m1, e3m0), FP8 (e4m3, e5m2), int4 and int8 in one search, on a net of 5 thousand weights, for which 4 bits are
few. `searched_4` and `searched_8` search at the cost of 4 and of 8 bits everywhere, `searched_6` halfway; `retrained_4` trains
anew at the formats of `searched_4`.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.claims import ClaimRun
from eff.data import Batch, Data, Split, load_data
from eff.measure import task_metrics
from eff.models import make_task
from eff.run import Run
from eff.schemas import CORE_TRAINING, TaskSpec
from eff.seeding import seed_everything
from eff.session import Chosen, Plugins
from eff.training import Training
from eff_quant_fliqs.config import FLIQSConfig
from eff_quant_fliqs.layers import cost, insert, set_choices
from eff_quant_fliqs.plugin import FLIQS
from eff_quant_fliqs.report import training_loss
from eff_quant_kit.allocation import Budget, allocate
from eff_quant_kit.layers import reestimate_batch_norm

FORMATS = ("int2", "int4", "int8")
FLOATING = ("int4", "e2m1", "e3m0", "int8", "e4m3", "e5m2")
WIDE, NARROW = (16, 32, 32, 48, 48), (6, 8, 8, 12, 12)
OVER_INT4, DRAWS, EPOCHS, NOISE = 1.1, 3, 20, 0.1


class Held:
    """Images and labels in memory."""

    def __init__(self, images: Tensor, labels: Tensor, name: str):
        self.images, self.labels, self.name = images, labels, name

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.labels)

    def batch(self, indices: object, generator: torch.Generator | None = None) -> Batch:
        """Return samples as one batch."""
        chosen = torch.tensor(list(indices))  # type: ignore[call-overload]
        return {"image": self.images[chosen], "label": self.labels[chosen]}

    def fingerprint(self) -> str:
        """Return a name."""
        return self.name


class Net(nn.Sequential):
    """Five convolutions with batch norm and ReLU, the second and the fourth of stride 2, then a linear layer."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in zip((1, *widths), widths, (1, 2, 1, 2, 1), strict=False):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], 10))


def noisy_digits(seed: int) -> Data:
    """Return the digits, bilinear at 16 x 16, with Gaussian noise."""
    data = load_data(f"digits?seed={seed}")
    generator = torch.Generator().manual_seed(seed)

    def held(split: Split, name: str) -> Held:
        batch = split.batch(range(len(split)))
        images = F.interpolate(batch["image"], size=(16, 16), mode="bilinear", align_corners=False)
        images = (images + NOISE * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        return Held(images, batch["label"], f"{split.fingerprint()}/{name}")

    task = TaskSpec(name=data.task.name, options={**data.task.options, "input_shape": [1, 16, 16]})
    return Data(data.spec, task, held(data.split("train"), "train"), held(data.split("test"), "test"))


def digits(run: ClaimRun) -> dict[str, list[float]]:
    """Return accuracies and costs by setting and seed."""
    return run.by_seed("digits", _one_seed)


def floating(run: ClaimRun) -> dict[str, list[float]]:
    """Return accuracies of FP4, FP8 and integer formats and of searches among them, and costs, by seed."""
    return run.by_seed("floating", _floating)


def _one_seed(seed: int) -> dict[str, float]:
    data = noisy_digits(seed)
    base, structure = _start(WIDE, data, seed)
    count = len(structure["decisions"])
    target = OVER_INT4 * cost(structure, FLIQSConfig(formats=FORMATS), [1] * count)
    config = FLIQSConfig(formats=FORMATS, target_cost=target)
    found: dict[str, float] = {}
    found["searched"], chosen, found["searched_entropy"] = _searched(base, data, seed, config)
    found["searched_cost_over_target"] = cost(structure, config, chosen) / target
    for index, name in enumerate(FORMATS):
        found[f"uniform_{name}"] = _fixed(base, data, seed, config, [index] * count)
    found["retrained"] = _fixed(base, data, seed, config, chosen)
    draws = random_assignments(structure, config, target, count, seed)
    accuracies = [_fixed(base, data, seed, config, draw) for draw in draws]
    found["random"], found["random_best"] = sum(accuracies) / len(accuracies), max(accuracies)
    float_model, run = _train(copy.deepcopy(base), data, seed, None)
    found["float"] = _accuracy(float_model, data, run)
    found["sensitivity"] = _after_training(float_model, data, seed, target)
    return found


def _floating(seed: int) -> dict[str, float]:
    data = noisy_digits(seed)
    base, structure = _start(NARROW, data, seed)
    count, every = len(structure["decisions"]), FLIQSConfig(formats=FLOATING)
    found = {name: _fixed(base, data, seed, every, [index] * count) for index, name in enumerate(FLOATING)}
    low, high = (cost(structure, every, [FLOATING.index(name)] * count) for name in ("int4", "int8"))
    chosen = {}
    for name, target in (("4", low), ("6", (low + high) / 2), ("8", high)):
        config = FLIQSConfig(formats=FLOATING, target_cost=target)
        found[f"searched_{name}"], chosen[name], _ = _searched(base, data, seed, config)
        found[f"searched_{name}_cost"] = cost(structure, config, chosen[name])
        found[f"searched_{name}_floating"] = 100 * sum(FLOATING[c].startswith("e") for c in chosen[name]) / count
    found["retrained_4"] = _fixed(base, data, seed, every, chosen["4"])
    return found | {"uniform_4_cost": low}


def _start(widths: tuple[int, ...], data: Data, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return an untrained net, and what a search knows of it: decisions and costs, the same for all formats."""
    seed_everything(seed, "model")
    base, structure = Net(widths), {}
    insert(copy.deepcopy(base), FLIQSConfig(formats=FORMATS), structure, _run(data, seed))
    return base, structure


def _searched(base: nn.Module, data: Data, seed: int, config: FLIQSConfig) -> tuple[float, list[int], float]:
    """Return the accuracy of a search with its shared weights, the formats found, and the policy's entropy."""
    method = FLIQS(config)
    model, run = _train(copy.deepcopy(base), data, seed, method)
    found: dict[str, Any] = dict(method.structure)
    return _accuracy(model, data, run), [int(index) for index in found["chosen"]], float(found["entropy"])


def random_assignments(structure: object, config: FLIQSConfig, target: float, count: int, seed: int) -> list[list[int]]:
    """Return different assignments whose cost is within 5 % of the target."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = []
    for _ in range(100_000):
        draw = torch.randint(len(FORMATS), (count,), generator=generator).tolist()
        if abs(cost(structure, config, draw) / target - 1) <= 0.05 and draw not in found:  # type: ignore[arg-type]
            found.append(draw)
        if len(found) == DRAWS:
            break
    return found


def _run(data: Data, seed: int) -> Run:
    recipe = CORE_TRAINING.model_copy(update={"epochs": EPOCHS, "augment": False, "lr": 0.01})
    return Run(
        make_task(data.task, Plugins([], extensions=())), torch.device("cpu"), seed, data, train=recipe, training=True
    )


def _train(model: nn.Module, data: Data, seed: int, method: FLIQS | None) -> tuple[nn.Module, Run]:
    plugins = Plugins([Chosen("quant_fliqs", "", "eff-quant-fliqs", method)] if method else [], extensions=())
    run = _run(data, seed)
    if method is not None:
        seed_everything(seed, "transform")
        model = method.transform(model=model, run=run)
    Training(model, run, plugins).run_all()
    if method is not None:
        model = method.finish(model, run)
    return model.eval(), run


def _fixed(base: nn.Module, data: Data, seed: int, config: FLIQSConfig, choices: list[int]) -> float:
    """Return the accuracy of a network trained at fixed formats."""
    structure: dict[str, object] = {}
    run = _run(data, seed)
    model = insert(copy.deepcopy(base), config, structure, run)
    set_choices(model, structure, choices)
    Training(model, run, Plugins([], extensions=())).run_all()
    reestimate_batch_norm(model, run.batches("train", 1024, 64), lambda batch: run.forward(model, batch))
    return _accuracy(model.eval(), data, run)


def _after_training(model: nn.Module, data: Data, seed: int, target: float) -> float:
    """Return the accuracy of the float model quantized by single-layer sensitivity within the target."""
    structure: dict[str, object] = {}
    run, config = _run(data, seed), FLIQSConfig(formats=FORMATS)
    changed = insert(copy.deepcopy(model), config, structure, run).eval()
    count = len(structure["decisions"])  # type: ignore[arg-type]
    losses, use = np.zeros((count, len(FORMATS))), np.zeros((count, len(FORMATS)))
    highest = [len(FORMATS) - 1] * count
    fixed = cost(structure, config, highest)
    for row in range(count):
        for column in range(len(FORMATS)):
            choices = [*highest[:row], column, *highest[row + 1 :]]
            set_choices(changed, structure, choices)
            losses[row, column] = training_loss(changed, run)
            use[row, column] = cost(structure, config, choices) - fixed
    chosen = allocate("quant_fliqs", losses, [Budget("cost", use, target - fixed)]).choices
    set_choices(changed, structure, list(chosen))
    return _accuracy(changed, data, run)


def _accuracy(model: nn.Module, data: Data, run: Run) -> float:
    return task_metrics(model, data, run).values["accuracy"].value
