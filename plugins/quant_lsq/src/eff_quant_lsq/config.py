"""Options of quant_lsq. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from eff.method import Field, MethodConfig

# Weight decay by bits (paper, sec. 3): 1e-4 at 8 and 4 bits, half of it at 3, a quarter at 2.
PAPER_WEIGHT_DECAY = 1e-4
DECAY_SHARE = {2: 0.25, 3: 0.5}


class LSQConfig(MethodConfig):
    """Options of quant_lsq; the defaults are the paper's where it states one."""

    weight_bits: int | None = Field(4, ge=2, le=8, description="Bit width of the weights; null leaves them float.")
    act_bits: int | None = Field(4, ge=2, le=8, description="Bit width of the layers' inputs; null leaves them float.")
    first_last_bits: int | None = Field(
        8, ge=2, le=8, description="Bit width of the first and last layer; null leaves them float."
    )
    per_channel_weight: bool = Field(False, description="One step per output channel; the paper has one per layer.")
    act_signed: Literal["auto", "true", "false"] = Field(
        "auto", description="Range of the inputs; auto: signed where the first batch has negative values."
    )
    grad_scale: Literal["lsq", "sqrt_n", "none"] = Field(
        "lsq", description="Factor g on the step's gradient: 1/sqrt(N QP), 1/sqrt(N), or 1 (ablation)."
    )
    act_count: Literal["features", "numel"] = Field(
        "features", description="N of input steps: elements per sample, or of the whole batch."
    )
    offset: bool = Field(
        False, description="Learn an offset for the inputs (LSQ+); auto then takes the unsigned range."
    )
    offset_init: Literal["mse", "minmax"] = Field("mse", description="How scale and offset of LSQ+ inputs start.")
    init: Literal["lsq", "minmax"] = Field(
        "lsq",
        description="Initial steps: the paper's, made for training; or the whole range, better at 8 bits without.",
    )
    narrow_range: bool = Field(False, description="Symmetric signed range.")
    matmuls: bool = Field(False, description="Quantize both operands of attention's matrix products too.")
    distill: bool = Field(
        False, description="Add the cross entropy to the float model's outputs (temperature 1, equal weight)."
    )
    lr: float = Field(0.01, ge=0, description="Initial learning rate (paper: 0.01 at 2 to 4 bits, 0.001 at 8).")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    wd: float | None = Field(None, ge=0, description="Weight decay; unset: 1e-4, half of it at 3 bits, a quarter at 2.")
    epochs: int = Field(8, ge=0, description="Training epochs; the paper has 90 on ImageNet, 1 at 8 bits.")
    init_batch: int = Field(256, ge=1, description="Samples of the batch that initialises the input steps.")
    bn_samples: int = Field(
        0,
        ge=0,
        description="Training samples from which batch norm's statistics are taken afresh at the end; worth it after few "
        "epochs or none. 0 keeps them.",
    )
    exclude: tuple[str, ...] = Field((), description="Names of layers left in float.")

    @model_validator(mode="after")
    def _something_is_quantized(self) -> LSQConfig:
        if self.weight_bits is None and self.act_bits is None and self.first_last_bits is None:
            raise ValueError("weight_bits, act_bits and first_last_bits are all null; nothing would be quantized")
        return self

    @property
    def weight_decay(self) -> float:
        """The weight decay that applies."""
        if self.wd is not None:
            return self.wd
        return PAPER_WEIGHT_DECAY * DECAY_SHARE.get(self.weight_bits or 8, 1.0)
