"""Options of restore_deanet. Imports no torch. Those of the network itself stand in its source, `deanet:base?...`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from eff.method import Field, MethodConfig


class DEANetConfig(MethodConfig):
    """Options of restore_deanet; the defaults are those of the paper or its published training script."""

    w_l1: float = Field(1.0, ge=0, description="Weight of the task's loss, the mean absolute error.")
    w_cr: float = Field(0.1, ge=0, description="Weight of the contrastive regularisation; needs `features`.")
    features: str | None = Field(
        None,
        description="Frozen features of CR: a file with VGG-19's weights, or 'random' (a variant); null: no CR.",
    )
    insert: Literal["auto", "always", "never"] = Field(
        "auto", description="Put DEConvs in place of 3x3 convolutions; auto: where the model has none yet."
    )
    insert_init: Literal["zero", "default"] = Field(
        "zero", description="How the difference branches of inserted DEConvs start; zero keeps the model's function."
    )
    branches: str = Field(
        "chva",
        pattern=r"^[chva]+$",
        description="Difference branches of inserted DEConvs: c(entral), h(orizontal), v(ertical), a(ngular).",
    )
    include: tuple[str, ...] = Field((), description="Names of the convolutions to replace; empty: all that can be.")
    exclude: tuple[str, ...] = Field((), description="Names of convolutions to leave.")
    fold: bool = Field(True, description="Fold every DEConv into one convolution when training is done.")
    lr: float = Field(1e-4, ge=0, description="Initial learning rate (the script's; its argument's default is 4e-4).")
    lr_min: float = Field(1e-6, ge=0, description="Learning rate at the end of the cosine.")
    epochs: int = Field(20, ge=0, description="Training epochs; the paper has 300 of 5000 batches.")
    batch: int = Field(16, ge=1, description="Images per batch.")

    @model_validator(mode="after")
    def _values_fit(self) -> DEANetConfig:
        if len(set(self.branches)) < len(self.branches):
            raise ValueError(f"branches names one twice: {self.branches}")
        if self.lr_min > self.lr:
            raise ValueError(f"lr_min ({self.lr_min:g}) is above lr ({self.lr:g})")
        if self.w_l1 == 0 and (self.w_cr == 0 or self.features is None):
            raise ValueError("w_l1 is 0 and there is no CR; nothing would be trained")
        return self
