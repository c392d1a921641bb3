"""Options that all federated methods have. Imports no torch."""

from __future__ import annotations

from typing import Literal

from eff.method import Field, MethodConfig


class FederatedConfig(MethodConfig):
    """Clients, their data, their sampling and their local training."""

    rounds: int = Field(100, ge=0, description="Communication rounds; a round is one training step.")
    n_clients: int = Field(100, ge=1, description="Clients the training data are divided among.")
    active_ratio: float = Field(0.1, gt=0, le=1, description="Share of the clients that take part in a round.")
    sampling: Literal["independent", "fixed"] = Field(
        "independent", description="Draw each client with that probability, or exactly that share of them."
    )
    partition: Literal["dirichlet", "shards", "iid"] = Field(
        "dirichlet", description="Division of the data: class shares from a Dirichlet law, shards by label, or random."
    )
    dirichlet: float = Field(0.6, ge=1e-3, description="Concentration; small values give clients few classes.")
    shards: int = Field(2, ge=1, description="Shards per client where partition=shards.")
    local_epochs: int = Field(5, ge=1, description="Passes of a client over its data in one round.")
    batch_size: int = Field(50, ge=1, description="Samples of a local step; the last batch may be smaller.")
    lr: float = Field(0.1, gt=0, description="Learning rate of the local steps in the first round.")
    lr_decay: float = Field(0.998, gt=0, le=1, description="Factor on the learning rate per round.")
    weight_decay: float = Field(1e-3, ge=0, description="Weight decay of the local steps, on all trained parameters.")
    max_norm: float = Field(10.0, ge=0, description="Largest norm of a local gradient with its correction; 0 is off.")
    eval_every: int = Field(0, ge=0, description="Rounds between measurements on the test data; 0: none on the way.")
