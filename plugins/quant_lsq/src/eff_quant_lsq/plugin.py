"""Declares quant_lsq to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from eff.method import Card, Check, Claim, Method, hookimpl
from eff.schemas import Metrics, TrainOptions
from eff_quant_lsq.config import LSQConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget


class LSQ(Method[LSQConfig]):
    """Learned step size quantization: trains the scale with the weights."""

    card: ClassVar = Card(
        title="Learned Step Size Quantization",
        authors=(
            "Steven K. Esser",
            "Jeffrey L. McKinstry",
            "Deepika Bablani",
            "Rathinakumar Appuswamy",
            "Dharmendra S. Modha",
        ),
        venue="ICLR",
        year=2020,
        paper="arXiv:1902.08153",
        url="https://arxiv.org/abs/1902.08153",
        needs=("train_data",),
        tasks=("any",),
        formats=("packed", "onnx"),
        composes_with=(
            "distillation",
            "pruning before it",
            "adapters on the quantized base",
            "optimisers without a trust ratio per tensor",
        ),
        conflicts_with=("quant_*",),
        notes="offset=true is LSQ+ (Bhalgat et al., CVPR workshops 2020, arXiv:2004.09576).",
    )
    claims: ClassVar = (
        Claim(
            id="w2a2_digits",
            statement="At 2 bits, learned steps beat frozen min-max steps, and without the gradient scale training collapses.",
            run="eff_quant_lsq.claims:w2a2_digits",
            checks=(
                Check(left="lsq", right="minmax", margin=1.0),
                Check(left="no_grad_scale", right="lsq", relation="at_most", margin=-20.0),
            ),
            paper="ImageNet ResNet-18 W2A2 67.6 % top-1 (float 70.5 %); without gradient scale the 2-bit run does not converge.",
            unit="% accuracy",
            minutes=2,
        ),
    )

    def __init__(self, config: LSQConfig | None = None):
        super().__init__(config)
        self.teacher: nn.Module | None = None
        self.lifted = 0
        """How often a step had to be lifted to its floor after an optimiser step."""

    def training(self) -> TrainOptions:
        """Return the paper's recipe: SGD with momentum, cosine decay to 0."""
        config = self.config
        return TrainOptions(
            optimizer="sgd", lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
            schedule="cosine", epochs=config.epochs,
        )  # fmt: skip

    def parameter_options(self, name: str, parameter: nn.Parameter) -> dict[str, Any]:
        """Steps and offsets get no weight decay."""
        is_step = name.endswith(("_quantizer.scale", "_quantizer.offset"))
        return {"weight_decay": 0.0} if is_step else {}

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Put quantizers before convolutions and linear layers and initialise them."""
        from eff.errors import RequestError
        from eff_quant_kit.learned_steps import insert_quantizers
        from eff_quant_lsq.distill import keep_teacher

        if self.config.distill and not hasattr(run.task.options, "classes"):
            raise RequestError(f"quant_lsq: distill=true needs a classifier; this model's task is {run.task.name}")
        if self.config.distill and run.training:
            self.teacher = keep_teacher(model)
        return insert_quantizers("quant_lsq", model, self.config, self.structure, run)

    @hookimpl(wrapper=True)
    def train_step(self, step: Step) -> Generator[None, StepResult, StepResult]:
        """Add the teacher's term to the loss; keep the steps positive afterwards."""
        from eff_quant_kit.quantizer import keep_scales_positive
        from eff_quant_lsq.distill import with_teacher

        if self.teacher is not None:
            step.loss = with_teacher(step.loss, self.teacher, step.run)
        result = yield
        self.lifted += keep_scales_positive(step.module)
        return result

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Take batch norm's statistics afresh where the options ask for it."""
        from eff_quant_kit.layers import reestimate_batch_norm

        if self.config.bn_samples:
            batches = run.batches("train", self.config.bn_samples, run.train.batch_size)
            if not reestimate_batch_norm(model, batches, lambda batch: run.forward(model, batch)):
                run.warn("quant_lsq: bn_samples has no effect, the model has no batch norm")
        return model

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data, run: Run) -> Metrics:
        """Report bits, packed size, clipping, and per layer the error and the ratio R."""
        from eff_quant_lsq.diagnostics import diagnose

        return diagnose(model, run, self.lifted)

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
        """Return the count of lifted steps."""
        return {"lifted": self.lifted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the count."""
        self.lifted = int(state.get("lifted", 0))
