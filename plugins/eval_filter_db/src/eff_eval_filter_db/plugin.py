"""Declares eval_filter_db to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff_eval_filter_db.config import FilterDBConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run
    from eff.schemas import Metrics
    from eff_eval_filter_db.layers import Layer


class FilterDB(Method[FilterDBConfig]):
    """CNN Filter DB: shapes, drift and degeneration of a network's 3x3 filters, from the weights alone."""

    card = Card(
        title="CNN Filter DB: An Empirical Investigation of Trained Convolutional Filters",
        authors=("Gavrikov", "Keuper"),
        venue="CVPR 2022",
        year=2022,
        paper="arXiv:2203.15331",
        url="https://arxiv.org/abs/2203.15331",
        tasks=("any",),
        composes_with=("pruning", "quantization", "adversarial training", "architecture search"),
        notes="Changes nothing and needs no data. Batch norm folded into the convolutions changes sparsity and "
        "variance entropy, which the run then says.",
    )
    sample = Sample(
        model="eff.testing.samples:tiny_cnn", options={"group_by": "layer", "min_filters": 32, "figures": False}
    )
    claims = (
        Claim(
            id="degeneration_digits",
            statement="Training structures 3x3 filters (lower variance entropy, drift from the untrained), "
            "and nets too wide for their data degenerate.",
            run="eff_eval_filter_db.claims:degeneration_digits",
            checks=(
                Check(left="untrained_entropy_minus_threshold", right=-0.03),
                Check(left="untrained_sparsity", right=0.001, relation="at_most"),
                Check(left="largest_entropy_change", right=0.0, relation="at_most"),
                Check(left="wide_degeneration", right=0.0, margin=0.001),
                Check(left="drift_between_settings", right="drift_between_seeds"),
                Check(left="drift_ratio_trained_untrained", right=1.5),
            ),
            paper="Many public models have degenerate filters; shift is larger where models are over-sized for "
            "their data (abstract, sec. 4, 5). Own digit networks here.",
            unit="nats",
            units={
                name: ""
                for name in (
                    "threshold",
                    "change",
                    "degeneration",
                    "sparsity",
                    "entropy",
                    "drift_ratio_trained_untrained",
                )
            },
            minutes=1.5,
        ),
        Claim(
            id="imagenet_basis",
            statement="The first component of ImageNet filters holds more variance than that of Gaussian ones.",
            run="eff_eval_filter_db.claims:imagenet_basis",
            checks=(
                Check(left="efficientnet_lite0", right="gaussian_upper_bound"),
                Check(left="gaussian", right="gaussian_upper_bound", relation="at_most"),
            ),
            paper="A few eigen-filters hold most of the variance (fig. 2). EfficientNet-Lite0's 3x3 filters here.",
            unit="%",
            minutes=0.1,
        ),
    )

    def __init__(self, config: FilterDBConfig | None = None):
        super().__init__(config)
        self._others: list[Layer] | None = None

    def check(self, model: nn.Module, run: Run) -> None:
        """Refuse a model without such filters, and others that cannot be read."""
        from eff_eval_filter_db.layers import layers_of_model

        layers_of_model(model, "", self.config.kernel)
        self._compared(run)

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data | None, run: Run) -> Metrics:
        """Return layer table, summary, PCA basis and drift; leave data and figures in the run folder."""
        from eff_eval_filter_db.analysis import analyse

        return analyse(model, self._compared(run), self.config, run)

    def _compared(self, run: Run) -> list[Layer]:
        """The layers of `others`, opened once."""
        from eff_eval_filter_db.sources import open_others

        if self._others is None:
            self._others = open_others(self.config, run)
        return self._others
