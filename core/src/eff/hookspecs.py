"""The five hooks. A method implements those it needs; this file is the whole contract.

New information goes into `run` or `step`, so the signatures stay. Hook parameters have no defaults
and are never keyword-only: pluggy would not pass them.
"""

# mypy: disable-error-code="empty-body"
from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget, Metrics, ModelSpec

PROJECT = "eff"
CONTRACT = 1  # the version of this file; a plugin states the one it was written for as keyword "eff-api-1"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Hooks:
    """Hook specifications, in the order of a method's life."""

    @hookspec(firstresult=True)
    def build_model(self, spec: ModelSpec, run: Run) -> nn.Module | None:
        """Return the untrained or pretrained module that `spec` names, or None when it is not yours.

        Args:
            spec: where the model comes from (`spec.source`, e.g. "zoo:digits_cnn") and its options.
            run: seed, device, task (`run.task.spec.options` has the classes and the input shape).

        Returns:
            Module on the CPU; core moves it to `run.device`.

        Raises:
            ModelError: the source is yours, but the name or an option is wrong.
        """

    @hookspec
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Return `model` changed by the method.

        Called once per method, in the order the user gave; each receives the module the one before
        returned. Deterministic for a given `run.seed`.

        Args:
            model: module on `run.device`; may be changed in place.
            run: seed, device, task, data, folder, log; `run.restoring` is true when a checkpoint is
                being rebuilt: make the same structure from `self.config` and `self.structure`, use
                no data.

        Returns:
            The module to use from here on, never None, also when changed in place.

        Raises:
            UnsupportedModelError: nothing in `model` is something the method can change.
        """

    @hookspec(firstresult=True)
    def train_step(self, step: Step) -> StepResult:
        """Do one optimisation step on `step.batch` and return its loss and metrics.

        `step` is mutable (model, batch, optimizer, loss, run, index): a wrapper changes what the
        inner implementation sees through it, because pluggy always passes on the original arguments.
        Implement it as a wrapper (`@hookimpl(wrapper=True)`) unless the method replaces the step.
        Core has cleared the gradients; while they are accumulated, do not clear them again.
        """

    @hookspec
    def evaluate(self, model: nn.Module, data: Data, run: Run) -> Metrics:
        """Return what the method measures on `data.test`; called before and after the change.

        The task's own metrics (accuracy, loss, ...) are measured by core. Metrics of all
        implementations are merged; a name that is reported twice is an error. Return
        `Metrics()` where there is nothing to say, e.g. about a model the method has not changed.
        """

    @hookspec(firstresult=True)
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write `model` to `target.path` as `target.format`, or return None when the format is not yours.

        A method lists its formats in `Card.formats`. Core writes onnx, pt2 and safetensors where no
        method answers. `target.path` is a temporary name that core moves into place.

        Returns:
            The artifact; `eff.files.describe_artifact` fills in size and checksum.
        """


HOOK_NAMES = ("build_model", "transform", "train_step", "evaluate", "export")
