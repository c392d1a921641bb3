"""Declares quant_gaqat and its data sources to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from eff.method import Card, Check, Claim, Extension, Method, Sample, hookimpl
from eff.schemas import Metrics, TrainOptions
from eff_quant_gaqat.config import GAQATConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget
    from eff_quant_gaqat.training import Trainer


class Domains(Extension):
    """Data of several domains with one held out."""

    data_sources: ClassVar = {
        "rotated_digits": "eff_quant_gaqat.domains:rotated_digits",
        "domains": "eff_quant_gaqat.domains:load_folders",
    }


class GAQAT(Method[GAQATConfig]):
    """GAQAT: low-bit training towards flat minima, freezing a scale's task gradient where it keeps its direction."""

    card: ClassVar = Card(
        title="GAQAT: gradient-adaptive quantization-aware training for domain generalization",
        authors=("Jiacheng Jiang", "Yuan Meng", "Chen Tang", "Han Yu", "Qun Li", "Zhi Wang", "Wenwu Zhu"),
        venue="arXiv",
        year=2024,
        paper="arXiv:2412.05551",
        url="https://arxiv.org/abs/2412.05551",
        needs=("train_data",),
        tasks=("classification", "text_classification"),
        formats=("packed", "onnx"),
        composes_with=("weight averaging of weights and scales", "pruning before it"),
        conflicts_with=("quant_*",),
        notes="Data with domains: rotated_digits?target=60 or domains:PATH?target=NAME. Not with --accumulate or fp16.",
    )
    claims: ClassVar = (
        Claim(
            id="rotated_digits",
            statement="Task and smooth gradients of the scales conflict; GAQAT is not worse than LSQ with SAGM by a point.",
            run="eff_quant_gaqat.claims:rotated_digits",
            checks=(
                Check(left="gaqat", right="lsq_sagm", margin=-1.0),
                Check(left="conflict_rate", right=5.0),
            ),
            paper="PACS at 3 and 4 bits: up to 4.5 points above combining DG methods with QAT directly (abstract).",
            unit="% accuracy",
            units={"rate": "%", "share": "%"},
            seeds=(0, 1, 2),
            minutes=8,
        ),
    )
    sample: ClassVar = Sample(
        model="eff.testing.samples:tiny_cnn",
        data="eff.testing.samples:blobs",
        options={"window": 4, "lr": 1e-3},
        train=TrainOptions(epochs=3, batch_size=64),
    )

    def __init__(self, config: GAQATConfig | None = None):
        super().__init__(config)
        self.trainer: Trainer | None = None

    def training(self) -> TrainOptions:
        """Return Adam at a constant rate, as DomainBed has it."""
        config = self.config
        return TrainOptions(
            optimizer="adam", lr=config.lr, weight_decay=config.weight_decay, schedule="constant", epochs=config.epochs
        )

    def parameter_options(self, name: str, parameter: nn.Parameter) -> dict[str, Any]:
        """Scales get no weight decay."""
        return {"weight_decay": 0.0} if name.endswith("_quantizer.scale") else {}

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Insert LSQ's quantizers and begin to track their gradients."""
        from eff.errors import RequestError
        from eff_quant_gaqat.training import Trainer
        from eff_quant_kit.learned_steps import insert_quantizers

        if run.precision == "fp16":
            raise RequestError(
                "quant_gaqat: with --precision fp16 skipped steps would enter its history; use fp32 or bf16"
            )
        if (run.train.accumulate or 1) > 1:
            raise RequestError("quant_gaqat: both gradients belong to one batch; leave out --accumulate")
        model = insert_quantizers("quant_gaqat", model, self.config, self.structure, run)
        if run.training:
            self.trainer = Trainer(model, self.config, run)
            batches = len(run.split("train")) // (run.train.batch_size or 64) * (run.train.epochs or 0)
            if batches < self.config.window and not run.restoring:
                run.warn(
                    f"quant_gaqat: {batches} steps are fewer than the window of {self.config.window}; nothing can freeze"
                )
        return model

    @hookimpl
    def train_step(self, step: Step) -> StepResult:
        """Do one step with both gradients."""
        assert self.trainer is not None
        return self.trainer.step(step)

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Keep the training's figures for the checkpoint."""
        from eff_quant_gaqat.report import summary

        if self.trainer is not None:
            self.structure["found"] = summary(self.trainer.tracker)
        return model

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data | None, run: Run) -> Metrics:
        """Report accuracy by domain, sharpness and the scales' gradients; draw their disorder."""
        from eff_quant_gaqat.report import describe, draw

        if run.keeps_files and self.trainer is not None and self.trainer.tracker.history:
            with run.output("disorder.png", format="png") as path:
                draw(self.trainer.tracker, path)
        found: dict[str, Any] = self.structure.get("found") or {}  # type: ignore[assignment]
        return describe(model, data, run, self.config, found)

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write packed integers or ONNX; the freezing goes into the artifact's details."""
        if target.format not in self.card.formats:
            return None
        from eff.files import describe_artifact
        from eff_quant_kit.onnx_qdq import write_onnx
        from eff_quant_kit.packed import write_packed

        details = {"packed": write_packed, "onnx": write_onnx}[target.format](model, target.path, run)
        return describe_artifact(target.path, target.format, {**details, "freezing": self.structure.get("found")})

    def state_dict(self) -> dict[str, Any]:
        """Return what has been tracked."""
        return self.trainer.tracker.state_dict() if self.trainer is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        if self.trainer is not None and state:
            self.trainer.tracker.load_state_dict(state)
