"""Options of quant_quest. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from eff.method import Field, MethodConfig


class QuESTConfig(MethodConfig):
    """Options of quant_quest; the defaults are the reference's."""

    weight_bits: int = Field(4, ge=2, le=8, description="Bit width of the weights.")
    act_bits: int = Field(4, ge=2, le=8, description="Bit width of the layers' inputs.")
    first_last_act_bits: int = Field(8, ge=2, le=8, description="Bit width of the inputs of first and last layer.")
    softmax_bits: int = Field(8, ge=4, le=16, description="Bit width of attention's probabilities.")
    calib_steps: int | tuple[int, ...] = Field(20, description="Calibrated timesteps: how many, or which.")
    calib_samples: int = Field(64, ge=8, description="Samples per timestep.")
    time_aware: bool = Field(True, description="A set of activation scales per timestep; false: one for all.")
    time_layers: tuple[str, ...] | Literal["auto"] = Field(
        "auto", description="Time-embedding projections (globs); auto: linear layers that the image does not reach."
    )
    sensitive_layers: tuple[str, ...] | Literal["auto"] = Field(
        "auto", description="Layers that stage 2 finetunes (globs); auto: by the rise of the output error."
    )
    sensitive_budget: float = Field(0.2, ge=0, le=1, description="Share of the layers' weights that auto may take.")
    act_granularity: Literal["auto", "tensor", "channel"] = Field("auto", description="auto: channel below 8 bits.")
    act_init: Literal["quantile", "minmax"] = Field("quantile", description="Where activation ranges come from.")
    running_stats: bool = Field(
        False, description="minmax only: momentum 0.95 over batches of 8 instead of the extremes."
    )
    finetune: bool = Field(True, description="Run both stages; false: calibration alone.")
    time_epochs: int = Field(300, ge=0, description="Stage 1: passes over all timesteps, 4 batches of 2 each.")
    main_epochs: int = Field(20, ge=0, description="Stage 2: passes over all timesteps and samples, batches of 4.")
    global_weight: float | None = Field(
        None, ge=0, description="Weight of the output's error in stage 1; unset: number of time layers."
    )
    main_local: bool = Field(False, description="Stage 2: add the sensitive layers' own output errors.")
    shuffle_timesteps: bool = Field(False, description="Another order of the timesteps in every epoch.")
    lr_time_w: float = Field(1e-5, ge=0, description="Stage 1, weights (Adam).")
    lr_time_a: float = Field(1e-5, ge=0, description="Stage 1, activation scales.")
    lr_w: float = Field(1e-5, ge=0, description="Stage 2, weights.")
    lr_a: float = Field(
        1e-4, ge=0, description="Stage 2, activation scales; the optimiser starts anew at every timestep."
    )
    weight_recon: bool = Field(False, description="Learn the rounding layer by layer (AdaRound) before finetuning.")
    recon_iters: int = Field(20000, ge=1, description="Iterations per layer of weight_recon.")
    guidance: float = Field(1.0, ge=0, description="Classifier-free guidance of the recorded path; 1: none.")

    @field_validator("calib_steps")
    @classmethod
    def _some_timesteps(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if value == () or (isinstance(value, int) and value < 1):
            raise ValueError("no timestep would be calibrated")
        return value
