"""The paper's claim at desk scale: scikit-learn's digits, sub-vectors of 16 weights, 16 codewords.

A CNN (32, 64, 64 channels) is trained for 30 epochs in float; its two wide convolutions are then compressed. All settings
share sub-vectors, codewords, epochs (10 + 10), learning rate and temperatures. DKM is the same method with d = m = 16 and no
projection. 200 images of the training split are kept from training and choose the best d; the held-out 30 % choose nothing.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from eff.claims import ClaimRun
from eff.data import Batch, Data, Split, load_data
from eff.measure import task_metrics
from eff.models import make_task
from eff.run import Run
from eff.schemas import CORE_TRAINING, TrainOptions
from eff.seeding import seed_everything
from eff.session import Chosen, Plugins
from eff.training import Training
from eff_quant_lr2vq.block import to_groups
from eff_quant_lr2vq.config import LR2VQConfig
from eff_quant_lr2vq.insert import PLUGIN
from eff_quant_lr2vq.plugin import LR2VQ
from eff_quant_lr2vq.rank import approximation_error, clustering_error, spectrum
from eff_quant_lr2vq.report import layer_bits

M = K = 16
GRID = (2, 4, 8)
VALIDATION = 200


class DigitsCNN(nn.Sequential):
    """Three convolutions (32, 64, 64 channels) with batch norm and ReLU, pooling, a linear layer."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Part:
    """Some samples of a split."""

    def __init__(self, split: Split, indices: Sequence[int]):
        self.split, self.indices = split, list(indices)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.indices)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return samples as one batch."""
        return self.split.batch([self.indices[index] for index in indices], generator)

    def fingerprint(self) -> str:
        """Return that of the whole split."""
        return self.split.fingerprint()


def m16_digits(run: ClaimRun) -> dict[str, list[float]]:
    """Return accuracies, errors of the float weights, and bytes, for each seed."""
    return run.by_seed("m16_digits", _one_seed)


def _one_seed(seed: int) -> dict[str, float]:
    whole = load_data(f"digits?seed={seed}&train=1258&test=539")
    split = whole.split("train")
    data = dataclasses.replace(whole, train=Part(split, range(VALIDATION, len(split))))
    validation = dataclasses.replace(whole, test=Part(split, range(VALIDATION)))
    seed_everything(seed, "model")
    model = DigitsCNN()
    recipe = CORE_TRAINING.model_copy(update={"augment": False, "epochs": 30, "lr": 0.02})
    found = {"float": _train(model, data, seed, recipe, None)}
    found |= float_errors(model, seed)
    chosen: dict[str, float] = {}
    options: dict[str, tuple[int | str, int | None]] = {
        "kmeans": (M, 0), "dkm": (M, None), "auto": ("auto", None), **{f"d{d}": (d, None) for d in GRID},
    }  # fmt: skip
    for name, (d, epochs) in options.items():
        method = LR2VQ(LR2VQConfig(m=M, k=K, d_tilde=d, skip=("0", "11")))
        schedule = method.training().over(recipe)
        if epochs is not None:
            schedule = schedule.model_copy(update={"epochs": epochs})
        changed = copy.deepcopy(model)
        found[name] = _train(changed, data, seed, schedule, method)
        if name.startswith("d") and name != "dkm" or name == "auto":
            chosen[name] = task_metrics(changed, validation, _run(validation, seed, schedule)).values["accuracy"].value
        if name != "kmeans":
            plans = [plan for plan in method.structure["layers"].values()]  # type: ignore[union-attr]
            bits, weights = sum(map(layer_bits, plans)), sum(plan["weights"] for plan in plans)  # type: ignore[arg-type,index,call-overload,misc]
            found |= {f"{name}_bytes": bits / 8, f"{name}_ratio": 32 * weights / bits}
        if name == "auto":
            found["auto_d"] = sum(plan["d"] for plan in plans) / len(plans)  # type: ignore[index,call-overload,misc]
    found["best_by_validation"] = found[max(chosen, key=lambda key: chosen[key])]
    return found


def float_errors(model: nn.Module, seed: int) -> dict[str, float]:
    """Return both errors of the float weights, as shares of their power, mean over the two layers."""
    found: dict[str, float] = {}
    groups = [to_groups(model.get_submodule(name).weight.detach(), M, "out").reshape(-1, M) for name in ("3", "6")]  # type: ignore[operator]
    for d in (*GRID, M):
        approx = cluster = 0.0
        for s in groups:
            eigenvalues, vectors = spectrum(s)
            known = eigenvalues.tolist()
            generator = torch.Generator().manual_seed(seed)
            approx += approximation_error(known, d) / sum(known) / len(groups)
            cluster += clustering_error(s @ vectors[:d].t(), K, 100, generator) / sum(known) / len(groups)
        found |= {f"approximation_d{d}": approx, f"clustering_d{d}": cluster}
    return found


def _run(data: Data, seed: int, recipe: TrainOptions) -> Run:
    return Run(
        make_task(data.task, Plugins([], extensions=())), torch.device("cpu"), seed, data, train=recipe, training=True
    )


def _train(model: nn.Module, data: Data, seed: int, recipe: TrainOptions, method: LR2VQ | None) -> float:
    """Train in place and return the accuracy of what would be shipped."""
    plugins = Plugins([Chosen(PLUGIN, "", "eff-quant-lr2vq", method)] if method else [], extensions=())
    run = _run(data, seed, recipe)
    if method is not None:
        seed_everything(seed, "transform")
        model = method.transform(model=model, run=run)
    if recipe.epochs:
        Training(model, run, plugins).run_all()
    if method is not None:
        method.finish(model, run)
    return task_metrics(model, data, run).values["accuracy"].value
