"""Options of quant_biadapter. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from eff.method import Field, MethodConfig


class BiAdapterConfig(MethodConfig):
    """Options of quant_biadapter; the defaults are the reference code's."""

    bits: Literal[1, 2, 4, 8, 32] = Field(1, description="Bits of an adapter weight; 32: float adapters.")
    dim: int = Field(32, ge=1, description="h, width of the bottleneck.")
    placement: Literal["adaptformer", "lora"] = Field(
        "adaptformer", description="Beside the MLP, with ReLU; or beside the query and value projections, without."
    )
    scale: float = Field(
        1.0, gt=0, description="s, factor of the adapter's output; the paper tries 0.01 to 100 by tens."
    )
    binary_head: bool = Field(False, description="A head of 1-bit weights without bias instead of a float one.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout inside the adapters.")
    codebook: Literal["l1_normal", "l2_normal", "uniform", "sign"] = Field(
        "l1_normal",
        description="Values of standardised weights: of least absolute or squared error for a normal variable, evenly "
        "spaced, or (1 bit) sign(w) mean|w| without standardising.",
    )
    targets: tuple[str, ...] = Field((), description="Names or patterns of what gets an adapter; none: found by name.")
    head: str = Field("", description="Name of the head to train; empty: the last linear layer to run.")
    load: str | None = Field(None, description="File of an earlier run: put its adapters into this model.")
    noise_curve: bool = Field(
        False, description="Measure accuracy with Gaussian noise of 0.1 to 2 standard deviations on the adapters."
    )
    lr: float = Field(1e-3, ge=0, description="Learning rate of AdamW.")
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay.")
    epochs: int = Field(100, ge=0, description="Training epochs.")
    warmup: int = Field(10, ge=0, description="Epochs of them in which the learning rate rises.")

    @model_validator(mode="after")
    def _fits(self) -> BiAdapterConfig:
        if self.codebook == "sign" and self.bits != 1:
            raise ValueError(f"codebook=sign has 1 bit, bits is {self.bits}")
        if self.warmup > self.epochs > 0:
            raise ValueError(f"warmup is {self.warmup}, above epochs, which is {self.epochs}")
        return self
