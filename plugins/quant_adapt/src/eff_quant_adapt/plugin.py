"""Declares quant_adapt to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff.schemas import Metrics, TrainOptions
from eff_quant_adapt.config import AdaPTConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget
    from eff_quant_adapt.training import Trainer


class AdaPT(Method[AdaPTConfig]):
    """AdaPT: trains in fixed point, with as many bits per layer as its histogram and gradients ask for."""

    card: ClassVar = Card(
        title="Adaptive Precision Training (AdaPT): A dynamic fixed point quantized training approach for DNNs",
        authors=("Lorenz Kummer", "Kevin Sidak", "Tabea Reichmann", "Wilfried Gansterer"),
        venue="arXiv",
        year=2021,
        paper="arXiv:2107.13490",
        url="https://arxiv.org/abs/2107.13490",
        needs=("train_data",),
        tasks=("any",),
        formats=("packed",),
        composes_with=("pruning before it", "distillation", "learning-rate schedules"),
        conflicts_with=("quant_*",),
        notes="Speed-ups are those of the paper's performance model, not of a clock.",
    )
    claims: ClassVar = (
        Claim(
            id="digits",
            statement="Within a point of float32 with fewer than 24 bits on average and under 0.75 of its size.",
            run="eff_quant_adapt.claims:digits",
            checks=(
                Check(left="adapt", right="float32", margin=-1.0),
                Check(left="adapt_mean_wl", right=24.0, relation="at_most"),
                Check(left="adapt_size_ratio", right=0.75, relation="at_most"),
                Check(left="fixed_8_4", right="adapt", relation="at_most", margin=-1.0),
                Check(left="no_push_up", right="adapt", relation="at_most", margin=-1.0),
            ),
            paper="CIFAR: accuracy +0.98 points, modelled inference speed-up 2.33, size 0.52 on average (abstract).",
            unit="% accuracy",
            units={"wl": "bits", "ratio": "", "speedup": "", "sparsity": "%"},
            seeds=(0, 1, 2),
            minutes=5,
        ),
    )
    sample: ClassVar = Sample(
        model="eff.testing.samples:tiny_cnn",
        data="eff.testing.samples:blobs",
        options={"lb_min": 1, "lb_max": 2},
        train=TrainOptions(epochs=2, batch_size=64),
    )

    def __init__(self, config: AdaPTConfig | None = None):
        super().__init__(config)
        self.trainer: Trainer | None = None

    def training(self) -> TrainOptions:
        """Return the reference code's recipe: SGD with momentum."""
        config = self.config
        return TrainOptions(
            optimizer="sgd", lr=config.lr, momentum=config.momentum, weight_decay=config.l2, epochs=config.epochs
        )

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Wrap layers, keep the master copy, quantize the parameters."""
        from eff.errors import RequestError
        from eff_quant_adapt.layers import insert
        from eff_quant_adapt.training import Trainer

        if run.precision != "fp32":
            raise RequestError(
                f"quant_adapt: --precision {run.precision} is a second precision beside fixed point; use fp32"
            )
        model = insert(model, self.config)
        if run.training or not run.restoring:
            self.trainer = Trainer(model, self.config, run)
        return model

    @hookimpl
    def train_step(self, step: Step) -> StepResult:
        """Do one step with format switching."""
        assert self.trainer is not None
        return self.trainer.step(step)

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Keep for the checkpoint what only the training tells."""
        from eff_quant_adapt.report import of_training

        if self.trainer is not None:
            self.structure["trained"] = of_training(self.trainer)  # type: ignore[assignment]
        return model

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data | None, run: Run) -> Metrics:
        """Report formats, sparsity and the performance model; draw word lengths."""
        from eff_quant_adapt.report import describe

        trained = self.structure.get("trained") or {}
        return describe(model, self.trainer, trained, run)  # type: ignore[arg-type]

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write integer weights of WL bits, zeros left out where that is shorter."""
        if target.format not in self.card.formats:
            return None
        from eff.files import describe_artifact
        from eff_quant_kit.packed import write_packed

        return describe_artifact(target.path, target.format, write_packed(model, target.path, run))

    def state_dict(self) -> dict[str, Any]:
        """Return the master copy and what formats depend on."""
        return self.trainer.state_dict() if self.trainer is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        if self.trainer is not None and state:
            self.trainer.load_state_dict(dict(state))
