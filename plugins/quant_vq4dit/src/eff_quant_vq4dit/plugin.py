"""Declares quant_vq4dit to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff.schemas import Metrics
from eff_quant_vq4dit.config import VQ4DiTConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget
    from eff_quant_vq4dit.calibrate import Calibration


class VQ4DiT(Method[VQ4DiTConfig]):
    """VQ4DiT: codes and codebooks for a diffusion transformer's linear layers, calibrated without data."""

    card: ClassVar = Card(
        title="VQ4DiT: Efficient Post-Training Vector Quantization for Diffusion Transformers",
        authors=("Juncan Deng", "Shuaiting Li", "Zeyu Wang", "Hong Gu", "Kedong Xu", "Kejie Huang"),
        venue="AAAI",
        year=2025,
        paper="arXiv:2408.17131",
        url="https://arxiv.org/abs/2408.17131",
        tasks=("diffusion",),
        formats=("packed",),
        composes_with=("feature caching", "pruning before it", "step distillation before it"),
        conflicts_with=("quant_*", "peft_*"),
        notes="Calibrates on the float model's own sampling paths; needs no data.",
    )
    claims: ClassVar = (
        Claim(
            id="digits_dit",
            statement="At 1.25 bits calibrated codes beat a calibrated codebook, that beats k-means, that beats 2-bit rounding.",
            run="eff_quant_vq4dit.claims:digits_dit",
            checks=(
                Check(left="b_kmeans", right="a_rounding_2_bit", relation="at_most"),
                Check(left="c_codebook_only", right="b_kmeans", relation="at_most"),
                Check(left="d_over_c", right=0.97, relation="at_most"),
            ),
            paper="DiT XL/2: acceptable images at 2 bits, where uniform rounding collapses (abstract).",
            seeds=(0, 1, 2),
            minutes=8,
        ),
    )
    sample: ClassVar = Sample(
        model="diffusion:digits_dit?width=16&depth=1&heads=2",
        data="diffusion_digits?train=64&test=32",
        options={"k": 16, "trajectories": 1, "sampler_steps": 4, "kmeans_iters": 5},
    )

    def __init__(self, config: VQ4DiTConfig | None = None):
        super().__init__(config)
        self.calibration: Calibration | None = None

    def step_count(self, run: Run) -> int | None:
        """Return one step per sampler step of every trajectory."""
        return self.calibration.steps if self.calibration is not None else 0

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Cluster the weights and let every sub-vector choose among its nearest codewords."""
        from eff_quant_vq4dit.calibrate import Calibration, insert, task_of, teacher_of
        from eff_quant_vq4dit.rebuild import rebuild

        if run.restoring and not run.training:
            return rebuild(model, self.structure, self.config.d)
        task_of(run)
        teacher = teacher_of(model)
        if not run.restoring:
            size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
            self.structure["float_bytes"] = size
        student = insert(model, self.config, self.structure, run)
        self.calibration = Calibration(teacher, student, self.config, run)
        if not self.calibration.steps:
            return self.finish(student, run)
        return student

    @hookimpl
    def train_step(self, step: Step) -> StepResult:
        """Do one sampler step of calibration."""
        from eff.run import StepResult

        assert self.calibration is not None
        step.module.eval()
        return StepResult(self.calibration.step(step.index))

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Fix what is left, put finished layers in and measure against the float model."""
        from eff_quant_kit.layers import replace_module
        from eff_quant_vq4dit.calibrate import soft_layers
        from eff_quant_vq4dit.report import measure

        layers = soft_layers(model)
        if self.calibration is None or not layers:
            return model
        forced = self.calibration.finish()
        for name, layer in layers.items():
            replace_module(model, name, layer.finished())
        self.structure |= measure(self.calibration.teacher, model, self.structure, forced, run)
        return model

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data | None, run: Run) -> Metrics:
        """Report errors of weights, blocks and noise, what was forced, and sizes."""
        from eff_quant_vq4dit.report import describe

        return describe(model, self.structure, self.config.d)

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write codes of ceil(log2 k) bits and codebooks in float16; the ratio is that of the file."""
        if target.format not in self.card.formats:
            return None
        from eff.files import describe_artifact
        from eff_quant_kit.packed import write_packed

        details = write_packed(model, target.path, run)
        ratio = float(str(self.structure["float_bytes"])) / target.path.stat().st_size
        return describe_artifact(target.path, target.format, {**details, "file_ratio": ratio})

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser and the place on the path."""
        return self.calibration.state_dict() if self.calibration is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        if self.calibration is not None and state:
            self.calibration.load_state_dict(dict(state))
