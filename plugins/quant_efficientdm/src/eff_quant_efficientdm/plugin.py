"""Declares quant_efficientdm to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff.schemas import Metrics
from eff_quant_efficientdm.config import EfficientDMConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget
    from eff_quant_efficientdm.distill import Distillation


class EfficientDM(Method[EfficientDMConfig]):
    """EfficientDM: distills a diffusion model into itself at 4 bits with mergeable adapters, without data."""

    card: ClassVar = Card(
        title="EfficientDM: Efficient Quantization-Aware Fine-Tuning of Low-Bit Diffusion Models",
        authors=("Yefei He", "Jing Liu", "Weijia Wu", "Hong Zhou", "Bohan Zhuang"),
        venue="ICLR",
        year=2024,
        paper="arXiv:2310.03270",
        url="https://arxiv.org/abs/2310.03270",
        tasks=("diffusion",),
        formats=("packed",),
        composes_with=("step distillation before it", "adapters merged before it"),
        conflicts_with=("quant_*",),
        notes="Trains on the float model's own samples; needs no data.",
    )
    claims: ClassVar = (
        Claim(
            id="w4a4_digits",
            statement="At W4A4 adapters inside the quantizer beat calibration, and scales per step improve on them.",
            run="eff_quant_efficientdm.claims:w4a4_digits",
            checks=(
                Check(left="qalora", right="calibrated", relation="at_most", margin=0.0),
                Check(left="efficientdm", right="scale_aware", relation="at_most", margin=0.0),
                Check(left="efficientdm_per_calibrated", right=0.5, relation="at_most"),
                Check(left="scale_aware", right="qalora", relation="at_most", margin=0.0),
            ),
            paper="LDM-4 on ImageNet at W4A4: sFID 7.75 against 7.70 in float (abstract).",
            seeds=(0, 1, 2),
            minutes=7,
        ),
    )
    sample: ClassVar = Sample(
        model="diffusion:digits_dit?width=16&depth=1&heads=2",
        data="diffusion_digits?train=64&test=32",
        options={"steps": 3, "epochs": 2, "rank": 4, "calib_samples": 8},
    )

    def __init__(self, config: EfficientDMConfig | None = None):
        super().__init__(config)
        self.distillation: Distillation | None = None

    def step_count(self, run: Run) -> int | None:
        """Return one step per sampler step of every trajectory."""
        return self.distillation.steps if self.distillation is not None else 0

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Calibrate on the float model's path and put adapters into the quantized layers."""
        if run.restoring and not run.training:
            from eff_quant_kit.diffusion.inputs import from_structure

            return from_structure(model, self.structure)
        from eff_quant_efficientdm.distill import Distillation

        self.distillation = Distillation(model, self.config, self.structure, run)
        if not self.distillation.steps:
            self.finish(self.distillation.model, run)
        return self.distillation.model

    @hookimpl
    def train_step(self, step: Step) -> StepResult:
        """Do one denoising step of distillation."""
        from eff.run import StepResult

        assert self.distillation is not None
        step.module.eval()
        return StepResult(self.distillation.step(step.index))

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Merge the adapters into the integers and measure against the float model."""
        from eff_quant_efficientdm.report import measure

        assert self.distillation is not None
        changed = self.distillation.finish()
        self.structure |= measure(self.distillation, changed, run.data, run)
        return model

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data, run: Run) -> Metrics:
        """Report the error by step, distances between samples, changed integers, sizes; draw samples."""
        from eff_quant_efficientdm.report import describe, draw
        from eff_quant_kit.diffusion.time_aware import time_aware

        if not time_aware(model):
            return Metrics()
        if run.keeps_files and self.distillation is not None:
            from eff_quant_kit.diffusion.pictures import draw_samples

            with run.output("samples.png", format="png") as path:
                draw_samples(path, draw(self.distillation, run))
        return describe(model, self.structure)

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write the merged integers beside the lists of activation scales and zero points."""
        if target.format not in self.card.formats:
            return None
        from eff.files import describe_artifact
        from eff_quant_kit.packed import write_packed

        return describe_artifact(target.path, target.format, write_packed(model, target.path, run))

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser and the place on the trajectory."""
        return self.distillation.state_dict() if self.distillation is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        if self.distillation is not None and state:
            self.distillation.load_state_dict(dict(state))
