"""Options of quant_hawqv3. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from eff.method import Field, MethodConfig


class HAWQV3Config(MethodConfig):
    """Options of quant_hawqv3; the defaults are the paper's or its code's."""

    bits: Literal[4, 8, "mixed"] = Field(8, description="Bits of weights and their inputs; mixed: chosen per layer.")
    constraint: Literal["size", "bops", "latency"] = Field("size", description="With mixed: what the budget limits.")
    budget: float = Field(
        0.5, ge=0, le=1, description="With mixed: where between 4 bits everywhere (0) and 8 (1) the limit lies."
    )
    latency_table: Path | None = Field(None, description='JSON {"layer": {"4": ms, "8": ms}}, for constraint=latency.')
    residual_bits: int = Field(16, ge=8, le=32, description="Grid of sums, concatenations and pooled values.")
    clip_residual: bool = Field(False, description="Clip sums to that grid's range.")
    bias_bits: int = Field(32, ge=16, le=32, description="Integers of the biases.")
    act_momentum: float = Field(0.95, description="Of the running ranges, 0 to 1; -1: smallest and largest so far.")
    percentile_w: float = Field(0.0, description="Weights: percentile of a channel's magnitudes as range; 0: largest.")
    percentile_a: float = Field(0.0, description="Inputs: percentile of a batch as range; 0: smallest and largest.")
    rounding: Literal["half_up", "half_even"] = Field("half_up", description="Ties, in training and on integers.")
    trace_draws: int = Field(100, ge=1, description="Most draws of Hutchinson's estimate.")
    trace_tol: float = Field(1e-3, gt=0, description="Relative change of the running mean that ends it.")
    trace_samples: int = Field(256, ge=1, description="Training samples of the loss whose Hessian it is.")
    calibration_samples: int = Field(256, ge=1, description="Training samples that set the first ranges.")
    fix_bn: bool = Field(True, description="Train with batch norms folded; false: on each batch's own statistics.")
    distill: bool = Field(False, description="Learn from the float model too: 0.95 of the loss, temperature 6.")
    sensitivity: Path | None = Field(None, description="File of eff sensitivity whose hessian stands for Omega.")
    exclude: tuple[str, ...] = Field((), description="Layers kept at 8 bits besides the first and the last.")
    compare_samples: int = Field(32, ge=0, description="Test samples on which the integer runner is compared.")

    @model_validator(mode="after")
    def _fits(self) -> HAWQV3Config:
        if self.act_momentum != -1 and not 0 <= self.act_momentum <= 1:
            raise ValueError(f"act_momentum must be -1 or between 0 and 1, got {self.act_momentum:g}")
        for name in ("percentile_w", "percentile_a"):
            value = getattr(self, name)
            if value != 0 and not 90 <= value <= 100:
                raise ValueError(f"{name} must be 0 or between 90 and 100, got {value:g}")
        if self.bits == "mixed" and (self.constraint == "latency") != (self.latency_table is not None):
            raise ValueError("constraint=latency and latency_table belong together")
        return self
