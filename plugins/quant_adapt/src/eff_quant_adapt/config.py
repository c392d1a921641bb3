"""Options of quant_adapt. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from eff.method import Field, MethodConfig

LONGEST = 32
"""Largest word length, bits."""


class AdaPTConfig(MethodConfig):
    """Options of quant_adapt; the defaults are those of the reference code for ResNet on CIFAR-10 where it has one."""

    wl_init: int = Field(8, ge=2, le=LONGEST, description="Word length to start with, bits.")
    fl_init: int = Field(4, ge=0, le=LONGEST - 1, description="Fraction length to start with, bits.")
    fl_floor: int = Field(4, ge=0, le=LONGEST - 1, description="Shortest fraction that PushDown tries.")
    lb_min: int = Field(25, ge=1, description="Shortest lookback, gradients between two switches.")
    lb_max: int = Field(100, ge=1, description="Longest lookback.")
    res_min: int = Field(50, ge=2, description="Fewest histogram bins.")
    res_max: int = Field(150, ge=2, description="Most histogram bins.")
    strategy: Literal["min", "mean", "max", "adaptive"] = Field(
        "adaptive", description="Bits that PushUp adds; adaptive: from min upward while the loss does not fall."
    )
    buffer_bits: int = Field(8, ge=0, le=16, description="Bits of a word beyond its fraction at least.")
    gamma: float = Field(1.0, gt=0, le=1, description="Weight of the new lookback against the old.")
    log_shift: float = Field(
        1.0, ge=0, le=1, description="PushUp takes ln(diversity) less this; 0 as printed, 1 as coded."
    )
    kl_tol: float = Field(1e-6, ge=0, description="KL divergence, nats, up to which a format counts as lossless.")
    kl_rounding: Literal["nearest", "stochastic"] = Field(
        "nearest", description="Rounding inside PushDown; stochastic: the mean divergence of three draws."
    )
    quant_inputs: bool = Field(True, description="Quantize the inputs of layers.")
    quant_outputs: bool = Field(True, description="Quantize the outputs of layers.")
    quant_grads: bool = Field(True, description="Quantize the gradients of parameters.")
    normalize_grads: bool = Field(True, description="Divide each gradient by its norm before it is used.")
    push_up: bool = Field(True, description="Add bits after PushDown; false is an ablation.")
    adapt: bool = Field(True, description="Switch formats; false trains in the format of the start.")
    init: Literal["keep", "truncated"] = Field(
        "keep", description="truncated: draw the weights anew, from a normal cut at sqrt(3 gain / fan_in)."
    )
    gain: float = Field(0.5, gt=0, description="Gain of that normal: its variance is gain / fan_in.")
    l1: float = Field(1e-8, ge=0, description="Weight of sum |w| in the loss.")
    l2: float = Field(1e-4, ge=0, description="Weight decay, on the master copy.")
    bits_penalty: float = Field(
        0.0, ge=0, description="Weight of sum WL/32 density in the reported loss; has no gradient."
    )
    lr: float = Field(0.1, ge=0, description="Initial learning rate; gradients have norm 1.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    epochs: int = Field(30, ge=0, description="Training epochs; the reference code has 100.")

    @model_validator(mode="after")
    def _ranges_fit(self) -> AdaPTConfig:
        if self.fl_init >= self.wl_init:
            raise ValueError(f"fl_init must be below wl_init, got {self.fl_init} and {self.wl_init}")
        for low, high in (("lb_min", "lb_max"), ("res_min", "res_max")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} is {getattr(self, low)}, above {high}, which is {getattr(self, high)}")
        return self
