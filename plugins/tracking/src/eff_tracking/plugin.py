"""Declares tracking to eff: wrappers around two hooks, idle unless EFF_TRACK asks. Imports no torch and no tracker."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from eff.method import Extension, hookimpl
from eff_tracking.target import VARIABLE, read_target

if TYPE_CHECKING:
    from eff.run import Run, Step, StepResult
    from eff.schemas import Metrics
    from eff_tracking.follow import Follower


class Tracking(Extension):
    """Writes losses, metrics and options of a run to TensorBoard or MLflow."""

    def __init__(self) -> None:
        self.target = read_target(os.environ.get(VARIABLE, ""))
        self.follower: Follower | None = None

    @hookimpl(wrapper=True, tryfirst=True)
    def train_step(self, step: Step) -> Generator[None, StepResult, StepResult]:
        """Note the loss and the metrics of a step, as the other methods left them."""
        follower = self._follow(step.run)
        if follower is None:
            return (yield)
        try:
            result = yield
        except BaseException:
            follower.close("FAILED")
            raise
        follower.note_step(step, result)
        return result

    @hookimpl(wrapper=True, tryfirst=True)
    def evaluate(self, run: Run) -> Generator[None, list[Metrics], list[Metrics]]:
        """Note what a measurement found."""
        found = yield
        follower = self._follow(run)
        if follower is not None:
            follower.note_measurement(found)
        return found

    def _follow(self, run: Run) -> Any:
        """Return what follows this run; None where nobody asked or the run has no folder of its own."""
        if self.target is None or run.folder is None:
            return None
        if self.follower is None or self.follower.run is not run:
            from eff_tracking.follow import Follower

            self.follower = Follower(run, self.target)
        return self.follower
