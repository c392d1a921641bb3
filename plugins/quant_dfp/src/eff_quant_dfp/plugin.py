"""Declares quant_dfp to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, ClassVar

from eff.method import Card, Check, Claim, Method, hookimpl
from eff.schemas import Metric, Metrics
from eff_quant_dfp.config import DFPConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget


class DFPTraining(Method[DFPConfig]):
    """Trains with 16-bit integer products in forward and backward passes; everything else as in float32."""

    card: ClassVar = Card(
        title="Mixed Precision Training of Convolutional Neural Networks using Integer Operations",
        authors=("Dipankar Das", "Naveen Mellempudi", "Dheevatsa Mudigere", "Dhiraj Kalamkar", "and others"),
        venue="ICLR",
        year=2018,
        paper="arXiv:1802.00930",
        url="https://arxiv.org/abs/1802.00930",
        needs=("train_data",),
        tasks=("any",),
        formats=("packed",),
        composes_with=("pruning masks on the master weights", "quantization in a run after it"),
        conflicts_with=("quant_*",),
        notes="The training recipe stays as it is. Not with --precision fp16 or bf16.",
    )
    claims: ClassVar = (
        Claim(
            id="digits",
            statement="16 and 12 bits in all three products train as well as float32, 4 bits worse.",
            run="eff_quant_dfp.claims:digits",
            checks=(
                Check(left="p16", right="float32", margin=-0.5),
                Check(left="p16", right="float32", relation="at_most", margin=0.5),
                Check(left="p12", right="float32", margin=-0.5),
                Check(left="p12", right="float32", relation="at_most", margin=0.5),
                Check(left="p4", right="p16", relation="at_most"),
            ),
            paper="ImageNet, four networks: INT16 reaches or exceeds float32 in as many iterations (abstract).",
            unit="% accuracy",
            seeds=(0, 1, 2),
            minutes=4,
        ),
        Claim(
            id="products",
            statement="Guaranteed chains never wrap, chains of 4 do; 16-bit products are within 1e-3 of float64.",
            run="eff_quant_dfp.claims:products",
            checks=(
                Check(left="guaranteed_wrapped", right=0.0, relation="at_most"),
                Check(left="guaranteed_difference", right=0.0, relation="at_most"),
                Check(left="full_scale_chain_4_wrapped", right=100.0),
                Check(left="random_chain_4_wrapped", right=0.01),
                Check(left="gaussian_error", right=1e-3, relation="at_most"),
            ),
            paper="INT16 products accumulate in INT32; overflow is avoided by short chains and head-room (abstract).",
            units={"wrapped": "%", "random_chain_4_error": "%"},
            seeds=(0, 1, 2),
            minutes=0.2,
        ),
    )

    def __init__(self, config: DFPConfig | None = None):
        super().__init__(config)
        self.exponents: dict[str, dict[str, list[int]]] = {}
        """By layer and role: lowest and highest exponent of the training so far."""
        self.overflows = 0

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Put DFP layers in place of linear layers and convolutions."""
        from eff.errors import RequestError
        from eff_quant_dfp.layers import insert
        from eff_quant_kit.layers import warn_left_in_float

        if run.precision != "fp32":
            raise RequestError(
                f"quant_dfp: --precision {run.precision} would round what it feeds its integers; use fp32"
            )
        chain = self.config.chain
        if chain != "auto" and chain != self.config.products and not run.restoring:
            run.warn(f"quant_dfp: chains are pairs of products; chain={chain} becomes {self.config.products}")
        warn_left_in_float("quant_dfp", model, run)
        return insert(model, self.config)

    @hookimpl(wrapper=True)
    def train_step(self, step: Step) -> Generator[None, StepResult, StepResult]:
        """Report overflows, flush rate and, for the log of exponents, what each tensor took."""
        from dataclasses import replace

        from eff_quant_dfp.report import note, seed_layers

        seed_layers(step.module, self.config, step.index)
        result = yield
        flushed, overflows = note(step.module, self.exponents)
        self.overflows += overflows
        own = {"flush_rate": Metric(value=100 * flushed, unit="%"), "overflows": Metric(value=self.overflows)}
        return replace(result, metrics={**result.metrics, **own})

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data | None, run: Run) -> Metrics:
        """Report the accuracy in float32 beside, the products' errors, exponents and flush rates; draw exponents."""
        from eff_quant_dfp.report import describe

        return describe(model, data, run, self.exponents, self.overflows)

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write the weights as integers of P bits with an exponent per tensor."""
        if target.format not in self.card.formats:
            return None
        from eff.files import describe_artifact
        from eff_quant_kit.packed import write_packed

        return describe_artifact(target.path, target.format, write_packed(model, target.path, run))

    def state_dict(self) -> dict[str, object]:
        """Return exponents and overflows so far."""
        return {"exponents": self.exponents, "overflows": self.overflows}

    def load_state_dict(self, state: object) -> None:
        """Take them back."""
        found = dict(state)  # type: ignore[call-overload]
        self.exponents, self.overflows = found.get("exponents", {}), int(found.get("overflows", 0))
