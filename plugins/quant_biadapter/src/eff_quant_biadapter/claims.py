"""The claim at desk scale: a small ViT that knows upright digits learns them turned by 90 degrees from 200 images.

The ViT (width 64, depth 2) is trained on the digits for 25 epochs, then frozen. Of 200 labelled images turned by 90 degrees
150 train and 50 choose s in {0.1, 1, 10}, for every variant alike; the held-out 40 %, turned too, are looked at once. 60
epochs, AdamW 1e-3, batch 32; all variants train a float head, counted in bytes on every side.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from eff.claims import ClaimRun
from eff.data import Batch, Data, Split, load_data
from eff.measure import task_metrics
from eff.models import build_model, make_task, parse_source
from eff.run import Run
from eff.schemas import CORE_TRAINING, TrainOptions
from eff.seeding import seed_everything
from eff.session import Chosen, Plugins
from eff.training import Training
from eff_quant_biadapter.config import BiAdapterConfig
from eff_quant_biadapter.insert import adapter_layers
from eff_quant_biadapter.plugin import BiAdapter
from eff_quant_biadapter.report import noise_curve
from eff_quant_biadapter.storage import dump, load, payload_bytes, read_header

LABELLED, VALIDATION = 200, 50
SCALES = (0.1, 1.0, 10.0)
RECIPE = TrainOptions(epochs=60, batch_size=32, augment=False)
VARIANTS = {
    "float_h1": {"bits": 32, "dim": 1},
    "bits4_h8": {"bits": 4, "dim": 8},
    "bits2_h16": {"bits": 2, "dim": 16},
    "bits1_h32": {"bits": 1, "dim": 32},
    "float_h32": {"bits": 32, "dim": 32},
    "sign_h32": {"bits": 1, "dim": 32, "codebook": "sign"},
}


class Turned:
    """Some samples of a split, turned by 90 degrees."""

    def __init__(self, split: Split, indices: Sequence[int]):
        self.split, self.indices = split, list(indices)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.indices)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return samples as one batch."""
        batch = self.split.batch([self.indices[index] for index in indices], generator)
        return {**batch, "image": batch["image"].transpose(-1, -2).flip(-1)}

    def fingerprint(self) -> str:
        """Return that of the whole split, marked."""
        return f"{self.split.fingerprint()}/turned"


def vit_digits(run: ClaimRun) -> dict[str, list[float]]:
    """Return accuracies and bytes by variant and seed."""
    return run.by_seed("vit_digits", _one_seed)


def _one_seed(seed: int) -> dict[str, float]:
    whole = load_data(f"digits?seed={seed}")
    train, test = whole.split("train"), whole.split("test")
    base = pretrained(whole, seed)
    fit = Turned(train, range(VALIDATION, LABELLED))
    validation = Data(whole.spec, whole.task, fit, Turned(train, range(VALIDATION)))
    held_out = Data(whole.spec, whole.task, fit, Turned(test, range(len(test))))
    found: dict[str, float] = {}
    best: dict[str, tuple[float, nn.Module, BiAdapter]] = {}
    for name, options in VARIANTS.items():
        for scale in SCALES:
            method = BiAdapter(BiAdapterConfig(scale=scale, **options))  # type: ignore[arg-type]
            model, run = _adapt(copy.deepcopy(base), validation, seed, method)
            accuracy = task_metrics(model, validation, run).values["accuracy"].value
            if name not in best or accuracy > best[name][0]:
                best[name] = (accuracy, model, method)
        _, model, method = best[name]
        run = _run(held_out, seed, RECIPE)
        found[name] = task_metrics(model, held_out, run).values["accuracy"].value
        found[f"{name}_bytes"] = payload_bytes(model, str(method.structure["head"]))
    found["linear"] = _probe(copy.deepcopy(base), held_out, seed)
    found |= _file(base, best["bits1_h32"][1], best["bits1_h32"][2], held_out, seed)
    run = _run(held_out, seed, RECIPE)
    weights = [layer.weight for layer in adapter_layers(best["float_h32"][1]).values()]
    found["float_h32_noise_drop"] = _drop(best["float_h32"][1], weights, held_out, run)
    full, run = _finetuned(copy.deepcopy(base), held_out, seed)
    matrices = [p for p in full.parameters() if p.ndim == 2]
    found["full_noise_drop"] = _drop(full, matrices, held_out, run)
    return found


