"""Declares quant_lr2vq to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, ClassVar

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff.schemas import Metrics, TrainOptions
from eff_quant_lr2vq.config import LR2VQConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget


class LR2VQ(Method[LR2VQConfig]):
    """LR2VQ: vector quantization of weights in a learned low-rank space."""

    card: ClassVar = Card(
        title="Learning Low-Rank Representations for Model Compression",
        authors=("Zezhou Zhu", "Yucong Zhou", "Zhao Zhong"),
        venue="IJCNN",
        year=2023,
        paper="arXiv:2211.11397",
        url="https://arxiv.org/abs/2211.11397",
        needs=("train_data",),
        tasks=("any",),
        formats=("packed",),
        composes_with=("structured pruning before it", "distillation"),
        conflicts_with=("quant_*",),
        notes="d_tilde = m is DKM (Cho et al., ICLR 2022, arXiv:2108.12659); --epochs 0 is k-means without training.",
    )
    claims: ClassVar = (
        Claim(
            id="m16_digits",
            statement="Long sub-vectors (m=16, k=16) cluster better in a learned low-rank space than as they are.",
            run="eff_quant_lr2vq.claims:m16_digits",
            checks=(
                Check(left="clustering_d2", right="clustering_d4", relation="at_most"),
                Check(left="clustering_d4", right="clustering_d8", relation="at_most"),
                Check(left="clustering_d8", right="clustering_d16", relation="at_most"),
                Check(left="approximation_d2", right="approximation_d4"),
                Check(left="approximation_d4", right="approximation_d8"),
                Check(left="approximation_d8", right="approximation_d16"),
                Check(left="auto", right="dkm", margin=-0.5),
                Check(left="d4_bytes", right="dkm_bytes", relation="at_most"),
                Check(left="best_by_validation", right="dkm", margin=0.5),
                Check(left="kmeans", right="dkm", relation="at_most", margin=-2.0),
                Check(left="kmeans", right="auto", relation="at_most", margin=-2.0),
            ),
            paper="Abstract: +2.8 points top-1 for ResNet-18 at 43x and +1.0 for ResNet-50 at 31x over the best VQ before.",
            unit="% accuracy",
            units={
                "bytes": "B",
                **{f"{kind}_d{d}": "" for kind in ("clustering", "approximation") for d in (2, 4, 8, 16)},
                "auto_d": "",
                "ratio": "x",
            },
            seeds=(0, 1, 2),
            minutes=4,
        ),
    )
    sample: ClassVar = Sample(
        model="eff.testing.samples:tiny_cnn",
        data="eff.testing.samples:blobs",
        options={"m": 4, "k": 8, "min_params": 100, "stage1_epochs": 1, "stage2_epochs": 1},
        train=TrainOptions(epochs=2, batch_size=64),
    )

    def training(self) -> TrainOptions:
        """Return Adam over both stages; each stage's cosine is applied step by step."""
        config = self.config
        return TrainOptions(
            optimizer="adam", lr=config.lr, weight_decay=config.weight_decay, schedule="constant",
            epochs=config.stage1_epochs + config.stage2_epochs,
        )  # fmt: skip

    def parameter_options(self, name: str, parameter: nn.Parameter) -> dict[str, Any]:
        """Projections and codebooks get no weight decay: shrinking one factor rescales distances."""
        return {"weight_decay": 0.0} if name.endswith((".projection", ".codebook")) else {}

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Estimate d per layer and put low-rank blocks in the place of convolutions and linear layers."""
        from eff_quant_lr2vq.insert import insert_blocks, rebuild

        if run.restoring:
            return rebuild(model, self.config, self.structure)
        return insert_blocks(model, self.config, self.structure, run)

    @hookimpl(wrapper=True)
    def train_step(self, step: Step) -> Generator[None, StepResult, StepResult]:
        """Set the stage, its learning rate and temperature."""
        from eff_quant_lr2vq.stages import prepare_step

        prepare_step(step, self.config)
        return (yield)

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Replace attention by the nearest codeword: what is measured and shipped."""
        from eff_quant_lr2vq.insert import harden

        return harden(model, self.structure, run)

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data, run: Run) -> Metrics:
        """Report both errors, their prediction, d and bits of every layer, and the size."""
        from eff_quant_lr2vq.report import describe, draw_errors

        if run.keeps_files and self.structure.get("hard"):
            with run.output("errors.png", format="png") as path:
                draw_errors(self.structure, path)
        return describe(model, self.structure)

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write codes, codebooks and projections; the ratio is that of the file itself."""
        if target.format not in self.card.formats:
            return None
        from eff.files import describe_artifact
        from eff_quant_kit.packed import write_packed

        details = write_packed(model, target.path, run)
        ratio = float(str(self.structure["float_bytes"])) / target.path.stat().st_size
        return describe_artifact(target.path, target.format, {**details, "file_ratio": ratio})
