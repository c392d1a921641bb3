"""Memory of calibration over the number of samples: one JSON line per number. Linux only.

    python benchmarks/calibration_memory.py [--samples 64 256 1024] [--size 224] [--model eff.testing.samples:tiny_cnn]

Applies quant_adaquant's light pipeline at 8 bits without steps. The images are made when they are read, so the data take no memory themselves. The
peak is that of the process's own (anonymous) memory: pages of the calibration files, which the system drops when it needs
them, do not count. Each number of samples has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from eff.data import Batch, Data
from eff.runner import apply
from eff.schemas import DataSpec, MethodUse, Recipe, TaskSpec

CLASSES = 10


class Noise:
    """Uniform noise that depends on the sample's number."""

    def __init__(self, samples: int, size: int):
        self.samples, self.size = samples, size

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.samples

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return image (N, 3, size, size) and label (N,)."""
        made = [
            torch.rand(3, self.size, self.size, generator=torch.Generator().manual_seed(int(index)))
            for index in indices
        ]
        return {"image": torch.stack(made), "label": torch.tensor(list(indices)) % CLASSES}

    def fingerprint(self) -> str:
        """Return what decides the samples."""
        return f"noise {self.samples} {self.size}"


def noise(spec: DataSpec, task: TaskSpec | None = None) -> Data:
    """Return `train` samples of `size` pixels a side, and eight to measure on."""
    size = int(spec.options["size"])
    made = TaskSpec(options={"input_shape": [3, size, size], "classes": [str(number) for number in range(CLASSES)]})
    return Data(spec, made, Noise(int(spec.options["train"]), size), Noise(8, size))


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Note the highest anonymous memory of this process, in KiB, 200 times a second."""
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            lines = Path("/proc/self/status").read_text().splitlines()
            peak[0] = max(peak[0], next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def measure(model: str, samples: int, size: int) -> None:
    """Calibrate on so many samples and print the line."""
    options = {"pipeline": "light", "bits": [8], "bias_tuning": False, "calib_size": samples, "batch": 32}
    recipe = Recipe(
        model=model, data=f"calibration_memory:noise?train={samples}&size={size}", device="cpu", export=(),
        methods=(MethodUse(name="quant_adaquant", options=options),),
    )  # fmt: skip
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, watched_memory() as peak:
        apply(recipe, Path(folder, "run"))
    row = {
        "samples": samples,
        "samples_MiB": round(samples * 3 * size * size * 4 / 2**20),
        "peak_MiB": peak[0] // 1024,
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(row), flush=True)


def main() -> None:
    """Parse and measure, one process after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--model", default="eff.testing.samples:tiny_cnn")
    arguments = parser.parse_args()
    for samples in arguments.samples:
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(arguments.model, samples, arguments.size)
        )
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
