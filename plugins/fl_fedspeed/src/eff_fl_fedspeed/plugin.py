"""Declares fl_fedspeed to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from eff.method import Card, Check, Claim, Sample, hookimpl
from eff.schemas import Metric, Metrics, TrainOptions
from eff_fl_fedspeed.config import FedSpeedConfig
from eff_fl_kit.method import FederatedMethod

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run
    from eff_fl_kit.protocol import Client, Server, Update

PROBE_RADIUS = 0.1
"""Radius of the sharpness probe: the default rho, whatever a run uses, so that runs compare."""


class FedSpeed(FederatedMethod[FedSpeedConfig]):
    """FedSpeed: proximal local training without its bias, at an ascent point."""

    card: ClassVar = Card(
        title="FedSpeed: Larger Local Interval, Less Communication Round, and Higher Generalization Accuracy",
        authors=("Yan Sun", "Li Shen", "Tiansheng Huang", "Liang Ding", "Dacheng Tao"),
        venue="ICLR",
        year=2023,
        paper="arXiv:2302.10429",
        url="https://arxiv.org/abs/2302.10429",
        tasks=("any",),
        needs=("train_data",),
        composes_with=("losses that other methods replace", "adapters: only trained parameters are sent"),
        notes="A round is a step; runs in process, or on Flower with eff flower-app.",
    )
    sample: ClassVar = Sample(
        model="eff.testing.samples:tiny_cnn",
        data="eff.testing.samples:blobs",
        options={"n_clients": 4, "active_ratio": 0.5, "local_epochs": 1, "batch_size": 16},
        train=TrainOptions(epochs=3),
    )
    claims: ClassVar = (
        Claim(
            id="digits_dirichlet",
            statement=(
                "With long local training on unlike clients FedSpeed beats FedAvg and FedProx, at less than half of "
                "FedAvg's training loss, and its ascent gradient does not hurt."
            ),
            run="eff_fl_fedspeed.claims:digits_dirichlet",
            checks=(
                Check(left="fedspeed", right="fedavg", margin=1.5),
                Check(left="fedspeed", right="fedprox", margin=1.5),
                Check(left="loss_ratio", right=0.5, relation="at_most"),
                Check(left="fedspeed", right="fedspeed_rho0"),
            ),
            paper=(
                "CIFAR-10, ResNet-18-GN, 100 clients, 10 % active: better than its baselines; the reference code's "
                "README gives 87.31 / 86.33 / 85.39 / 82.26 % from iid to heterogeneous clients."
            ),
            unit="% accuracy",
            units={"ratio": ""},
            seeds=(0, 1, 2, 3, 4),
            minutes=3,
        ),
    )

    @hookimpl
    def fl_client_update(self, client: Client) -> Update:
        """Do the corrected steps at the ascent point and update h_i."""
        from eff_fl_fedspeed.client import update_client

        return update_client(client, self.config)

    @hookimpl
    def fl_aggregate(self, server: Server, updates: list[Update]) -> bool:
        """Average and add the mean offset."""
        from eff_fl_fedspeed.client import aggregate

        aggregate(server, updates, self.config)
        return True

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data, run: Run) -> Metrics:
        """Report training loss, sharpness and the rounds; write the offsets where they are asked for."""
        from eff_fl_kit.diagnostics import diagnose, sharpness

        found = diagnose(self, model, run)
        if not found.values or not any(parameter.requires_grad for parameter in model.parameters()):
            return found
        if self.config.keep_clients and run.keeps_files and self.client_states:
            from eff_fl_fedspeed.export import write_offsets

            write_offsets(self.client_states, run)
        probe = Metric(value=sharpness(model, run, PROBE_RADIUS), better="lower")
        return found.model_copy(update={"values": {**found.values, "sharpness": probe}})
