"""Declares adv_pma to eff. Imports no torch; the hook imports what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff_adv_pma.config import PMAConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run
    from eff.schemas import Metrics

_NETS = ("plain", "at", "trades")
_EPS = ("0.1", "0.2")


class PMA(Method[PMAConfig]):
    """The probability margin attack: measures how much of a classifier's accuracy stands under attack."""

    card: ClassVar = Card(
        title="Towards Million-Scale Adversarial Robustness Evaluation With Stronger Individual Attacks",
        authors=("Yong Xie", "Weijie Zheng", "Hanxun Huang", "Guangnan Ye", "Xingjun Ma"),
        venue="CVPR",
        year=2025,
        paper="arXiv:2411.15210",
        url="https://arxiv.org/abs/2411.15210",
        needs=("test_data",),
        composes_with=(
            "all methods for classifiers: name it last, and it measures before and after",
            "quantized models (gradients are straight-through: the report says so)",
        ),
        notes="Leaves the model as it is. Randomised models need eot above 1; the report says where it looks so.",
    )
    claims: ClassVar = (
        Claim(
            id="digits_budget",
            statement="At 100 gradients, PMA and MD are at least as strong as PGD on any one loss (within 0.5 points), and "
            "PMA+ comes within 0.3 points of a mini AutoAttack at half of its gradients.",
            run="eff_adv_pma.claims:digits_budget",
            checks=(
                *(
                    Check(left=f"{net}_{ours}_{eps}", right=f"{net}_best_pgd_{eps}", margin=0.5, relation="at_most")
                    for net in _NETS
                    for eps in _EPS
                    for ours in ("pma", "md")
                ),
                Check(left="at_pma_0.2", right="at_pgd_margin_0.2", margin=-2.0, relation="at_most"),
                *(
                    Check(left=f"{net}_{one}_{eps}", right=f"{net}_{two}_{eps}", margin=0.5, relation="at_most")
                    for net in _NETS
                    for eps in _EPS
                    for one, two in (("pma", "md"), ("md", "pma"))
                ),
                *(
                    Check(left=f"at_pma_plus_{eps}", right=f"at_mini_aa_{eps}", margin=0.3, relation="at_most")
                    for eps in _EPS
                ),
                Check(left="gradients_share", right=50.0, relation="at_most"),
                Check(left="masked_pgd_ce_0.1", right="masked_pgd_margin_0.1", margin=10.0),
            ),  # fmt: skip
            paper="PMA beats the best earlier individual attacks (abstract); no figure per model was verified.",
            unit="% robust accuracy",
            units={"gradients_share": "% of the gradients"},
            seeds=(0, 1, 2),
            minutes=5,
        ),
    )
    sample: ClassVar = Sample(
        model="eff.testing.samples:tiny_cnn",
        data="eff.testing.samples:blobs",
        options={"preset": "aa_style", "steps": 4, "queries": 10, "eps": 0.02, "checks": 8, "examples": 4},
    )

    def check(self, model: nn.Module, run: Run) -> None:
        """Refuse models with too few classes for the attacks asked for."""
        from eff_adv_pma.robustness import check

        check(self.config, run)

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data, run: Run) -> Metrics:
        """Report clean and robust accuracy after each attack, with interval, cost and signs of masked gradients."""
        from eff_adv_pma.robustness import measure_robustness

        return measure_robustness(model, data, run, self.config)
