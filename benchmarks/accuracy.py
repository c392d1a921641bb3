"""Accuracy of quant_lsq on real data and weights: CIFAR-10 ResNet-20 and EfficientNet-Lite0 on photos.

    python benchmarks/accuracy.py SHARED cifar      W4A4 and W2A2, before, after initialisation, after 2 epochs
    python benchmarks/accuracy.py SHARED photos     W8A8 initialised on 256 photos, measured on the others

SHARED is the folder with `data/` and `models/`. Prints one JSON line per setting.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from eff.log import TerminalLog
from eff.measure import task_metrics
from eff.models import ModelRequest, open_model
from eff.run import Run
from eff.runner import apply
from eff.schemas import MethodUse, Recipe, TrainOptions
from eff.session import Plugins
from eff_quant_kit.layers import reestimate_batch_norm


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("what", choices=["cifar", "photos"])
    parser.add_argument("--train", type=int, default=10_000, help="training samples of CIFAR-10")
    arguments = parser.parse_args()
    settings = cifar(arguments.shared, arguments.train) if arguments.what == "cifar" else photos(arguments.shared)
    for name, recipe in settings:
        with tempfile.TemporaryDirectory() as folder:
            report = apply(recipe, Path(folder, "run"), log=TerminalLog())
        assert report.before is not None and report.after is not None
        row = {
            "setting": name,
            "before": report.before.metrics.values["accuracy"].value,
            "after": report.after.metrics.values["accuracy"].value,
            "bytes_before": report.before.bytes,
            "bytes_after": report.after.bytes,
            "seconds": round(report.seconds),
        }
        print(json.dumps(row), flush=True)
    if arguments.what == "photos":
        row = {"setting": "efficientnet_lite0 float, batch norm from the same photos", "after": afresh(settings[-1][1])}
        print(json.dumps(row), flush=True)


def afresh(recipe: Recipe) -> float:
    """Return the float model's accuracy with batch norm's statistics from the calibration photos, as quant_lsq takes them."""
    opened = open_model(ModelRequest(recipe.model, data=recipe.data), Plugins())
    run = Run(opened.task, torch.device("cpu"), recipe.seed, opened.data)
    batches = run.batches("train", 256, recipe.train.batch_size)
    reestimate_batch_norm(opened.model, batches, lambda batch: run.forward(opened.model, batch))
    assert opened.data is not None
    return task_metrics(opened.model, opened.data, run).values["accuracy"].value


def cifar(shared: Path, train: int) -> list[tuple[str, Recipe]]:
    """Return ResNet-20 at two bit widths, initialised only and trained for two epochs."""
    (weights,) = (shared / "models").glob("resnet20-*.th")
    found = []
    for bits in (4, 2):
        use = MethodUse(name="quant_lsq", options={"weight_bits": bits, "act_bits": bits})
        for epochs in (0, 2):
            recipe = Recipe(
                model=str(weights),
                arch="zoo:cifar_resnet20",
                data=f"parquet:{shared / 'data' / 'cifar10'}?train={train}&seed=0",
                methods=(use,),
                train=TrainOptions(epochs=epochs, batch_size=128),
            )
            found.append((f"cifar_resnet20 W{bits}A{bits}, {epochs} epochs on {train}", recipe))
    return found


def photos(shared: Path) -> list[tuple[str, Recipe]]:
    """Return EfficientNet-Lite0 at 8 bits, initialised on 256 photos, without training; batch norm kept, or afresh."""
    found = []
    for samples, words in ((0, "batch norm as it was"), (256, "batch norm from the same photos")):
        options = {
            "weight_bits": 8, "act_bits": 8, "per_channel_weight": True, "init": "minmax", "bn_samples": samples,
        }  # fmt: skip
        recipe = Recipe(
            model="zoo:efficientnet_lite0?pretrained=true",
            data=f"folder:{shared / 'data' / 'imagenet1k_samples'}?train=256&seed=0",
            methods=(MethodUse(name="quant_lsq", options=options),),
            train=TrainOptions(epochs=0, batch_size=64),
        )
        found.append((f"efficientnet_lite0 W8A8 per channel, min-max steps, not trained, {words}", recipe))
    return found


if __name__ == "__main__":
    main()
