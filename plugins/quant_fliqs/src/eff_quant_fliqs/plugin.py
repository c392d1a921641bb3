"""Declares quant_fliqs to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff.schemas import Metric, Metrics, TrainOptions
from eff_quant_fliqs.config import FLIQSConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget
    from eff_quant_fliqs.policy import Policy


class FLIQS(Method[FLIQSConfig]):
    """FLIQS: a policy finds each layer's number format while the network trains once."""

    card: ClassVar = Card(
        title="FLIQS: One-Shot Mixed-Precision Floating-Point and Integer Quantization Search",
        authors=("Jordan Dotzel", "Gang Wu", "Andrew Li", "Muhammad Umar", "and others"),
        venue="AutoML",
        year=2024,
        paper="arXiv:2308.03290",
        url="https://arxiv.org/abs/2308.03290",
        needs=("train_data",),
        tasks=("any",),
        formats=("packed",),
        composes_with=("pruning before it", "distillation"),
        conflicts_with=("quant_*",),
        notes="Formats: int2 to int8, e2m1 (FP4), e4m3 and e5m2 (FP8) and others of 3 to 8 bits.",
    )
    claims: ClassVar = (
        Claim(
            id="digits",
            statement="At the cost of 4 bits a searched mix beats random mixes by a point and needs no retraining.",
            run="eff_quant_fliqs.claims:digits",
            checks=(
                Check(left="searched", right="random", margin=1.0),
                Check(left="searched_cost_over_target", right=1.1, relation="at_most"),
                Check(left="searched_cost_over_target", right=0.9),
                Check(left="searched_entropy", right=0.2, relation="at_most"),
                Check(left="retrained", right="searched", relation="at_most", margin=0.5),
            ),
            paper="ImageNet ResNet-18, widest point: 75.26 % at cost 128 against 74.22 % of E2M1 at 113 (plot script).",
            unit="% accuracy",
            units={"target": "", "entropy": "nats", "cost": ""},
            seeds=(0, 1, 2),
            minutes=10,
        ),
        Claim(
            id="floating",
            statement="A search over FP4, FP8 and integers is at least as good as each of them everywhere at equal cost.",
            run="eff_quant_fliqs.claims:floating",
            checks=(
                Check(left="searched_4", right="int4"),
                Check(left="searched_4", right="e2m1"),
                Check(left="searched_8", right="int8"),
                Check(left="searched_8", right="e4m3"),
                Check(left="searched_6", right="e4m3", margin=-0.5),
                Check(left="searched_4_cost", right="uniform_4_cost", relation="at_most"),
            ),
            paper="ImageNet ResNet-18, widest point: 75.26 % at cost 128; E2M1 74.22 % at 113, E4M3 75.43 % at 452 (plot script).",
            unit="% accuracy",
            units={"cost": "", "floating": "%"},
            seeds=(0, 1, 2, 3),
            minutes=3,
        ),
    )
    sample: ClassVar = Sample(
        model="eff.testing.samples:tiny_cnn",
        data="eff.testing.samples:blobs",
        options={"skip": [], "formats": ["int4", "e4m3"], "target_cost": 0.5},
        train=TrainOptions(epochs=2, batch_size=64),
    )

    def __init__(self, config: FLIQSConfig | None = None):
        super().__init__(config)
        self.policy: Policy | None = None
        self.delay = self.total = 0

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Wrap layers and begin with an even policy."""
        from eff.errors import RequestError
        from eff_quant_fliqs.layers import check_target, insert
        from eff_quant_fliqs.policy import Policy

        config = self.config
        if not run.training and not run.restoring:
            raise RequestError("quant_fliqs: formats are found while the network trains; use --epochs above 0")
        model = insert(model, config, self.structure, run)
        if not run.restoring:
            check_target(self.structure, config)
            if len(config.formats) == 1:
                run.warn("quant_fliqs: with one format there is nothing to search")
        if run.training:
            self.policy = Policy(len(self.structure["decisions"]), len(config.formats), config)  # type: ignore[arg-type]
            batch = (run.train.batch_size or 64) * (run.train.accumulate or 1)
            self.total = max(1, len(run.split("train")) // batch) * (run.train.epochs or 0)
            self.delay = round(config.delay_frac * self.total)
        return model

    @hookimpl(wrapper=True)
    def train_step(self, step: Step) -> Generator[None, StepResult, StepResult]:
        """Draw formats, train on the batch, reward the policy."""
        from dataclasses import replace

        from eff_quant_fliqs.layers import cost, set_choices
        from eff_quant_fliqs.policy import entropy_weight, reward

        policy, config = self.policy, self.config
        assert policy is not None
        early = step.index < self.delay
        choices = policy.sample(uniform=early)
        set_choices(step.module, self.structure, choices)
        result = yield
        found = cost(self.structure, config, choices)
        if not early:
            value = reward(-float(result.loss), found / config.target_cost, config)
            policy.update(choices, value, entropy_weight(step.index, self.delay, self.total, config))
        entropy = float(policy.entropy().detach())
        policy.entropies.append(entropy)
        policy.costs.append(found)
        own = {"cost": Metric(value=found), "entropy": Metric(value=entropy, unit="nats")}
        return replace(result, metrics={**result.metrics, **own})

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Take the likeliest formats, estimate batch norms with them, fix the scales."""
        from eff_quant_fliqs.layers import format_layers, set_choices
        from eff_quant_fliqs.report import draw, pareto_points, search_table
        from eff_quant_kit.layers import reestimate_batch_norm

        assert self.policy is not None
        self.structure["chosen"] = self.policy.best()  # type: ignore[assignment]
        set_choices(model, self.structure, self.policy.best())
        if self.config.bn_samples:
            batches = run.batches("train", self.config.bn_samples, run.train.batch_size)
            reestimate_batch_norm(model, batches, lambda batch: run.forward(model, batch))
        self.structure["entropy"] = float(self.policy.entropy().detach())
        pi = self.policy.probabilities().detach()
        self.structure["table"] = search_table(model, self.config, self.structure, pi, run)  # type: ignore[assignment]
        if run.keeps_files:
            points = pareto_points(model, self.config, self.structure, run)
            with run.output("pareto.png", format="png") as path:
                draw(points, self.config.target_cost, path)
        for layer in format_layers(model).values():
            layer.fix()
        return model

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data | None, run: Run) -> Metrics:
        """Report formats, cost, entropy and what flips would do."""
        from eff_quant_fliqs.report import describe

        return describe(model, self.config, self.structure)

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write codes of each layer's format with its table of values."""
        if target.format not in self.card.formats:
            return None
        from eff.files import describe_artifact
        from eff_quant_kit.packed import write_packed

        return describe_artifact(target.path, target.format, write_packed(model, target.path, run))

    def state_dict(self) -> dict[str, Any]:
        """Return the policy."""
        return self.policy.state_dict() if self.policy is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        if self.policy is not None and state:
            self.policy.load_state_dict(dict(state))
