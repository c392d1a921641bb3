"""The whole table of eff-kernels on a GPU, in one command of at most ten minutes: correctness first, then time.

    python benchmarks/kernels_gpu.py [--device cuda] [--seconds 0.3]

Runs every Triton kernel against its reference on the device (plugins/kernels/tests/interpreter), then `eff bench-kernels`, and
writes benchmarks/results/kernels-DEVICE.json with device, date and versions. Without a GPU: --device cpu skips the kernels.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Check, measure, record; exit code 1 where a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", default="0.3", help="time per implementation and case")
    arguments = parser.parse_args()
    on_gpu = arguments.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        sys.exit("no CUDA device here; give --device cpu for the table of the CPU paths")
    if on_gpu:
        cases = sorted((ROOT / "plugins" / "kernels" / "tests" / "interpreter").glob("*.py"))
        check = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=--import-mode=importlib",
        ]
        environment = {**os.environ, "EFF_KERNELS_TEST_DEVICE": arguments.device}
        if subprocess.run([*check, *map(str, cases)], env=environment, check=False).returncode:
            sys.exit("a kernel does not agree with its reference; nothing was measured")
    name = torch.cuda.get_device_name(arguments.device) if on_gpu else "cpu"
    file = ROOT / "benchmarks" / "results" / f"kernels-{re.sub(r'[^A-Za-z0-9]+', '-', name).lower()}.json"
    file.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "eff", "bench-kernels", "--device", arguments.device]
    done = subprocess.run([*command, "--seconds", arguments.seconds, "--out", str(file)], check=False)
    print(f"written: {file.relative_to(ROOT)}")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
