"""Core's own answers to the hooks, used where no method answers; itself a plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eff.hookspecs import hookimpl
from eff.run import Run, Step, StepResult
from eff.schemas import Artifact, ExportTarget, Metrics, ModelSpec

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data

FORMATS = ("onnx", "pt2", "safetensors")


class Defaults:
    """Build from a library, supervised step, task metrics, standard exports."""

    @hookimpl
    def build_model(self, spec: ModelSpec, run: Run) -> nn.Module | None:
        """Build from timm, transformers or an importable factory."""
        from eff.models import build_from_library

        return build_from_library(spec, run)

    @hookimpl
    def train_step(self, step: Step) -> StepResult:
        """Minimise `step.loss` with one optimiser step."""
        from eff.training import supervised_step

        return supervised_step(step)

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data, run: Run) -> Metrics:
        """Measure the task's own metrics on the test split."""
        from eff.measure import task_metrics

        return task_metrics(model, data, run)

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write onnx, pt2 or safetensors."""
        from eff.exporting import export_standard

        return export_standard(model, target, run)
