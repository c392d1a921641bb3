"""Time per quantized layer of each quantization method, on one CPU model, or on the model that a method is for.

    python benchmarks/time_per_layer.py [--only quant_lsq] [--quick] [--threads 1]

Models have random weights, data are noise or generated: nothing is downloaded. Convolutional methods take CIFAR's ResNet-20.

calibration  whole calibration: from the first change of the model to the finished one, in seconds per layer
training     one training step (batch, forward, backward, optimiser), in ms per layer, beside the float model's same step
reading      one text read through the cache, in ms per layer, beside the float model's

The times grow with the steps and samples of the options, which are far fewer than for a good model; the record holds them. Medians
of repeated runs (calibration) or of the steps of one run. benchmarks/results/time-per-layer.json keeps the rows by method.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from recording import Stopwatch, circumstances, record

from eff.cli.show import print_table
from eff.runner import apply
from eff.schemas import MethodUse, Recipe, Report, TrainOptions

WHAT = "time-per-layer"
WARMUP = 2
"""Steps that are not counted: the first ones allocate and observe ranges."""


@dataclass(frozen=True)
class Setting:
    """How a method is run here."""

    kind: Literal["calibration", "training", "reading"]
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "zoo:cifar_resnet20"
    data: str = "calibration_memory:noise?size=32"
    batch: int = 16
    layers: int | None = None
    """Of methods whose file does not say how many it holds."""


DENOISER = {"model": "diffusion:digits_dit", "data": "diffusion_digits?test=16"}
SETTINGS = {
    "quant_adaquant": Setting("calibration", {"iters": 20, "calib_size": 64, "batch": 16, "bias_tuning": False}),
    "quant_gradptq": Setting("calibration", {"iters": 20, "calib_size": 64, "batch": 16}),
    "quant_emq": Setting(
        "calibration", {"population": 10, "iterations": 10, "bench_size": 20, "bench_samples": 32, "batch_size": 16}
    ),
    "quant_quest": Setting(
        "calibration", {"calib_steps": 4, "calib_samples": 8, "time_epochs": 2, "main_epochs": 1}, **DENOISER
    ),
    "quant_efficientdm": Setting("calibration", {"steps": 10, "epochs": 2, "calib_samples": 8}, **DENOISER),
    "quant_vq4dit": Setting(
        "calibration", {"k": 32, "trajectories": 1, "sampler_steps": 10, "kmeans_iters": 10}, **DENOISER
    ),
    "quant_lsq": Setting("training"),
    "quant_dfp": Setting("training"),
    "quant_adapt": Setting("training"),
    "quant_double_rounding": Setting("training"),
    "quant_gaqat": Setting("training"),
    "quant_hawqv3": Setting("training"),
    "quant_fliqs": Setting("training"),
    "quant_lr2vq": Setting("training", {"m": 4, "k": 16, "min_params": 512, "stage1_epochs": 0, "stage2_epochs": 1}),
    "quant_biadapter": Setting("training", model="zoo:vit_micro"),
    "quant_codenet": Setting("training", model="codenet:small", data="scenes?classes=1&test=8", batch=8),
    "quant_vqgan_lc": Setting(
        "training", {"n_codes": 256, "table": "random", "rate_d": 0.0}, "vqgan:small", "pictures:calibration_memory:noise?size=32", 8, layers=1
    ),
    "quant_zipcache": Setting("reading", model="zoo:llama_tiny", data="corpus?length=256&train=8&test=8"),
}  # fmt: skip


def measure(method: str, quick: bool) -> dict[str, Any]:
    """Return the row of one method."""
    setting = SETTINGS[method]
    if setting.kind == "calibration":
        runs = [run(method, setting, 64) for _ in range(1 if quick else 3)]
        report = runs[0][0]
        layers = layer_count(report, setting)
        seconds = statistics.median(watch.calibration for _, watch in runs)
        figures = {"seconds": round(seconds, 2), "seconds_per_layer": round(seconds / layers, 3)}
    elif setting.kind == "training":
        samples = setting.batch * (WARMUP + (2 if quick else 6))
        report, watch = run(method, setting, samples)
        layers = layer_count(report, setting)
        _, plain = run(None, setting, samples, report.recipe.train)
        figures = {"batch": setting.batch, **beside_float(median_ms(watch), median_ms(plain), layers)}
    else:
        report, _ = run(method, setting, 8)
        layers = layer_count(report, setting)
        assert report.before is not None and report.after is not None
        assert report.before.latency_ms is not None and report.after.latency_ms is not None
        figures = beside_float(report.after.latency_ms, report.before.latency_ms, layers)
    return {
        "kind": setting.kind, "layers": layers, **figures, "model": setting.model, "data": report.data,
        "options": setting.options, **circumstances(),
    }  # fmt: skip


def run(
    method: str | None, setting: Setting, samples: int, train: TrainOptions | None = None
) -> tuple[Report, Stopwatch]:
    """Apply a method, or train the float model, on so many samples; nothing of it is kept."""
    source, mark, options = setting.data.partition("?")
    recipe = Recipe(
        model=setting.model,
        data=f"{source}?train={samples}" + (f"&{options}" if mark else ""),
        methods=(MethodUse(name=method, options=setting.options),) if method else (),
        train=train or TrainOptions(epochs=1, batch_size=setting.batch, checkpoint_every=10**6),
        device="cpu",
        export=None if method else (),
    )
    watch = Stopwatch(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        return apply(recipe, Path(folder, "run"), log=watch), watch


def layer_count(report: Report, setting: Setting) -> int:
    """Return how many layers (of a language model: caches) the method has quantized."""
    found = [item.details["layers"] for item in report.artifacts if "layers" in item.details]
    count = setting.layers or found[0]
    assert isinstance(count, int)
    return count


def median_ms(watch: Stopwatch) -> float:
    """Return the median of the steps after the first ones."""
    return 1000 * statistics.median(watch.steps[WARMUP:])


def beside_float(ms: float, plain_ms: float, layers: int) -> dict[str, float]:
    """Return both times, per layer too, and their ratio."""
    return {
        "ms": round(ms, 2),
        "float_ms": round(plain_ms, 2),
        "ms_per_layer": round(ms / layers, 3),
        "float_ms_per_layer": round(plain_ms / layers, 3),
        "over_float": round(ms / plain_ms, 2),
    }


def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(SETTINGS), metavar="METHOD", help="one method")
    parser.add_argument("--quick", action="store_true", help="one calibration, two steps; nothing is recorded")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for method in [arguments.only] if arguments.only else SETTINGS:
        row = measure(method, arguments.quick)
        if not arguments.quick:
            record(WHAT, method, row)
        rows.append([method, row["kind"], row["model"], row["layers"], *cells(row)])
    print_table(
        f"{circumstances()['device']}, {arguments.threads} thread(s), torch {torch.__version__}",
        ["method", "what", "model", "layers", "in all", "per layer", "float, per layer", "ratio"],
        rows,
        right=range(3, 8),
    )


def cells(row: dict[str, Any]) -> list[str]:
    """Return the figures of a row as text."""
    if "seconds" in row:
        return [f"{row['seconds']:.2f} s", f"{row['seconds_per_layer']:.3f} s", "", ""]
    times = [f"{row[key]:.2f} ms" for key in ("ms", "ms_per_layer", "float_ms_per_layer")]
    return [*times, f"{row['over_float']:.2f}"]


if __name__ == "__main__":
    main()
