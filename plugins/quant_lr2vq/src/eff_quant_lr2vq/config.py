"""Options of quant_lr2vq. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from eff.method import Field, MethodConfig


class LR2VQConfig(MethodConfig):
    """Options of quant_lr2vq; k, m, epochs and temperatures are chosen here, the paper's are not known."""

    k: int = Field(256, ge=2, le=4096, description="Codewords per layer; reduced to a quarter of the sub-vectors.")
    m: int = Field(
        8, ge=1, description="Length of a sub-vector: sets the compression; divides the outputs (or inputs)."
    )
    d_tilde: int | Literal["auto"] = Field(
        "auto", description="Dimension in which sub-vectors are clustered, 1 to m; m is plain DKM without a projection."
    )
    slack: float = Field(0.02, ge=0, lt=1, description="auto takes the smallest d_tilde within this share of the best.")
    estimator: Literal["waterfill", "empirical"] = Field(
        "waterfill",
        description="How auto predicts the clustering error: from the spectrum, or by k-means at each d_tilde.",
    )
    group_axis: Literal["out", "in"] = Field(
        "out", description="Sub-vectors along outputs (two cheap layers) or along inputs (the weight is rebuilt)."
    )
    assignment: Literal["auto", "soft", "hard"] = Field(
        "auto", description="Attention over codewords (DKM), or nearest codeword straight through; auto: by memory."
    )
    dkm_rounds: int = Field(5, ge=1, description="Most inner clustering rounds per forward pass.")
    dkm_eps: float = Field(1e-4, gt=0, description="Change of a codeword at which the rounds end.")
    tau_start: float = Field(
        0.5, gt=0, description="First temperature, times the mean distance to the nearest codeword."
    )
    tau_end: float = Field(0.02, gt=0, description="Last temperature, likewise; the path between is a cosine.")
    stage1_epochs: int = Field(10, ge=0, description="Epochs with low-rank weights, not yet clustered.")
    stage2_epochs: int = Field(10, ge=0, description="Epochs with clustered weights.")
    lr: float = Field(2e-3, gt=0, description="Learning rate of Adam; each stage decays it by a cosine.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of all but projections and codebooks.")
    kmeans_iterations: int = Field(100, ge=1, description="Rounds of the k-means that makes the first codebook.")
    skip: tuple[str, ...] | None = Field(
        None, description="Names of layers left in float; unset: the first and the last in order of execution."
    )
    min_params: int = Field(1024, ge=0, description="Layers with fewer weights stay in float.")

    @model_validator(mode="after")
    def _fits(self) -> LR2VQConfig:
        if self.d_tilde != "auto" and not 1 <= self.d_tilde <= self.m:
            raise ValueError(f"d_tilde must be between 1 and m = {self.m}, got {self.d_tilde}")
        if self.tau_end > self.tau_start:
            raise ValueError(f"tau_end must not be above tau_start = {self.tau_start:g}, got {self.tau_end:g}")
        return self
