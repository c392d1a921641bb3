"""Time and memory of one layer's step against the number of candidates: mixed weights and mixed outputs.

    python plugins/nas_tangle/benchmarks/mixing_cost.py [--json] [--channels 64 --pixels 32 ...]

One convolution, forward and backward with gradients for input, weights and coefficients. "kept" is what
autograd keeps for the backward pass, which depends on shapes alone; "peak" is the growth of the process's
largest resident size in a process of its own, over one that has imported everything and holds the input.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

import torch

from eff_nas_tangle.cost import COUNTS, Size, layer_step, make_layer, measure_layer


def main() -> None:
    """Measure all rows and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak-of", nargs=2, metavar=("MIXING", "COUNT"), help=argparse.SUPPRESS)
    for name, value in vars(Size(channels=64, kernel=5, pixels=32, batch=32)).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    size = Size(arguments.channels, arguments.kernel, arguments.pixels, arguments.batch)
    if arguments.peak_of:
        print(peak_bytes(arguments.peak_of[0], int(arguments.peak_of[1]), size))
        return
    rows = [row(mixing, count, size) for mixing in ("entangled", "output") for count in COUNTS]
    if arguments.json:
        print(json.dumps({"threads": torch.get_num_threads(), "size": vars(size), "rows": rows}))
        return
    print(f"{size}, {torch.get_num_threads()} threads")
    print(f"{'mixing':<10}{'candidates':>11}{'ms':>9}{'kept MiB':>10}{'peak MiB':>10}")
    for r in rows:
        print(f"{r['mixing']:<10}{r['candidates']:>11}{r['ms']:>9.1f}{r['kept_mib']:>10.1f}{r['peak_mib']:>10.1f}")


def row(mixing: Any, count: int, size: Size) -> dict[str, Any]:
    """Measure one row; the peak in a process of its own."""
    cost = measure_layer(count, mixing, size, budget_s=3.0)
    command = [sys.executable, __file__, "--peak-of", mixing, str(count)]
    command += [part for name, value in vars(size).items() for part in (f"--{name}", str(value))]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        "mixing": mixing,
        "candidates": count,
        "ms": round(cost.milliseconds, 2),
        "kept_mib": round(cost.kept_bytes / 2**20, 2),
        "peak_mib": round(peak / 2**20, 1),
    }


def peak_bytes(mixing: Any, count: int, size: Size) -> int:
    """Return the growth of this process's largest resident size by two steps."""
    layer = make_layer(count, mixing, size)
    x = torch.randn(size.batch, size.channels, size.pixels, size.pixels, requires_grad=True)
    alphas = {name: torch.zeros(3, requires_grad=True) for name in layer.axes.names}
    small = make_layer(count, mixing, Size(8, size.kernel, 8, 1))
    layer_step(small, torch.randn(1, 8, 8, 8), alphas).backward()  # loads the libraries
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        layer_step(layer, x, alphas).backward()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


if __name__ == "__main__":
    main()
