"""Options of quant_gradptq: the axes that the paper compares, each on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from eff.method import MethodConfig

BASE = {"loss": "mse", "dof": ("rounding",), "variable": "sigmoid", "span": 1, "augment": "none", "select": "all"}
"""Plain AdaRound."""


class GradPTQConfig(MethodConfig):
    """Defaults: AdaRound's as in BRECQ's code; loss and degrees of freedom are choices that the paper calls decisive."""

    preset: Literal["best", "base"] = Field("best", description="base: plain AdaRound, where an option is not given.")
    bits: int = Field(4, ge=2, le=8, description="Bits of the weights; their mean where `mixed` is on.")
    act_bits: int | None = Field(None, ge=2, le=8, description="Bits of the inputs; unset: float.")
    symmetric: bool = Field(True, description="Signed levels around 0; false: a zero point per channel.")
    unit: Literal["layer", "block"] = Field("layer", description="What is reconstructed at a time.")
    loss: Literal["mse", "relu_mse", "l1", "lp", "cosine", "kl", "fisher_diag", "head_mse"] = Field(
        "relu_mse", description="Distance of a unit's outputs; head_mse adds that of the network's outputs."
    )
    dof: tuple[Literal["rounding", "bias", "scale", "norm"], ...] = Field(
        ("rounding", "bias"), min_length=1, description="What is learned."
    )
    variable: Literal["sigmoid", "offset"] = Field(
        "sigmoid", description="AdaRound's stretched sigmoid, or an offset that is rounded straight through."
    )
    span: int = Field(1, ge=1, le=2, description="Steps that a weight may move to either side.")
    optimizer: Literal["adam", "adamax", "sgd", "rmsprop"] = Field("adam", description="sgd has momentum 0.9.")
    lr: float = Field(1e-3, gt=0, description="Rate of the rounding variable.")
    lr_other: float = Field(1e-3, gt=0, description="Rate of biases, log scales and norms.")
    iters: int = Field(20000, ge=1, description="Steps per unit; 250 to 1000 do on small models.")
    batch: int = Field(32, ge=1, description="Rows per step.")
    lam: float = Field(0.01, ge=0, description="Weight of the term that drives the variable to 0 or 1.")
    beta_start: float = Field(20.0, gt=0, description="Its exponent after the warm-up.")
    beta_end: float = Field(2.0, gt=0, description="Its exponent at the end.")
    warmup: float = Field(0.2, ge=0, lt=1, description="Share of the steps without it.")
    asymmetric_input: bool = Field(
        True, description="Inputs from the network quantized so far; false: from the float one."
    )
    search_p: float = Field(2.4, gt=0, description="Exponent of the error that chooses scales.")
    grid: Literal["uniform", "power"] = Field("uniform", description="power: levels sign(k) |s k|^(1/a).")
    power: float | None = Field(None, gt=0, le=1, description="a of the power grid; unset: searched per layer.")
    select: Literal["all", "random", "near_half"] = Field(
        "all", description="Which weights are learned; the others are rounded to nearest."
    )
    select_frac: float = Field(1.0, gt=0, le=1, description="Share of the weights that `select` takes.")
    augment: Literal["none", "mixup", "noise", "qdrop"] = Field(
        "none", description="What is done to the recorded inputs."
    )
    calibration: Literal["data", "noise"] = Field(
        "data", description="noise: uniform noise with the mean and spread of each channel of the data."
    )
    mixed: Literal["off", "channel", "layer"] = Field("off", description="Bits by importance, mean `bits` per weight.")
    candidates: tuple[int, ...] = Field((2, 3, 4, 8), min_length=2, description="Bits to choose among, 2 to 8.")
    sensitivity: Path | None = Field(
        None, description="With mixed=layer: file of eff sensitivity whose Fisher stands for importance times error."
    )
    act_iters: int = Field(5000, ge=1, description="Steps per unit that learn the inputs' scales.")
    act_lr: float = Field(4e-4, gt=0, description="Adam's rate for them, cosine to 0.")
    calib_size: int = Field(1024, ge=16, description="Training samples to calibrate on.")
    exclude: tuple[str, ...] = Field((), description="Names of layers left in float.")

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "base":
            return {**BASE, **values}
        return values

    @model_validator(mode="after")
    def _options_fit(self) -> GradPTQConfig:
        if "rounding" not in self.dof:
            raise ValueError("dof must hold 'rounding'; that is the method")
        if self.grid == "power" and not self.symmetric:
            raise ValueError("grid=power is symmetric; leave symmetric=true")
        if any(not 2 <= item <= 8 for item in self.candidates):
            raise ValueError(f"candidates must be between 2 and 8, got {list(self.candidates)}")
        if self.sensitivity is not None and self.mixed != "layer":
            raise ValueError(f"sensitivity is by layer; it needs mixed=layer, got mixed={self.mixed}")
        if self.mixed != "off" and not min(self.candidates) <= self.bits <= max(self.candidates):
            low, high = min(self.candidates), max(self.candidates)
            raise ValueError(
                f"a mean of {self.bits} bits is out of reach of the candidates; {low} to {high} can be had"
            )
        return self
