"""Declares train_adamp, and the optimizers adamp and sgdp, to eff. Imports no torch."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from eff.method import Card, Check, Claim, Extension, Method, hookimpl
from eff.schemas import Metric, Metrics, TrainOptions
from eff_train_adamp.config import ADAMP_LR, AdamPConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff_train_adamp.tracking import Track


class ProjectedOptimizers(Extension):
    """Makes `--optimizer adamp` and `--optimizer sgdp` available to every run; names the parameter of a bad gradient."""

    optimizers: ClassVar = {
        "adamp": "eff_train_adamp.optimizers:AdamP",
        "sgdp": "eff_train_adamp.optimizers:SGDP",
    }

    @hookimpl(wrapper=True)
    def train_step(self, step: Step) -> Generator[None, StepResult, StepResult]:
        """Put the model's name of the parameter into the fault: the optimizer only knows its position."""
        from eff_train_adamp.optimizers import GradientError

        try:
            return (yield)
        except GradientError as error:
            for name, parameter in step.module.named_parameters():
                if parameter is error.parameter:
                    raise error.of(name) from error
            raise


class ProjectedTraining(Method[AdamPConfig]):
    """Trains with AdamP or SGDP and reports how norms and effective steps went."""

    card: ClassVar = Card(
        title="AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
        authors=(
            "Byeongho Heo",
            "Sanghyuk Chun",
            "Seong Joon Oh",
            "Dongyoon Han",
            "Sangdoo Yun",
            "Gyuwan Kim",
            "Youngjung Uh",
            "Jung-Woo Ha",
        ),
        venue="ICLR",
        year=2021,
        paper="arXiv:2006.08217",
        url="https://arxiv.org/abs/2006.08217",
        tasks=("any",),
        needs=("train_data",),
        composes_with=("quantization-aware training", "pruning with masks", "distillation", "losses of other methods"),
        notes="In a run with other methods name train_adamp last: the last one that names an optimizer decides.",
    )
    claims: ClassVar = (
        Claim(
            id="norm_growth",
            statement="Momentum b multiplies the norm growth of scale-invariant weights by 1 + 2b/(1-b).",
            run="eff_train_adamp.claims:norm_growth",
            checks=(
                Check(left="factor_b0.5", right=3.0, margin=-0.3),
                Check(left="factor_b0.5", right=3.0, relation="at_most", margin=0.3),
                Check(left="factor_b0.9", right=19.0, margin=-1.9),
                Check(left="factor_b0.9", right=19.0, relation="at_most", margin=1.9),
            ),
            paper="Growth factor 1 + 2b/(1-b) in the limit, 3 for b = 0.5 and 19 for b = 0.9.",
            minutes=0.1,
        ),
        Claim(
            id="toy_descent",
            statement="On a scale-invariant toy problem the projected optimizers have the smaller norm after every step "
            "but the first, and end no farther from the minimum.",
            run="eff_train_adamp.claims:toy_descent",
            checks=(
                Check(left="sgdp_smaller_norm", right=100.0),
                Check(left="adamp_smaller_norm", right=100.0),
                Check(left="sgdp_angle", right="sgd_angle", relation="at_most"),
                Check(left="adamp_angle", right="adam_angle", relation="at_most"),
            ),
            paper="Toy problems of the paper: momentum inflates the norm and slows the descent, the projection does not.",
            unit="% of steps",
            units={"angle": "degrees"},
            seeds=(0, 1, 2, 3, 4),
            minutes=0.1,
        ),
        Claim(
            id="digits_effective_step",
            statement="With the same rate and decay, AdamP and SGDP keep norms smaller and late effective steps larger "
            "than AdamW and SGD, and lose no accuracy.",
            run="eff_train_adamp.claims:digits_effective_step",
            checks=(
                Check(left="adamp_norm", right="adamw_norm", relation="at_most"),
                Check(left="sgdp_norm", right="sgd_norm", relation="at_most"),
                Check(left="adamp_step", right="adamw_step"),
                Check(left="sgdp_step", right="sgd_step"),
                Check(left="adamp_accuracy", right="adamw_accuracy", margin=-0.3),
                Check(left="sgdp_accuracy", right="sgd_accuracy", margin=-0.3),
            ),
            paper="Uniform gains over SGD and Adam(W) on 13 benchmarks; smaller norms and larger effective steps.",
            unit="%",
            units={"norm": "", "step": "x 1e-3"},
            seeds=(0, 1, 2, 3, 4),
            minutes=2,
        ),
    )

    def __init__(self, config: AdamPConfig | None = None):
        super().__init__(config)
        self.track: Track | None = None
        """How norms and steps went so far; None before the first step."""

    def training(self) -> TrainOptions:
        """Return the optimizer with its options; epochs, schedule and batches are the run's."""
        config = self.config
        return TrainOptions(
            optimizer=config.optimizer,
            lr=config.lr if config.lr is not None else ADAMP_LR,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            optimizer_options=config.constructor_options(),
        )

    @hookimpl(wrapper=True)
    def train_step(self, step: Step) -> Generator[None, StepResult, StepResult]:
        """Let the step be done; look at the weights before and after."""
        from eff_train_adamp.tracking import Track

        if self.track is None:
            self.track = Track.of(step.module)
            self._warn_of_another_optimizer(step.run)
        before = self.track.weights(step.module) if self.config.track and step.last_of_step else None
        result = yield
        if before is not None:
            self.track.add(step.module, before, step.epoch, self.config.delta, self.config.eps)
        return result

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Say how often weights were found scale invariant."""
        if self.track is not None and self.track.epochs:
            verb = "projected" if run.train.optimizer in ProjectedOptimizers.optimizers else "would have projected"
            run.log.info(f"train_adamp: {verb} {self.track.projected_share():.0f} % of the updates of weights")
        return model

    def _warn_of_another_optimizer(self, run: Run) -> None:
        own, used = self.config.optimizer, run.train.optimizer
        if used != own:
            run.warn(
                f"train_adamp: this run trains with {used}, not with {own}, and is only followed; leave out --optimizer, "
                "or name train_adamp last"
            )

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data, run: Run) -> Metrics:
        """Report the mean norm of the weights and, after training here, what happened per layer."""
        from eff_train_adamp.tracking import mean_norm

        values = {"weight_norm": Metric(value=mean_norm(model))}
        if self.track is None or not self.track.epochs:
            return Metrics(values=values)
        return Metrics(values=values, tables={"optimizer_layers": self.track.table()})

    def state_dict(self) -> dict[str, Any]:
        """Return what has been followed so far."""
        return self.track.state() if self.track is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on following where a run was interrupted."""
        from eff_train_adamp.tracking import Track

        self.track = Track.from_state(state) if state else None
