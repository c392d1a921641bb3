"""Declares quant_emq to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff.schemas import Metric, Metrics
from eff_quant_emq.config import EMQConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget
    from eff_quant_emq.search import Search


class EMQ(Method[EMQConfig]):
    """EMQ: evolves a training-free formula that ranks bit assignments, and assigns bits with it."""

    card: ClassVar = Card(
        title="EMQ: Evolving Training-free Proxies for Automated Mixed Precision Quantization",
        authors=("Peijie Dong", "Lujun Li", "Zimian Wei", "Xin Niu", "Zhiliang Tian", "Hengyue Pan"),
        venue="ICCV",
        year=2023,
        paper="arXiv:2307.10554",
        url="https://arxiv.org/abs/2307.10554",
        needs=("calibration_data",),
        tasks=("classification", "text_classification"),
        formats=("packed", "onnx"),
        composes_with=("pruning before it",),
        conflicts_with=("quant_*",),
        notes="Builds its own table of quantized qualities; preset=snip and others skip the search.",
    )
    claims: ClassVar = (
        Claim(
            id="digits",
            statement="An evolved proxy ranks unseen bit configurations as well as the best hand-made one and better than size.",
            run="eff_quant_emq.claims:digits",
            checks=(
                Check(left="evolved", right="best_hand_made", margin=-0.02),
                Check(left="evolved", right="size", margin=0.05),
                Check(left="full_without_screening_over_with", right=3.0),
            ),
            paper="MQ-Bench-101: Spearman 0.79 at 100 %, best earlier proxy 0.75 (secondary summary).",
            seeds=(0, 1, 2),
            minutes=4,
        ),
        Claim(
            id="exhaustive",
            statement="Over all configurations of a small space an evolved proxy ranks as well as the best hand-made one and picks better than size.",
            run="eff_quant_emq.claims:exhaustive",
            checks=(
                Check(left="evolved", right="best_hand_made", margin=-0.02),
                Check(left="evolved", right="size", margin=0.05),
                Check(left="evolved_pick", right="size_pick", relation="at_most"),
            ),
            paper="MQ-Bench-101: Spearman 0.79 at 100 %, best earlier proxy 0.75 (secondary summary).",
            units={"pick": "%"},
            seeds=(0, 1, 2),
            minutes=2,
        ),
    )
    sample: ClassVar = Sample(
        model="zoo:digits_cnn",
        data="digits?train=128&test=64",
        options={"population": 10, "iterations": 6, "bench_samples": 64, "batch_size": 32},
    )

    def __init__(self, config: EMQConfig | None = None):
        super().__init__(config)
        self.search: Search | None = None

    def step_count(self, run: Run) -> int | None:
        """Return one step per iteration."""
        return self.config.iterations if self.search is not None and self.config.preset == "none" else 0

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Measure the table and the inputs, and draw the first population; bits come at the end of the search."""
        from eff_quant_emq.assign import insert
        from eff_quant_emq.search import Search

        if run.restoring and not run.training:
            bits: dict[str, int] = self.structure["bits"]  # type: ignore[assignment]
            return insert(model, bits, initialise=False)
        self.search = Search(model, self.config, run)
        if self.config.preset != "none" or not run.training or not self.config.iterations:
            return self.finish(model, run)
        return model

    @hookimpl
    def train_step(self, step: Step) -> StepResult:
        """Breed one expression."""
        import torch

        from eff.run import StepResult

        assert self.search is not None
        step.module.eval()
        best = self.search.step(step.index)
        return StepResult(torch.tensor(1.0 - best), {"rho": Metric(value=best)})

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Assign bits with the best proxy and put the quantizers in."""
        from eff_quant_emq.assign import insert

        if self.search is None or "bits" in self.structure:
            return model
        self.structure |= self.search.results()
        bits: dict[str, int] = self.structure["bits"]  # type: ignore[assignment]
        return insert(model, bits)

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data | None, run: Run) -> Metrics:
        """Report rank correlations of all proxies on configurations kept from the search, bits and sizes."""
        from eff_quant_emq.search import describe

        if run.keeps_files and self.search is not None:
            with run.output("proxy.png", format="png") as path:
                self.search.draw(path)
            with run.output("proxy.json", format="json") as path:
                import json

                path.write_text(json.dumps({key: self.structure[key] for key in ("genes", "bits")}, indent=2), "utf-8")
        return describe(model, self.structure)

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write packed integers or ONNX."""
        if target.format not in self.card.formats:
            return None
        from eff.files import describe_artifact
        from eff_quant_kit.onnx_qdq import write_onnx
        from eff_quant_kit.packed import write_packed

        writer = {"packed": write_packed, "onnx": write_onnx}[target.format]
        return describe_artifact(target.path, target.format, writer(model, target.path, run))

    def state_dict(self) -> dict[str, Any]:
        """Return the population and what is known."""
        return self.search.evolution.state_dict() if self.search is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        if self.search is not None and state:
            self.search.evolution.load_state_dict(state)