def _drop(model: nn.Module, weights: list[nn.Parameter], data: Data, run: Run) -> float:
    """Return the accuracy lost with noise of half a standard deviation."""
    curve = {row["noise"]: row["accuracy"] for row in noise_curve(model, weights, data, run)}
    return float(curve[0.0]) - float(curve[0.5])  # type: ignore[arg-type]


def pretrained(data: Data, seed: int) -> nn.Module:
    """Return the ViT trained on upright digits."""
    plugins = Plugins()
    recipe = TrainOptions(epochs=25, batch_size=32, lr=1e-3, optimizer="adamw", augment=False).over(CORE_TRAINING)
    run = Run(make_task(data.task, plugins), torch.device("cpu"), seed, data, train=recipe, training=True)
    model = build_model(parse_source("zoo:vit_micro?depth=2"), run, plugins)
    Training(model, run, plugins).run_all()
    return model


def _run(data: Data, seed: int, recipe: TrainOptions) -> Run:
    plugins = Plugins([], extensions=())
    return Run(make_task(data.task, plugins), torch.device("cpu"), seed, data, train=recipe, training=True)


def _adapt(model: nn.Module, data: Data, seed: int, method: BiAdapter) -> tuple[nn.Module, Run]:
    plugins = Plugins([Chosen("quant_biadapter", "", "eff-quant-biadapter", method)], extensions=())
    run = _run(data, seed, RECIPE.over(method.training()).over(CORE_TRAINING))
    seed_everything(seed, "transform")
    model = method.transform(model=model, run=run)
    Training(model, run, plugins).run_all()
    return model.eval(), run


def _probe(model: nn.Module, data: Data, seed: int) -> float:
    model.requires_grad_(False)
    model.head.requires_grad_(True)  # type: ignore[union-attr]
    return task_metrics(*_trained(model, data, seed)).values["accuracy"].value


def _finetuned(model: nn.Module, data: Data, seed: int) -> tuple[nn.Module, Run]:
    model, _, run = _trained(model, data, seed)
    return model, run


def _trained(model: nn.Module, data: Data, seed: int) -> tuple[nn.Module, Data, Run]:
    run = _run(data, seed, RECIPE.over(BiAdapter().training()).over(CORE_TRAINING))
    Training(model, run, Plugins([], extensions=())).run_all()
    return model.eval(), data, run


def _file(base: nn.Module, model: nn.Module, method: BiAdapter, data: Data, seed: int) -> dict[str, float]:
    """Return what the written file says: its bytes over the formula, and how far a reloaded model is off."""
    run, head = _run(data, seed, RECIPE), str(method.structure["head"])
    d, h, depth = 64, method.config.dim, 2
    linear: nn.Linear = model.get_submodule(head)  # type: ignore[assignment]
    formula = depth * (2 * d * h * method.config.bits / 8 + 16) + 4 * (linear.weight.numel() + linear.bias.numel())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "task.bin")
        path.write_bytes(dump(model, head, method.config))
        size = len(read_header(path)[1])
        fresh = BiAdapter(method.config)
        again = fresh.transform(model=copy.deepcopy(base), run=run)
        load(again, path, head, method.config)
    with torch.no_grad():
        batch = data.split("test").batch(range(64))
        difference = (run.forward(again.eval(), batch) - run.forward(model, batch)).abs().max()
    assert math.isfinite(float(difference))
    return {"file_over_formula": size / formula, "reload_difference": float(difference)}
