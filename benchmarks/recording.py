"""What the benchmarks of this folder share: the clock of a run, the circumstances of a measurement, the record on disk."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eff.log import Advance, TerminalLog
from eff_kernels.bench import device_name

RESULTS = Path(__file__).parent / "results"


class Stopwatch(TerminalLog):
    """Takes the times of one run from what it says: of its calibration in all, and of each training step.

    The calibration lasts from the first change of the model to the first export, or to the last measurement.
    """

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(quiet)
        self.started = self.calibration = 0.0
        self.steps: list[float] = []

    def info(self, message: str) -> None:
        """Note the time of the lines that a run says around its calibration."""
        if message.startswith("apply ") and not self.started:
            self.started = time.perf_counter()
        elif message.startswith(("export ", "measure the result")) and self.started and not self.calibration:
            self.calibration = time.perf_counter() - self.started
        super().info(message)

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Advance]:
        """Note when each training step ends."""
        with super().progress(description, total) as advance:
            if description != "train":
                yield advance
                return
            last = time.perf_counter()

            def noted(steps: int = 1, note: str = "") -> None:
                nonlocal last
                now = time.perf_counter()
                self.steps += [now - last] * (steps > 0)  # 0: where a resumed run begins
                advance(steps, note)
                last = time.perf_counter()

            yield noted


def circumstances() -> dict[str, Any]:
    """Return what a measurement depends on besides its settings."""
    return {
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def record(what: str, name: str, row: dict[str, Any], folder: Path = RESULTS) -> None:
    """Put a row into results/WHAT.json; those of other names stay."""
    file = folder / f"{what}.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    rows[name] = row
    file.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n", encoding="utf-8")
