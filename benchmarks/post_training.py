"""Post-training quantization on real models: accuracy by method and bits, calibrated on the same samples.

    python benchmarks/post_training.py SHARED photos [--only W8A8] [--iters 20] [--bias-epochs 0]
    python benchmarks/post_training.py SHARED cifar [--iters 100]

photos: EfficientNet-Lite0 on one photo of each ImageNet class, 256 to calibrate on and the rest to test. cifar: ResNet-20.
SHARED is the folder with `data/` and `models/`. Prints one JSON line per setting (accuracy in %, bytes of the packed file,
seconds of the calibration, in all and per layer, peak memory of the process so far) and puts them, by setting, into
benchmarks/results/post-training-WHAT.json with date and machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from pathlib import Path
from typing import Any

from recording import Stopwatch, circumstances, record

from eff.runner import apply
from eff.schemas import MethodUse, Recipe, Report, TrainOptions

BITS = ((8, 8), (4, 8), (4, 4))
BIAS_EPOCHS = 10
"""Of 60 steps each on the whole network: adaquant's default, and most of its time on a deep one."""


def settings(iters: int, samples: int, bias_epochs: int) -> list[tuple[str, str, dict[str, Any], bool]]:
    """Return (name, method, options, whether steps are taken) of all settings."""
    found: list[tuple[str, str, dict[str, Any], bool]] = []
    for weight_bits, act_bits in BITS:
        name = f"W{weight_bits}A{act_bits}"
        ada = {"bits": [weight_bits], "act_bits": act_bits, "calib_size": samples, "iters": iters, "batch": 16}
        tuned = {"bias_epochs": bias_epochs} if bias_epochs else {"bias_tuning": False}
        epochs = "" if bias_epochs == BIAS_EPOCHS else f", {bias_epochs} epoch{'s' * (bias_epochs != 1)} of biases"
        plain = ada | {"norm_tuning": False, "bias_tuning": False}
        grad = {
            "bits": weight_bits, "act_bits": act_bits, "calib_size": samples, "iters": iters, "act_iters": iters, "batch": 16,
            "lr": 1e-2,
        }  # fmt: skip
        found += [
            (f"{name} min-max, nearest", "quant_adaquant", plain, False),
            (f"{name} searched scales, nearest", "quant_gradptq", grad, False),
            (f"{name} adaquant light", "quant_adaquant", ada | {"pipeline": "light"}, False),
            (f"{name} adaquant{epochs}", "quant_adaquant", ada | tuned | {"relative_lr": True, "lr_qx": 1e-3}, True),
            (f"{name} adaround", "quant_gradptq", grad | {"preset": "base"}, True),
            (f"{name} gradptq", "quant_gradptq", grad, True),
        ]
        if weight_bits < 8:
            found.append((f"{name} gradptq, bits by importance", "quant_gradptq", grad | {"mixed": "layer"}, True))
    return found


def main() -> None:
    """Parse, run, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("what", choices=["cifar", "photos"])
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--iters", type=int, default=100, help="steps per layer")
    parser.add_argument(
        "--bias-epochs", type=int, default=BIAS_EPOCHS, help="of adaquant, 60 steps each; 0 tunes no biases"
    )
    parser.add_argument("--samples", type=int, default=256, help="samples to calibrate on")
    parser.add_argument("--test", type=int, default=0, help="samples to test on; 0: all others")
    arguments = parser.parse_args()
    shared = arguments.shared
    subset = f"train={arguments.samples}&seed=0" + (f"&test={arguments.test}" if arguments.test else "")
    if arguments.what == "photos":
        model: dict[str, Any] = {
            "model": "zoo:efficientnet_lite0?pretrained=true",
            "data": f"folder:{shared / 'data' / 'imagenet1k_samples'}?{subset}",
        }
    else:
        (weights,) = (shared / "models").glob("resnet20-*.th")
        data = f"parquet:{shared / 'data' / 'cifar10'}?{subset}"
        model = {"model": str(weights), "arch": "zoo:cifar_resnet20", "data": data}
    for name, method, options, trains in settings(arguments.iters, arguments.samples, arguments.bias_epochs):
        if arguments.only not in name:
            continue
        recipe = Recipe(
            **model,
            methods=(MethodUse(name=method, options=options),),
            train=TrainOptions(epochs=None if trains else 0),
            export=("packed",),
        )
        log = Stopwatch()
        with tempfile.TemporaryDirectory() as folder:
            report = apply(recipe, Path(folder, "run"), log=log)
        row = summary(report, log.calibration, arguments)
        print(json.dumps({"setting": name, **row}), flush=True)
        record(f"post-training-{arguments.what}", name, row)


def summary(report: Report, seconds: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what is kept of a run."""
    assert report.before is not None and report.after is not None
    packed = next(item for item in report.artifacts if item.format == "packed")
    layers = packed.details["layers"]
    assert isinstance(layers, int)
    return {
        "before": round(report.before.metrics.values["accuracy"].value, 2),
        "after": round(report.after.metrics.values["accuracy"].value, 2),
        "packed_bytes": packed.bytes,
        "float_bytes": report.before.bytes,
        "seconds": round(seconds, 1),
        "seconds_per_layer": round(seconds / layers, 2),
        "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "iters": arguments.iters,
        "samples": arguments.samples,
        "data": report.data and report.data.rpartition("?")[2],
        **circumstances(),
    }


if __name__ == "__main__":
    main()
