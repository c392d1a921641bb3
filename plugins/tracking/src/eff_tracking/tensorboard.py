"""TensorBoard: event files in the run folder, or in a folder that holds one per run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from eff.run import Run
from eff_tracking.follow import options_of, run_name

FOLDER = "tensorboard"


class TensorBoardTracker:
    """A run as event files."""

    def __init__(self, run: Run, place: str, first_step: int):
        assert run.folder is not None
        folder = Path(place) / run_name(run.folder) if place else run.folder / FOLDER
        # Hides what an earlier run left in this folder from here on: a repeated or resumed run is one curve.
        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0)
        if first_step == 0:
            rows = "\n".join(f"| {name} | {value} |" for name, value in options_of(run).items())
            self.writer.add_text("options", f"| option | value |\n| --- | --- |\n{rows}", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars; TensorBoard's own queue keeps the training from waiting."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, status: str) -> None:
        """Write what is queued; event files know no status."""
        self.writer.close()
