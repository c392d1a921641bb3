"""Declares detection to eff: the task, its data sources and the CoDeNet models. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from eff.method import Extension, hookimpl
from eff.schemas import Metrics

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run
    from eff.schemas import ModelSpec


class DetectionExtension(Extension):
    """Adds the task "detection", the sources `scenes` and `boxes:`, and the models `codenet:`."""

    tasks: ClassVar = {"detection": "eff_quant_codenet.task:Detection"}
    data_sources: ClassVar = {
        "scenes": "eff_quant_codenet.scenes:load",
        "boxes": "eff_quant_codenet.photos:load",
    }
    schemes: ClassVar = ("codenet",)
    models: ClassVar = {
        "codenet:1x": "CoDeNet detector on ShuffleNetV2 (Huang et al., FPGA 2021)",
        "codenet:2x": "CoDeNet with twice the width",
        "codenet:small": "narrow CoDeNet with two stages for small images",
        "codenet:deformed": "another detector (?base=package.module:factory&layers=a,b) with deformable convolutions",
    }

    @hookimpl
    def build_model(self, spec: ModelSpec, run: Run) -> nn.Module | None:
        """Return the detector that `codenet:NAME` names."""
        if spec.scheme != "codenet":
            return None
        from eff_quant_codenet.building import build

        return build(spec, run)

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data | None, run: Run) -> Metrics:
        """Draw detections.png into the run folder and say how many boxes were dropped; measures nothing."""
        if run.task.name == "detection" and data is not None:
            from eff_quant_codenet.drawing import write_sheet

            for name in ("train", "test"):
                if dropped := getattr(getattr(data, name), "dropped", 0):
                    run.warn(f"detection: {dropped} {name} boxes lie outside their image or have no area; dropped")
            write_sheet(model, run)
        return Metrics()
