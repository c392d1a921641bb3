"""Post-training quantization on real models: accuracy by method and bits, calibrated on the same samples.

    python benchmarks/post_training.py SHARED photos [--only adaquant] [--iters 100]
    python benchmarks/post_training.py SHARED cifar

photos: EfficientNet-Lite0 on one photo of each ImageNet class, 256 to calibrate on and the rest to test. cifar: ResNet-20.
SHARED is the folder with `data/` and `models/`. Prints one JSON line per setting: accuracy in %, bytes of the packed file,
seconds of the whole run, peak memory of the process so far.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from pathlib import Path
from typing import Any

from eff.log import TerminalLog
from eff.runner import apply
from eff.schemas import MethodUse, Recipe, TrainOptions

BITS = ((8, 8), (4, 8), (4, 4))


def settings(iters: int, samples: int) -> list[tuple[str, str, dict[str, Any], bool]]:
    """Return (name, method, options, whether steps are taken) of all settings."""
    found: list[tuple[str, str, dict[str, Any], bool]] = []
    for weight_bits, act_bits in BITS:
        name = f"W{weight_bits}A{act_bits}"
        ada = {"bits": [weight_bits], "act_bits": act_bits, "calib_size": samples, "iters": iters, "batch": 16}
        plain = ada | {"norm_tuning": False, "bias_tuning": False}
        found += [
            (f"{name} min-max, nearest", "quant_adaquant", plain, False),
            (f"{name} adaquant light", "quant_adaquant", ada | {"pipeline": "light"}, False),
            (f"{name} adaquant", "quant_adaquant", ada | {"relative_lr": True, "lr_qx": 1e-3}, True),
        ]
    return found


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("what", choices=["cifar", "photos"])
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--iters", type=int, default=100, help="steps per layer")
    parser.add_argument("--samples", type=int, default=256, help="samples to calibrate on")
    arguments = parser.parse_args()
    shared = arguments.shared
    if arguments.what == "photos":
        model: dict[str, Any] = {
            "model": "zoo:efficientnet_lite0?pretrained=true",
            "data": f"folder:{shared / 'data' / 'imagenet1k_samples'}?train={arguments.samples}&seed=0",
        }
    else:
        (weights,) = (shared / "models").glob("resnet20-*.th")
        data = f"parquet:{shared / 'data' / 'cifar10'}?train={arguments.samples}&seed=0"
        model = {"model": str(weights), "arch": "zoo:cifar_resnet20", "data": data}
    for name, method, options, trains in settings(arguments.iters, arguments.samples):
        if arguments.only not in name:
            continue
        recipe = Recipe(
            **model,
            methods=(MethodUse(name=method, options=options),),
            train=TrainOptions(epochs=None if trains else 0),
            export=("packed",),
        )
        with tempfile.TemporaryDirectory() as folder:
            report = apply(recipe, Path(folder, "run"), log=TerminalLog())
        assert report.before is not None and report.after is not None
        row = {
            "setting": name,
            "before": report.before.metrics.values["accuracy"].value,
            "after": report.after.metrics.values["accuracy"].value,
            "packed_bytes": next(item.bytes for item in report.artifacts if item.format == "packed"),
            "seconds": round(report.seconds),
            "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
