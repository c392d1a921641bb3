"""Options of nas_tangle. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from eff.method import Field, MethodConfig
from eff_nas_kit.space import check_increasing, check_kernels


class TangleConfig(MethodConfig):
    """Options of nas_tangle; the defaults are those of the paper's code for the convolutional macro space."""

    optimizer: Literal["darts", "drnas", "gdas", "spos"] = Field(
        "drnas", description="How coefficients come from the architecture parameters; spos learns none."
    )
    mixing: Literal["entangled", "output"] = Field(
        "entangled", description="Mix the weights, or (the classic baseline) every candidate's output."
    )
    search: tuple[Literal["width", "kernel"], ...] = Field(
        ("width", "kernel"), min_length=1, description="What is searched besides depth_choices."
    )
    width_choices: tuple[float, ...] = Field(
        (0.25, 0.5, 1.0), min_length=1, description="Candidate widths as shares of each layer's width, increasing."
    )
    kernel_choices: tuple[int, ...] = Field(
        (), description="Candidate kernel sizes, odd, increasing; empty: 3 up to the layer's size (1 and 3 for 3)."
    )
    depth_choices: tuple[int, ...] = Field(
        (), description="Candidate numbers of blocks for rows of equal blocks, increasing; empty: depth stays."
    )
    include: tuple[str, ...] = Field(
        (), description="Layers whose width and kernel are searched; empty: those the model names, else all."
    )
    crop: Literal["center", "corner"] = Field(
        "center", description="Where small kernels are cut out; corner is the code's first version, for mixing=output."
    )
    train_portion: float = Field(
        0.5, gt=0, lt=1, description="Share of the training data for weights; rest: architecture."
    )
    lr: float = Field(3e-4, ge=0, description="Learning rate of the weights (Adam, betas 0.9 and 0.995).")
    wd: float = Field(5e-4, ge=0, description="Weight decay of the weights.")
    epochs: int = Field(100, ge=0, description="Search epochs.")
    batch_size: int = Field(64, ge=1, description="Batch size of both steps.")
    arch_lr: float = Field(3e-4, ge=0, description="Learning rate of the architecture (Adam, betas 0.5 and 0.999).")
    arch_wd: float = Field(1e-3, ge=0, description="Weight decay of the architecture for darts and gdas.")
    reg_type: Literal["l2", "kl"] = Field(
        "l2", description="drnas: pull to the uniform Dirichlet by weight decay on alpha (l2) or by divergence (kl)."
    )
    reg_scale: float = Field(1e-3, ge=0, description="Strength of drnas's pull; takes the place of arch_wd there.")
    tau_max: float = Field(10.0, gt=0, description="gdas: temperature in the first epoch.")
    tau_min: float = Field(0.1, gt=0, description="gdas: temperature in the last epoch; linear between.")
    size_weight: float = Field(
        0.0, ge=0, description="Weight of the expected share of parameters in the architecture's loss (paper: 0)."
    )
    search_samples: int = Field(
        100, ge=1, description="spos: random networks compared by inherited validation accuracy."
    )
    weights: Literal["inherited", "fresh"] = Field(
        "inherited", description="What the chosen network starts with: slices of the supernet, or new weights."
    )
    history_samples: int = Field(
        512, ge=0, description="Validation samples on which the current best network is measured each epoch; 0: off."
    )
    rank_samples: int = Field(
        0, ge=0, description="Random networks trained on their own after the search, to compare the supernet's ranking."
    )
    rank_epochs: int = Field(15, ge=1, description="Epochs of each of these trainings.")

    @field_validator("width_choices")
    @classmethod
    def _shares_increase(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        check_increasing("width", values)
        if values[-1] > 1:
            raise ValueError(f"width candidates are shares of the layer's width, at most 1, got {values[-1]:g}")
        return values

    @field_validator("kernel_choices")
    @classmethod
    def _kernels_are_odd(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        check_increasing("kernel", values)
        check_kernels(values)
        return values

    @field_validator("depth_choices")
    @classmethod
    def _depths_increase(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        check_increasing("depth", values)
        return values

    @model_validator(mode="after")
    def _options_agree(self) -> TangleConfig:
        if self.crop == "corner" and self.mixing == "entangled":
            raise ValueError(
                "crop=corner needs mixing=output: a corner with 'same' padding shifts the image, so mixed weights would "
                "not compute the sum of the candidates"
            )
        if self.tau_min > self.tau_max:
            raise ValueError(f"tau_min {self.tau_min:g} is above tau_max {self.tau_max:g}")
        return self
