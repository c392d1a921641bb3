"""Declares quant_codenet to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, ClassVar

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff.schemas import Metrics, TrainOptions
from eff_quant_codenet.config import CoDeNetConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget


class CoDeNetMethod(Method[CoDeNetConfig]):
    """CoDeNet: a detector with deformable convolutions that suit hardware, 4-bit weights and 8-bit activations."""

    card: ClassVar = Card(
        title="CoDeNet: Efficient Deployment of Input-Adaptive Object Detection on Embedded FPGAs",
        authors=(
            "Qijing Huang",
            "Dequan Wang",
            "Zhen Dong",
            "Yizhao Gao",
            "Yaohui Cai",
            "Tian Li",
            "Bichen Wu",
            "Kurt Keutzer",
            "John Wawrzynek",
        ),  # fmt: skip
        venue="FPGA",
        year=2021,
        paper="arXiv:2006.08357",
        url="https://arxiv.org/abs/2006.08357",
        needs=("train_data",),
        tasks=("detection",),
        formats=("packed", "onnx"),
        composes_with=("distillation", "pruning before it, of whole shuffle halves"),
        conflicts_with=("quant_*",),
        notes="Train the float detector first: eff train codenet:small --data scenes. --epochs 0 quantizes without training.",
    )
    claims: ClassVar = (
        Claim(
            id="scenes",
            statement="Offsets that adapt to the image help detection, the square form keeps some of it, and training with "
            "4-bit weights and 8-bit activations stays near float and above rounding alone.",
            run="eff_quant_codenet.claims:scenes",
            checks=(
                Check(left="full", right="square"),
                Check(left="square", right="none"),
                Check(left="square_w4a8", right="square_more", margin=-3.0),
                Check(left="square_w4a8", right="square_rounded"),
            ),
            paper="VOC 512: CoDeNet 1x 64.6 AP50 in float, 61.7 with W4A8. VOC AP by operator: depthwise 3x3 39.1, "
            "deformable 42.9, bounded 41.0, square 41.1.",
            unit="% AP50",
            seeds=(0, 1, 2),
            minutes=10,
        ),
    )
    sample: ClassVar = Sample(
        model="codenet:small?width=4,8,8&blocks=1&decoder=8&head=4",
        data="scenes?train=16&test=8&size=32",
        options={"calibration_samples": 8},
        train=TrainOptions(epochs=1, batch_size=8),
    )

    def training(self) -> TrainOptions:
        """Return the reference's recipe; its drops of the learning rate are done by `train_step`."""
        return TrainOptions(
            optimizer="adam", lr=1.25e-4, batch_size=32, epochs=180, weight_decay=0.0, schedule="constant"
        )  # fmt: skip

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Fold batch norms, insert quantizers and round the offsets."""
        from eff_quant_codenet.quantize import quantize

        return quantize(model, self.config, self.structure, run)

    @hookimpl(wrapper=True)
    def train_step(self, step: Step) -> Generator[None, StepResult, StepResult]:
        """Take the task's step with the learning rate of this epoch."""
        decay = 0.1 ** sum(step.epoch >= epoch for epoch in self.config.drops)
        groups = step.optimizer.param_groups if step.optimizer is not None else []
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= decay
        try:
            return (yield)
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Fold the norms for good and fix the scales."""
        from eff_quant_codenet.quantize import finish

        return finish(model, self.structure)

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data | None, run: Run) -> Metrics:
        """Report multiply-accumulates, bits, sizes, activation parameters and the histogram of the offsets."""
        from eff_quant_codenet.report import describe

        return describe(model, data, run)

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write packed integers or ONNX with integer weights."""
        if target.format not in self.card.formats:
            return None
        from eff.files import describe_artifact
        from eff_quant_codenet.storage import write

        return describe_artifact(target.path, target.format, write(model, target.format, target.path, run))
