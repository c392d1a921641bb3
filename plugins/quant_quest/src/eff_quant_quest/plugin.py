"""Declares quant_quest to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff.schemas import Metrics
from eff_quant_quest.config import QuESTConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget
    from eff_quant_quest.calibration import Calibrated
    from eff_quant_quest.finetune import Finetuning


class QuEST(Method[QuESTConfig]):
    """QuEST: finetunes a diffusion model's time projections and sensitive layers at 4 bits, without data."""

    card: ClassVar = Card(
        title="QuEST: Low-bit Diffusion Model Quantization via Efficient Selective Finetuning",
        authors=("Haoxuan Wang", "Yuzhang Shang", "Zhihang Yuan", "Junyi Wu", "Junchi Yan", "Yan Yan"),
        venue="ICCV",
        year=2025,
        paper="arXiv:2402.03666",
        url="https://arxiv.org/abs/2402.03666",
        tasks=("diffusion",),
        formats=("packed",),
        composes_with=("step distillation before it", "adapters on the frozen base"),
        conflicts_with=("quant_*",),
        notes="Calibrates on the float model's own samples; needs no data. Not with feature caching across timesteps.",
    )
    claims: ClassVar = (
        Claim(
            id="w4a4_digits",
            statement="At W4A4 time-aware scales per channel halve the error; each finetuning stage lowers it further.",
            run="eff_quant_quest.claims:w4a4_digits",
            checks=(
                Check(left="c_per_half_a", right=1.0, relation="at_most"),
                Check(left="d_time_layers", right="c_channel", relation="at_most", margin=0.0),
                Check(left="e_quest", right="d_time_layers", relation="at_most", margin=0.0),
                Check(left="e_per_f", right=1.1, relation="at_most"),
            ),
            paper="State of the art at several bit widths; first readable images from W4A4 Stable Diffusion (abstract).",
            seeds=(0, 1, 2),
            minutes=8,
        ),
    )
    sample: ClassVar = Sample(
        model="diffusion:digits_dit?width=16&depth=1&heads=2",
        data="diffusion_digits?train=64&test=32",
        options={"calib_steps": 3, "calib_samples": 8, "time_epochs": 1, "main_epochs": 1},
    )

    def __init__(self, config: QuESTConfig | None = None):
        super().__init__(config)
        self.calibrated: Calibrated | None = None
        self.finetuning: Finetuning | None = None
        self.ptq: nn.Module | None = None

    def step_count(self, run: Run) -> int | None:
        """Return the steps of both stages."""
        return self.finetuning.steps if self.finetuning is not None else 0

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Record the float model's path, insert quantizers and set their ranges."""
        if run.restoring and not run.training:
            from eff_quant_kit.diffusion.inputs import from_structure

            return from_structure(model, self.structure)
        import copy

        from eff_quant_quest.calibration import Calibrated
        from eff_quant_quest.finetune import Finetuning
        from eff_quant_quest.rounding import reconstruct

        self.calibrated = Calibrated(model, self.config, self.structure, run)
        if self.config.weight_recon:
            reconstruct(self.calibrated, self.config.recon_iters)
        self.finetuning = Finetuning(self.calibrated)
        if self.config.finetune:
            self.ptq = copy.deepcopy(self.calibrated.model)
        self.structure["time_layers"] = list(self.calibrated.time)
        self.structure["sensitive_layers"] = list(self.calibrated.sensitive)
        if not self.finetuning.steps:
            self._measure(self.calibrated.model, run)
        return self.calibrated.model

    def _measure(self, model: nn.Module, run: Run) -> None:
        """Compare with the float model while it is here; a checkpoint remembers the figures."""
        from eff_quant_quest.report import measure

        if self.calibrated is not None:
            values, table = measure(model, self.ptq, self.calibrated, run.data, run)
            self.structure |= {"measured": values, "errors": table}  # type: ignore[dict-item]

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Measure the finetuned model against the float one."""
        self._measure(model, run)
        return model

    @hookimpl
    def train_step(self, step: Step) -> StepResult:
        """Do one step of stage 1 or 2."""
        from eff.run import StepResult

        assert self.finetuning is not None
        step.module.eval()
        return StepResult(self.finetuning.step(step.index))

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data, run: Run) -> Metrics:
        """Report the error by timestep, Frechet distances, sizes; draw samples."""
        from eff_quant_kit.diffusion.time_aware import time_aware
        from eff_quant_quest.report import describe, draw

        if not time_aware(model):
            return Metrics()
        if run.keeps_files and self.calibrated is not None:
            from eff_quant_kit.diffusion.pictures import draw_samples

            with run.output("samples.png", format="png") as path:
                draw_samples(path, draw(model, self.ptq, self.calibrated, run))
        return describe(model, self.structure)

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write packed weights beside the table timestep -> (scale, zero point) of every input."""
        if target.format not in self.card.formats:
            return None
        from eff.files import describe_artifact
        from eff_quant_kit.packed import write_packed

        return describe_artifact(target.path, target.format, write_packed(model, target.path, run))

    def state_dict(self) -> dict[str, Any]:
        """Return the optimisers."""
        return self.finetuning.state_dict() if self.finetuning is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        if self.finetuning is not None and state:
            self.finetuning.load_state_dict(dict(state))
