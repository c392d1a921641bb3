"""Declares nas_tangle to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from eff.method import Card, Check, Claim, Method, hookimpl
from eff.schemas import Metric, Metrics, TrainOptions
from eff_nas_tangle.config import TangleConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget
    from eff_nas_tangle.search import Search

GENOTYPE_FILE = "genotype.json"


class TangleNAS(Method[TangleConfig]):
    """Gradient-based architecture search where all candidates are slices of one set of weights."""

    card: ClassVar = Card(
        title="Weight-Entanglement Meets Gradient-Based Neural Architecture Search",
        authors=("Rhea Sanjay Sukthanker", "Arjun Krishnakumar", "Mahmoud Safari", "Frank Hutter"),
        venue="AutoML",
        year=2024,
        paper="arXiv:2312.10440",
        url="https://arxiv.org/abs/2312.10440",
        needs=("train_data",),
        formats=("subnet", "genotype"),
        composes_with=("quantization and pruning of the chosen network, in a run of their own", "train_* optimisers"),
        conflicts_with=("nas_*", "quant_*", "prune_*", "peft_*", "fl_*"),
        notes="optimizer=darts, drnas, gdas or spos; mixing=output is the classic baseline.",
    )
    claims: ClassVar = (
        Claim(
            id="digits_macro",
            statement=(
                "Mixing weights costs at most half of mixing outputs at 27 candidates and does not grow with their "
                "number; the chosen network is no worse than the mean of 20 random ones."
            ),
            run="eff_nas_tangle.claims:digits_macro",
            checks=(
                Check(left="time_entangled_over_output_27", right=0.5, relation="at_most"),
                Check(left="time_entangled_27_over_3", right=1.5, relation="at_most"),
                Check(left="memory_entangled_27_over_3", right=1.0, relation="at_most", margin=0.01),
                Check(left="largest_difference", right=0.0, relation="at_most", margin=1e-5),
                Check(left="better_than_random", right=0.8),
            ),
            paper=(
                "Abstract: better performance and any-time behaviour of gradient methods on entangled spaces at the same "
                "memory; no figure is quoted."
            ),
            unit="%",
            units={"3": "x", "27": "x", "difference": "", "better_than_random": ""},
            seeds=(0, 1, 2, 3, 4),
            minutes=5,
        ),
    )

    def __init__(self, config: TangleConfig | None = None):
        super().__init__(config)
        self.search: Search | None = None

    def training(self) -> TrainOptions:
        """Return the code's recipe for the weights."""
        config = self.config
        return TrainOptions(
            optimizer="adam", optimizer_options={"betas": [0.9, 0.995]}, lr=config.lr, weight_decay=config.wd,
            epochs=config.epochs, batch_size=config.batch_size, schedule="constant",
        )  # fmt: skip

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Find the space and make the supernet; where a checkpoint is rebuilt, the chosen network."""
        from eff_nas_tangle.insert import prepare

        model, self.search = prepare(model, self.config, self.structure, run)
        return model

    @hookimpl(wrapper=True)
    def train_step(self, step: Step) -> Generator[None, StepResult, StepResult]:
        """Do the architecture's step on validation data before the step of the weights."""
        from eff.run import StepResult

        assert self.search is not None  # made by transform where the run trains
        valid_loss = self.search.before_weights(step)
        result = yield
        metrics = {"entropy": Metric(value=self.search.architecture.entropy())}
        if valid_loss is not None:
            metrics["valid_loss"] = Metric(value=valid_loss)
        return StepResult(result.loss, {**result.metrics, **metrics})

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Replace the supernet by the chosen network of ordinary layers."""
        from eff_nas_tangle.insert import conclude

        return conclude(model, self.search, self.config, self.structure, run, GENOTYPE_FILE)

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data, run: Run) -> Metrics:
        """Report what was chosen among how many, how decided the search was, and its course."""
        from eff_nas_tangle.insert import report

        return report(model, self.structure)

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write the genotype as JSON, or the chosen network as a checkpoint that needs no search plugin."""
        if target.format not in self.card.formats:
            return None
        from eff.files import describe_artifact
        from eff_nas_tangle.insert import write_genotype, write_subnet

        writer = {"genotype": write_genotype, "subnet": write_subnet}[target.format]
        return describe_artifact(target.path, target.format, writer(model, self.structure, target.path, run))

    def state_dict(self) -> dict[str, Any]:
        """Return architecture parameters, their optimiser and the history."""
        return self.search.state_dict() if self.search is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        if self.search is not None and state:
            self.search.load_state_dict(state)
