"""Options of quant_gaqat. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from eff.method import Field, MethodConfig


class GAQATConfig(MethodConfig):
    """Options of quant_gaqat; window and tau are ours, the paper's could not be read."""

    weight_bits: int = Field(4, ge=2, le=8, description="Bit width of the weights.")
    act_bits: int = Field(4, ge=2, le=8, description="Bit width of the layers' inputs.")
    first_last_bits: int | None = Field(8, ge=2, le=8, description="Bits of the first and last layer; null: float.")
    flat_optimizer: Literal["sagm", "sam", "none"] = Field(
        "sagm", description="How flat minima are sought; sam takes the second gradient alone, none is LSQ."
    )
    rho: float = Field(0.05, gt=0, description="Radius of the perturbation.")
    alpha: float = Field(
        0.001, ge=0, description="SAGM's look-ahead: the perturbation is shortened by alpha times the gradient."
    )
    window: int = Field(50, ge=4, description="K, steps between two decisions.")
    tau: float = Field(0.3, ge=0, description="A scale's task gradient is frozen where its disorder is below.")
    freeze_policy: Literal["dynamic", "never", "always_after_first", "freeze_smooth", "random"] = Field(
        "dynamic", description="The paper's is dynamic; the others are ablations."
    )
    perturb_scales: bool = Field(True, description="Perturb the scales too.")
    renormalise: bool = Field(
        False, description="A frozen scale takes the whole smooth gradient instead of half of it."
    )
    lr: float = Field(5e-5, ge=0, description="Learning rate of Adam (DomainBed's range).")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of the weights.")
    epochs: int = Field(20, ge=0, description="Training epochs; DomainBed takes 5000 steps on PACS.")
    init_batch: int = Field(256, ge=1, description="Samples of the batch that initialises the input steps.")
    exclude: tuple[str, ...] = Field((), description="Names of layers left in float.")

    # What eff_quant_kit.learned_steps asks for beyond the options: LSQ as published.
    per_channel_weight: ClassVar[bool] = False
    act_signed: ClassVar[str] = "auto"
    grad_scale: ClassVar[str] = "lsq"
    act_count: ClassVar[str] = "features"
    offset: ClassVar[bool] = False
    offset_init: ClassVar[str] = "mse"
    init: ClassVar[str] = "lsq"
    narrow_range: ClassVar[bool] = False
    matmuls: ClassVar[bool] = False
