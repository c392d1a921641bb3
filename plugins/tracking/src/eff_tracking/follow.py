"""Following one run: when to open a tracker, what it gets, and how the run's end is told."""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from eff.errors import RunError
from eff.run import StepResult
from eff_tracking.target import VARIABLE, Target

if TYPE_CHECKING:
    from pydantic import JsonValue

    from eff.run import Run, Step
    from eff.schemas import Metrics


class Tracker(Protocol):
    """What TensorBoard and MLflow are to a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take figures by name at a step."""

    def close(self, status: str) -> None:
        """Write everything; `status` is FINISHED, FAILED or KILLED. A second call does nothing."""


class Follower:
    """What one run has told so far."""

    def __init__(self, run: Run, target: Target):
        self.run = run
        self.target = target
        self.tracker: Tracker | None = None
        self.is_over = False
        self.before: dict[str, float] = {}
        self.losses: list[float] = []
        self.done = 0

    def note_step(self, step: Step, result: object) -> None:
        """Log a training step; of accumulated batches the mean loss, once.

        Raises:
            RunError: the tracker cannot be opened; the run has only just begun.
        """
        if not isinstance(result, StepResult):
            return  # core refuses it
        self.losses.append(float(result.loss))
        if not step.last_of_step:
            return
        loss = sum(self.losses) / len(self.losses)
        self.losses = []
        values = {"train/loss": loss, **{f"train/{name}": metric.value for name, metric in result.metrics.items()}}
        if step.optimizer is not None:
            values["train/lr"] = float(step.optimizer.param_groups[0]["lr"])
        if self.tracker is None and not self.is_over:
            self._open(first_step=step.index)
        self.done = step.index + 1
        self._log(self.done, values)
        if not math.isfinite(loss):
            self.close("FAILED")

    def note_measurement(self, found: Sequence[Metrics]) -> None:
        """Log a measurement: the one before the change waits for the run to begin, the last one ends it."""
        values = {f"evaluate/{name}": metric.value for part in found for name, metric in part.values.items()}
        if not self.run.keeps_files:
            self.before = values
            return
        if self.tracker is None and not self.is_over:
            try:
                self._open(first_step=0)
            except RunError as error:  # the results are there; they are worth more than the log of them
                self._lose(error)
        self._log(self.done, values)
        self.close("FINISHED")

    def close(self, status: str) -> None:
        """Tell the tracker that the run has ended; nothing is logged afterwards."""
        if self.tracker is not None:
            try:
                self.tracker.close(status)
            except Exception as error:  # trackers raise their own and their libraries' types
                self._lose(error)
        self.tracker = None
        self.is_over = True

    def _open(self, first_step: int) -> None:
        try:
            self.tracker = open_tracker(self.target, self.run, first_step)
        except Exception as error:  # trackers raise their own and their libraries' types
            raise RunError(
                f"{VARIABLE}: {self.target.tracker} at {self.target.place or 'its default place'} cannot be used: "
                f"{_first_line(error)}; mend it, or unset {VARIABLE}"
            ) from error
        weakref.finalize(self, _close_quietly, self.tracker)  # an interrupted run is forgotten without an end
        if first_step == 0:  # a resumed run has told this before
            self._log(0, self.before)

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        if self.tracker is None:
            return
        try:
            self.tracker.log(step, values)
        except Exception as error:  # hours of training must not end because a server does
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        self.run.warn(f"tracking stopped: {_first_line(error)}; the run goes on")
        self.tracker = None
        self.is_over = True


def _close_quietly(tracker: Tracker) -> None:
    with contextlib.suppress(Exception):  # at exit there is nobody left to tell
        tracker.close("KILLED")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def open_tracker(target: Target, run: Run, first_step: int) -> Tracker:
    """Return a tracker that is ready; only the one asked for is imported."""
    if target.tracker == "tensorboard":
        from eff_tracking.tensorboard import TensorBoardTracker

        return TensorBoardTracker(run, target.place, first_step)
    from eff_tracking.mlflow import MlflowTracker

    return MlflowTracker(run, target.place, resumed=first_step > 0)


def run_name(folder: Path) -> str:
    """Return the run folder as seen from here, e.g. `digits-quant_lsq` or `sweep/trial-003`."""
    relative = os.path.relpath(folder)
    return folder.name if relative.startswith("..") else Path(relative).as_posix()


def options_of(run: Run) -> dict[str, JsonValue]:
    """Return what distinguishes this run: model, data, seed, training, the methods' options."""
    options: dict[str, JsonValue] = {
        "model": run.model_spec.source if run.model_spec else None,
        "data": str(run.data.spec) if run.data else None,
        "task": run.task.name,
        "seed": run.seed,
        "precision": run.precision,
    }
    if run.training or run.train.epochs:
        options |= {f"train.{name}": value for name, value in run.train.model_dump(mode="json").items()}
    for method in run.applied():
        options |= {f"{method.name}.{name}": value for name, value in method.config.items()}
    return {name: value for name, value in options.items() if value is not None}
