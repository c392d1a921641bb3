"""Declares quant_adaquant to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff.schemas import Metrics
from eff_quant_adaquant.config import AdaQuantConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget
    from eff_quant_adaquant.pipeline import Pipeline


class AdaQuant(Method[AdaQuantConfig]):
    """Post-training quantization that repairs each layer, picks its bits optimally and re-tunes statistics."""

    card: ClassVar = Card(
        title="Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming",
        authors=("Itay Hubara", "Yury Nahshan", "Yair Hanani", "Ron Banner", "Daniel Soudry"),
        venue="ICML (as: Accurate Post Training Quantization with Small Calibration Sets)",
        year=2021,
        paper="arXiv:2006.10518",
        url="https://arxiv.org/abs/2006.10518",
        needs=("calibration_data",),
        tasks=("any",),
        formats=("packed", "onnx"),
        composes_with=("pruning before it", "adapters on the quantized base", "adversarial evaluation of the result"),
        conflicts_with=("quant_*",),
        notes="Calibrates on training samples; labels serve only ip_metric=loss and acc.",
    )
    claims: ClassVar = (
        Claim(
            id="w2a4_digits",
            statement="With 100 images, moving each layer a little repairs most of what 2-bit weights cost; no labels.",
            run="eff_quant_adaquant.claims:w2a4_digits",
            checks=(
                Check(left="parallel", right="minmax", margin=1.0),
                Check(left="sequential", right="minmax", margin=1.0),
                Check(left="sequential", right="parallel", margin=-0.5),
            ),
            paper="ImageNet ResNet-50: under 1 % loss with 4-bit weights and activations in all but two layers (abstract).",
            unit="% accuracy",
            seeds=(0, 1, 2),
            minutes=3,
        ),
    )
    sample: ClassVar = Sample(
        model="zoo:digits_cnn",
        data="digits?train=128&test=64",
        options={"iters": 4, "bias_epochs": 1, "calib_size": 64, "target_ratio": 0.2},
    )

    def __init__(self, config: AdaQuantConfig | None = None):
        super().__init__(config)
        self.pipeline: Pipeline | None = None

    def step_count(self, run: Run) -> int | None:
        """Return the steps over all layers and candidates, and those of bias tuning."""
        return self.pipeline.step_count if self.pipeline is not None else 0

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Fold batch norms, put quantizers before convolutions and linear layers and measure their ranges."""
        from eff_quant_kit.folding import fold_pairs

        if run.restoring and not run.training:
            from eff_quant_adaquant.insert import finished_layers

            fold_pairs(model, self.structure["folded"])  # type: ignore[arg-type]
            return finished_layers(model, self.structure["bits"])  # type: ignore[arg-type]
        from eff_quant_adaquant.pipeline import Pipeline

        self.pipeline = Pipeline(model, self.config, self.structure, run)
        return self.pipeline.model

    @hookimpl
    def train_step(self, step: Step) -> StepResult:
        """Do one step on the layer that is next, or on the biases."""
        from eff.run import StepResult

        assert self.pipeline is not None
        step.module.eval()
        return StepResult(self.pipeline.step(step.index))

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Choose bits and tune norms where that has not happened; replace the calibrated layers by the kit's."""
        from eff_quant_adaquant.insert import convert

        assert self.pipeline is not None
        self.pipeline.finish()
        self.pipeline = None
        return convert(model)

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data, run: Run) -> Metrics:
        """Report bits and size, and what was measured while calibrating."""
        from eff_quant_adaquant.report import describe

        return describe(model, self.structure)

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write packed integers or ONNX with QuantizeLinear/DequantizeLinear."""
        if target.format not in self.card.formats:
            return None
        from eff.files import describe_artifact
        from eff_quant_kit.onnx_qdq import write_onnx
        from eff_quant_kit.packed import write_packed

        writer = {"packed": write_packed, "onnx": write_onnx}[target.format]
        return describe_artifact(target.path, target.format, writer(model, target.path, run))

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what has been found so far."""
        return self.pipeline.state_dict() if self.pipeline is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        if self.pipeline is not None and state:
            self.pipeline.load_state_dict(state)
