"""Declares adv_pma to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff_adv_pma.config import PMAConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run
    from eff.schemas import Metrics


class PMAttack(Method[PMAConfig]):
    """Measures the robust accuracy of a classifier with the probability margin attack and its ensembles."""

    card: ClassVar = Card(
        title="Towards Million-Scale Adversarial Robustness Evaluation With Stronger Individual Attacks",
        authors=("Yong Xie", "Weijie Zheng", "Hanxun Huang", "Guangnan Ye", "Xingjun Ma"),
        venue="CVPR",
        year=2025,
        paper="arXiv:2411.15210",
        url="https://arxiv.org/abs/2411.15210",
        needs=("test_data",),
        composes_with=(
            "robust training",
            "quantized and pruned models (straight-through gradients)",
            "federated training",
        ),
        notes="Changes nothing. The exact list of the paper's second ensemble is not known; aa_style is AutoAttack's with PMA first.",
    )
    sample: ClassVar = Sample(
        model="eff.testing.samples:tiny_cnn",
        data="eff.testing.samples:blobs",
        options={"steps": 4, "samples": 32, "eps": 0.05},
    )
    claims: ClassVar = (
        Claim(
            id="digits_budget",
            statement=(
                "With 100 gradients the decomposed attacks (PMA, MD) leave no more robust accuracy than any PGD on a single "
                "loss, and PMA+ comes within 0.3 points of APGD-CE + APGD-T at less than half of the gradients."
            ),
            run="eff_adv_pma.claims:digits_budget",
            checks=(
                Check(left="at_pma_0.1", right="at_best_pgd_0.1", relation="at_most", margin=0.5),
                Check(left="at_pma_0.2", right="at_best_pgd_0.2", relation="at_most", margin=0.5),
                Check(left="at_md_0.1", right="at_best_pgd_0.1", relation="at_most", margin=0.5),
                Check(left="at_md_0.2", right="at_best_pgd_0.2", relation="at_most", margin=0.5),
                Check(left="at_pma_0.2", right="at_pgd_margin_0.2", relation="at_most", margin=-2.0),
                Check(left="at_pma_minus_md_0.2", right=0.0, relation="at_most", margin=0.5),
                Check(left="at_pma_minus_md_0.2", right=0.0, margin=-0.5),
                Check(left="at_pma_plus_0.2", right="at_pma_0.2", relation="at_most"),
                Check(left="at_pma_plus_0.2", right="at_mini_aa_0.2", relation="at_most", margin=0.3),
                Check(left="at_pma_plus_gradients_0.2", right=0.5, relation="at_most"),
                Check(left="masked_pgd_ce_0.1", right="masked_best_0.1", margin=5.0),
            ),
            paper="PMA finds lower robust accuracy than every earlier individual attack (abstract; CIFAR and ImageNet models).",
            unit="% robust",
            units={"at_pma_plus_gradients_0.2": "x mini-AA", "at_pma_minus_md_0.2": "points"},
            seeds=(0, 1, 2),
            minutes=4,
        ),
    )

    def check(self, model: nn.Module, run: Run) -> None:
        """Refuse models with too few classes for the attacks asked for."""
        from eff_adv_pma.measure import check

        check(self.config, run)

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data, run: Run) -> Metrics:
        """Attack the test split; report robust accuracy after each attack, and signs of hidden gradients."""
        from eff_adv_pma.measure import measure_robustness

        return measure_robustness(model, data, self.config, run)
