"""Declares quant_double_rounding to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff.schemas import Metrics, TrainOptions
from eff_quant_double_rounding.config import DoubleRoundingConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget
    from eff_quant_double_rounding.training import Trainer


class DoubleRounding(Method[DoubleRoundingConfig]):
    """Double Rounding: one stored 8-bit model that computes at 8, 6, 4 or 2 bits, switched at run time."""

    card: ClassVar = Card(
        title="Nearly Lossless Adaptive Bit Switching",
        authors=("Haiduo Huang", "Zhenhua Liu", "Tian Xia", "Wenzhe Zhao", "Pengju Ren"),
        venue="arXiv",
        year=2025,
        paper="arXiv:2502.01199",
        url="https://arxiv.org/abs/2502.01199",
        needs=("train_data",),
        tasks=("classification", "text_classification"),
        formats=("packed",),
        composes_with=("distillation", "pruning before it"),
        conflicts_with=("quant_*",),
        notes="eff evaluate MODEL --bits 4 switches. Not with --accumulate: every width takes its own step.",
    )
    claims: ClassVar = (
        Claim(
            id="digits",
            statement="One model is near float at 8, 6 and 4 bits and within 2 points at 2; floor in the second rounding is worse.",
            run="eff_quant_double_rounding.claims:digits",
            checks=(
                Check(left="nested", right=100.0),
                Check(left="double_8", right="float", margin=-1.0),
                Check(left="double_6", right="float", margin=-1.0),
                Check(left="double_4", right="float", margin=-1.0),
                Check(left="double_2", right="float", margin=-2.0),
                Check(left="floor_worst", right="double_worst", relation="at_most", margin=-2.0),
                Check(left="plain_2", right="double_2", relation="at_most", margin=-10.0),
            ),
            paper="ImageNet ResNet-18: 70.74, 70.71, 70.43 and 66.35 % at 8, 6, 4 and 2 bits; float 69.76 %.",
            unit="% accuracy",
            units={"nested": "%"},
            seeds=(0, 1, 2),
            minutes=5,
        ),
        Claim(
            id="file",
            statement="The file of four widths is no larger than one of 8 bits alone.",
            run="eff_quant_double_rounding.claims:files",
            checks=(
                Check(left="resnet20_all", right="resnet20_8_lsq", relation="at_most"),
                Check(left="resnet20_all", right="resnet20_8_alone", relation="at_most"),
                Check(left="resnet20_all", right="resnet20_four_files", relation="at_most"),
                Check(left="wide_all", right="wide_8_lsq", relation="at_most"),
                Check(left="wide_all", right="wide_8_alone", relation="at_most"),
                Check(left="wide_all", right="wide_four_files", relation="at_most"),
            ),
            paper="The integers of the highest width are the only weights stored; norms and scales are one set per width.",
            unit="B",
            seeds=(0,),
            minutes=1,
        ),
    )
    sample: ClassVar = Sample(
        model="eff.testing.samples:tiny_cnn",
        data="eff.testing.samples:blobs",
        options={"exclude": [], "mixed": True, "hessian_samples": 64},
        train=TrainOptions(epochs=2, batch_size=64),
    )

    def __init__(self, config: DoubleRoundingConfig | None = None):
        super().__init__(config)
        self.trainer: Trainer | None = None
        self.width = self.config.widths[0]

    def training(self) -> TrainOptions:
        """Return the paper's recipe: Adam, cosine."""
        config = self.config
        return TrainOptions(
            optimizer="adam", lr=config.lr, weight_decay=config.weight_decay, schedule="cosine", epochs=config.epochs
        )

    def parameter_options(self, name: str, parameter: nn.Parameter) -> dict[str, Any]:
        """Scales get no weight decay."""
        return {"weight_decay": 0.0} if name.endswith(".scale") else {}

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Put switchable layers and norms in; for a supernet, measure the float model's Hessian traces."""
        import copy

        from eff.errors import RequestError
        from eff_quant_double_rounding.layers import choose_layers, insert
        from eff_quant_double_rounding.search import traces
        from eff_quant_double_rounding.training import Trainer

        config = self.config
        if (run.train.accumulate or 1) > 1:
            raise RequestError("quant_double_rounding: every width takes its own step; leave out --accumulate")
        if config.distill != "none" and not hasattr(run.task.options, "classes"):
            raise RequestError(f"quant_double_rounding: distill needs a classifier; the task is {run.task.name}")
        teacher = None
        if config.distill == "teacher" and run.training:
            teacher = copy.deepcopy(model).eval().requires_grad_(False)
        if config.mixed and not run.restoring:
            self.structure["traces"] = traces(model, choose_layers(model, config, run), config, run)  # type: ignore[assignment]
        model = insert(model, config, self.structure, run)
        if run.training:
            self.trainer = Trainer(model, config, self.structure, teacher)
        return model

    @hookimpl
    def train_step(self, step: Step) -> StepResult:
        """Train all widths on one batch."""
        assert self.trainer is not None
        return self.trainer.step(step)

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Search the supernet; keep the training's figures for the checkpoint."""
        from eff_quant_double_rounding.layers import switch
        from eff_quant_double_rounding.search import evaluate_subnets, subnets

        if self.trainer is not None:
            found = {b: total / max(1.0, count) for b, (total, count) in self.trainer.gradients.items()}
            self.structure["scale_gradients"] = found  # type: ignore[assignment]
        if self.config.mixed and self.structure.get("in_supernet"):
            nets = subnets(model, self.config, self.structure)
            self.structure["subnets"] = nets  # type: ignore[assignment]
            self.structure["subnet_losses"] = evaluate_subnets(model, self.structure, nets, run)  # type: ignore[assignment]
            switch(model, self.structure, self.width)
        return model

    def switch(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        """Compute at `bits` from now on."""
        from eff.errors import RequestError
        from eff_quant_double_rounding.layers import switch

        unknown = [name for name in settings if name != "bits"]
        if unknown:
            raise RequestError(f"quant_double_rounding: has no setting '{unknown[0]}' to switch; it has bits")
        switch(model, self.structure, int(settings["bits"]))
        self.width = int(settings["bits"])

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data | None, run: Run) -> Metrics:
        """Report every width, nestedness, scale gradients and subnets."""
        from eff_quant_double_rounding.report import describe

        return describe(model, data, run, self.config, self.structure, self.width)

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write the integers of the highest width with the scales and norms of all widths."""
        if target.format not in self.card.formats:
            return None
        from eff.files import describe_artifact
        from eff_quant_kit.packed import write_packed

        return describe_artifact(target.path, target.format, write_packed(model, target.path, run))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return self.trainer.state_dict() if self.trainer is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        if self.trainer is not None and state:
            self.trainer.load_state_dict(dict(state))
