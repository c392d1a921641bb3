"""Options of quant_vq4dit. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from eff.method import Field, MethodConfig


class VQ4DiTConfig(MethodConfig):
    """Options of quant_vq4dit; the defaults are the paper's 2-bit setting and the reference code's rates."""

    k: int = Field(
        256, ge=2, le=65536, description="Codewords per layer, a power of two; at most a quarter of its sub-vectors."
    )
    d: int = Field(4, ge=1, description="Length of a sub-vector; divides the inputs of every layer.")
    n_candidates: int = Field(2, ge=1, le=8, description="Nearest codewords that a sub-vector chooses among.")
    kmeans_iters: int = Field(100, ge=1, description="Rounds of k-means.")
    lr_ratio: float = Field(5e-2, gt=0, description="Rate of the ratios (RMSprop, alpha 0.9).")
    lr_codebook: float = Field(1e-4, gt=0, description="Rate of the codebooks.")
    lr_bias: float = Field(1e-4, gt=0, description="Rate of the biases.")
    freeze_row: float = Field(0.99, gt=0.5, lt=1, description="Ratio above which a sub-vector keeps its codeword.")
    freeze_layer: float = Field(
        0.99, gt=0, le=1, description="Share of such sub-vectors at which the whole layer is fixed."
    )
    ratio_loss: Literal["gated", "always"] = Field(
        "gated", description="L_r where it has not fallen (code), or always (paper)."
    )
    lambda_d: float = Field(1.0, ge=0, description="Weight of the blocks' error, with ratio_loss=always.")
    lambda_r: float = Field(1.0, ge=0, description="Weight of L_r, with ratio_loss=always.")
    codebook_schedule: Literal["joint", "after_freeze"] = Field(
        "joint", description="Codebooks learn from the start (paper), or once their layer is fixed (code)."
    )
    trajectories: int = Field(1000, ge=0, description="Sampler runs to calibrate on, from noise.")
    sampler_steps: int = Field(50, ge=1, description="Steps of a run, one update each.")
    labels_per_step: int = Field(4, ge=1, description="Samples of a run, of random classes.")
    cfg_scale: float = Field(4.0, ge=0, description="Classifier-free guidance while calibrating.")
    ignore: tuple[str, ...] | None = Field(
        None, description="Layers left in float, names or patterns (*); unset: all outside the blocks."
    )

    @model_validator(mode="after")
    def _power_of_two(self) -> VQ4DiTConfig:
        if self.k & (self.k - 1):
            raise ValueError(f"k must be a power of two, got {self.k}")
        if self.n_candidates > self.k:
            raise ValueError(f"n_candidates is {self.n_candidates}, more than the {self.k} codewords")
        return self
