"""Options of fl_fedspeed. Imports no torch."""

from __future__ import annotations

from typing import Literal

from eff.method import Field
from eff_fl_kit.config import FederatedConfig


class FedSpeedConfig(FederatedConfig):
    """Options of fl_fedspeed; the defaults are those of the reference code, except the number of rounds."""

    lamb: float = Field(0.1, gt=0, description="Strength of the proximal term, 1/lambda of the paper.")
    rho: float = Field(0.1, ge=0, description="Radius of the ascent step; 0 takes the plain gradient.")
    alpha: float = Field(
        1.0, ge=0, le=1, description="Share of the ascent point's gradient; the rest is the plain one."
    )
    server_rule: Literal["code", "paper"] = Field(
        "code", description="Add the mean offset of all clients (reference code) or each participant's own (paper)."
    )
    relaxed_init: bool = Field(False, description="Clients start ahead, away from their last model.")
    beta: float = Field(0.1, ge=0, lt=1, description="How far ahead, where relaxed_init=true.")
    keep_clients: bool = Field(False, description="Write the clients' offsets h_i to clients.safetensors.")
