"""Options of quant_adaquant."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from eff.method import MethodConfig


class AdaQuantConfig(MethodConfig):
    """Names and defaults are the reference code's where it has them."""

    bits: tuple[int, ...] = Field((8, 4), min_length=1, description="Candidates, 2 to 8; the first is the base.")
    act_bits: int | None = Field(
        None, ge=2, le=8, description="Bits of the inputs; unset: the weights' of the same layer."
    )
    pipeline: Literal["advanced", "light"] = Field(
        "advanced", description="advanced: all four stages. light: bits and norm tuning only, no gradient."
    )
    mode: Literal["sequential", "parallel"] = Field(
        "sequential", description="Inputs of a layer from the network quantized so far, or from the float network."
    )
    optimise: Literal["all", "qparams"] = Field(
        "all", description="all: weights, bias, ranges by Adam. qparams: ranges only, by Nelder-Mead (ablation)."
    )
    iters: int = Field(1000, ge=1, description="Steps per layer and candidate.")
    batch: int = Field(50, ge=1, description="Rows per step, drawn from the recorded ones.")
    lr_w: float = Field(1e-5, gt=0, description="Adam's rate of the weights.")
    lr_b: float = Field(1e-3, gt=0, description="Adam's rate of the biases.")
    lr_qw: float = Field(1e-3, gt=0, description="Adam's rate of the weights' ranges and zeros.")
    lr_qx: float = Field(1e-1, gt=0, description="Adam's rate of the inputs' ranges and zeros, in the inputs' unit.")
    relative_lr: bool = Field(False, description="Multiply lr_qx by the range that was measured.")
    relu_loss: bool = Field(True, description="Compare outputs after the ReLU that follows a layer.")
    target_ratio: float = Field(
        0.13, gt=0, le=0.25, description="Size of the quantized weights against float32; 0.25 is all 8 bit."
    )
    ip_metric: Literal["loss", "acc", "mse"] = Field(
        "loss", description="What fewer bits cost: calibration loss, accuracy (both need labels) or output error."
    )
    sensitivity: str | None = Field(
        None, description="File of eff sensitivity whose output error stands for what fewer bits cost; unset: measured."
    )
    norm_tuning: bool = Field(
        True, description="Put folded batch norms back, take their statistics afresh, fold again."
    )
    bias_tuning: bool = Field(True, description="Train the biases by distillation at the end.")
    bias_epochs: int = Field(10, ge=1, description="Epochs of 20 x 3 batches of bias tuning.")
    bias_lr: float = Field(0.1, gt=0, description="SGD's rate of bias tuning; a tenth of it from epoch 10.")
    keep_first_last: bool = Field(False, description="First and last layer at 8 bits.")
    calib_size: int = Field(1000, ge=8, description="Training samples to calibrate on.")
    exclude: tuple[str, ...] = Field((), description="Names of layers left in float.")

    @field_validator("bits")
    @classmethod
    def _bits_are_candidates(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 2 <= item <= 8 for item in bits) or len(set(bits)) != len(bits):
            raise ValueError(f"bits must be different numbers from 2 to 8, got {list(bits)}")
        return bits

    @model_validator(mode="after")
    def _base_is_largest(self) -> AdaQuantConfig:
        if max(self.bits) != self.bits[0]:
            raise ValueError(f"the first of bits is the base and must be the largest, got {list(self.bits)}")
        return self

    @property
    def optimises(self) -> bool:
        """Whether layers are optimised."""
        return self.pipeline == "advanced"

    @property
    def tunes_biases(self) -> bool:
        """Whether there is a last stage of bias tuning."""
        return self.pipeline == "advanced" and self.bias_tuning

    @property
    def steps_per_layer(self) -> int:
        """Train steps per layer and candidate; Nelder-Mead is one."""
        return self.iters if self.optimise == "all" else 1
