"""Options of quant_efficientdm. Imports no torch."""

from __future__ import annotations

from typing import Literal

from eff.method import Field, MethodConfig


class EfficientDMConfig(MethodConfig):
    """Options of quant_efficientdm; the defaults are the reference's."""

    bits_w: int = Field(4, ge=2, le=8, description="Bit width of the weights.")
    bits_a: int = Field(4, ge=2, le=8, description="Bit width of the layers' inputs.")
    rank: int = Field(32, ge=1, description="Rank of the adapters; cut to the layer's smaller side.")
    base: Literal["packed", "float"] = Field(
        "packed", description="Base weight: the calibrated integers, or as it came."
    )
    lora_lr_div: float = Field(
        2500.0, gt=0, description="Adapters' learning rate: mean weight scale of the layer over this."
    )
    scale_aware: bool = Field(True, description="A learning rate per layer; false: their mean for all.")
    lr_delta_w: float = Field(1e-6, gt=0, description="Learning rate of the weights' scales.")
    lr_act: float = Field(5e-4, gt=0, description="Learning rate of the activations' scales and zero points.")
    temporal: bool = Field(True, description="Activation scales and zero points per step; false: one for all.")
    steps: int = Field(100, ge=1, description="Steps of the sampler that calibrates and trains.")
    eta: float = Field(1.0, ge=0, description="Noise of the sampler: 0 DDIM, 1 DDPM.")
    guidance: float = Field(1.5, ge=0, description="Classifier-free guidance while training; 1: none.")
    epochs: int = Field(160, ge=0, description="Trajectories to train on.")
    batch: int = Field(2, ge=1, description="Samples per trajectory.")
    n_first8: int = Field(3, ge=0, description="First layers kept at 8 bits, without adapters.")
    n_last8: int = Field(1, ge=0, description="Last layers kept at 8 bits, without adapters.")
    calib_samples: int = Field(32, ge=1, description="Stored inputs that set the ranges.")
    weight_init: Literal["max", "mse"] = Field("max", description="Ranges of the weights: all, or of least error.")
    act_init: Literal["max", "mse"] = Field("mse", description="Ranges of the inputs: all, or of least error.")
    weight_decay: float = Field(0.01, ge=0, description="Of AdamW, on everything it trains.")
