"""Declares quant_hawqv3 to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, ClassVar

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff.schemas import Metrics, TrainOptions
from eff_quant_hawqv3.config import HAWQV3Config

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget

DECAY_EPOCHS = 30


class HAWQV3(Method[HAWQV3Config]):
    """HAWQ-V3: the network as integer products, sums and shifts, with 4 or 8 bits per layer."""

    card: ClassVar = Card(
        title="HAWQ-V3: Dyadic Neural Network Quantization",
        authors=(
            "Zhewei Yao",
            "Zhen Dong",
            "Zhangcheng Zheng",
            "Amir Gholami",
            "Jiali Yu",
            "Eric Tan",
            "Leyuan Wang",
            "Qijing Huang",
            "Yida Wang",
            "Michael W. Mahoney",
            "Kurt Keutzer",
        ),  # fmt: skip
        venue="ICML",
        year=2021,
        paper="arXiv:2011.10680",
        url="https://arxiv.org/abs/2011.10680",
        needs=("train_data",),
        tasks=("classification",),
        formats=("integer", "onnx"),
        composes_with=("pruning before it", "adversarial training before it"),
        conflicts_with=("quant_*",),
        notes="--epochs 0 quantizes without training. The finished model computes on integers, so nothing trains it further.",
    )
    claims: ClassVar = (
        Claim(
            id="digits",
            statement="Integers alone give the simulated network's codes bit for bit and float's accuracy at 8 bits; the "
            "integer programme is exact and its mix of 4 and 8 bits is no worse than 4 bits everywhere.",
            run="eff_quant_hawqv3.claims:digits",
            checks=(
                Check(left="equal_codes", right=100.0),
                Check(left="w8", right="float", margin=-1.0),
                Check(left="excess", right=0.0, relation="at_most"),
                Check(left="groups_alike", right=100.0),
                Check(left="mixed", right="w4"),
                Check(left="mixed_size", right=75.0, relation="at_most"),
                Check(left="reversed", right="mixed", relation="at_most"),
            ),
            paper="ImageNet ResNet-18: float 71.47, W8A8 71.56, mixed at half the bit operations 70.22, W4A4 68.45 %.",
            unit="% accuracy",
            units={"codes": "%", "alike": "%", "excess": "", "size": "% of 8 bits"},
            seeds=(0, 1, 2),
            minutes=3,
        ),
    )
    sample: ClassVar = Sample(
        model="eff.testing.samples:tiny_cnn",
        data="eff.testing.samples:blobs",
        options={"bits": "mixed", "trace_draws": 5, "trace_samples": 64, "calibration_samples": 64},
        train=TrainOptions(epochs=2, batch_size=64),
    )

    def __init__(self, config: HAWQV3Config | None = None):
        super().__init__(config)
        self.teacher: nn.Module | None = None

    def training(self) -> TrainOptions:
        """Return the reference's recipe; its decay by 0.1 every 30 epochs is done by `train_step`."""
        epochs = 1 if self.config.bits == 8 else 90
        return TrainOptions(
            optimizer="sgd", momentum=0.9, weight_decay=1e-4, lr=1e-4, schedule="constant", epochs=epochs
        )

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Read the model's operations, fold its norms, set ranges and choose bits."""
        import copy

        from eff_quant_hawqv3.quantize import quantize

        if run.training and self.config.distill:
            self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        return quantize(model, self.config, self.structure, run)

    @hookimpl(wrapper=True)
    def train_step(self, step: Step) -> Generator[None, StepResult, StepResult]:
        """Learn from the float model too where asked; decay the learning rate."""
        if self.teacher is not None:
            from eff_quant_hawqv3.quantize import distilled

            step.loss = distilled(step.loss, self.teacher, step.run)
        decay = 0.1 ** (step.epoch // DECAY_EPOCHS)
        groups = step.optimizer.param_groups if step.optimizer is not None else []
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= decay
        try:
            return (yield)
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data | None, run: Run) -> Metrics:
        """Report the float, simulated and integer paths, equality with the runner, bits, sizes and sensitivities."""
        from eff_quant_hawqv3.report import describe

        return describe(model, data, run, self.config, self.structure)

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write the integer program, or the same integers as an ONNX graph."""
        if target.format not in self.card.formats:
            return None
        from eff.errors import UnsupportedModelError
        from eff.files import describe_artifact
        from eff_quant_hawqv3.network import Network
        from eff_quant_hawqv3.onnx_graph import write_onnx
        from eff_quant_hawqv3.program import write_program

        if not isinstance(model, Network):
            raise UnsupportedModelError(
                f"quant_hawqv3: {type(model).__name__} is no integer network, nothing to export"
            )
        model.eval()
        details = (
            write_program(model, target.path) if target.format == "integer" else write_onnx(model, target.path, run)
        )
        return describe_artifact(target.path, target.format, details)
