"""Options of peft_paca. Imports no torch."""

from __future__ import annotations

from typing import Literal

from eff.method import Field, MethodConfig


class PaCAConfig(MethodConfig):
    """Options of peft_paca; the defaults are those of the reference code."""

    r: int = Field(8, ge=1, description="Trained input columns per layer, at most its input features.")
    alpha: float = Field(8.0, gt=0, description="The trained columns are alpha / r times the parameter p.")
    targets: str | tuple[str, ...] = Field(
        "all-linear",
        description="Layers to adapt: all-linear (all but the output layer), or patterns such as query, *.fc1.",
    )
    selection: Literal["random", "weight_norm", "weight_norm_small", "grad_norm"] = Field(
        "random", description="Which columns: random, largest or smallest norm, largest gradient norm."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the random columns; each layer has its own stream.")
    warmup_batches: int = Field(4, ge=1, description="Batches whose gradient norms are added for grad_norm.")
    train_bias: Literal["none", "paca_only", "all"] = Field(
        "none", description="Biases to train: none, those of the adapted layers, or all."
    )
    train_head: bool = Field(True, description="Train the output layer whole, as a new task needs it.")
    quantize_base: Literal["none", "nf4", "int8"] = Field(
        "none", description="Keep the frozen columns of the adapted layers in 4 or 8 bits (QPaCA)."
    )
    rank_pattern: dict[str, int] = Field({}, description="r for layers that fit a pattern.")
    alpha_pattern: dict[str, float] = Field({}, description="alpha for layers that fit a pattern.")
    write_back: Literal["after_step", "reference"] = Field(
        "after_step", description="When p goes into the weight: after each step, or as the released code does."
    )
    merge: bool | None = Field(
        None, description="End with plain layers; unset: yes, but not into a quantized base, which would round p."
    )
    delta: Literal["columns", "difference"] = Field(
        "columns", description="What model.delta holds; only differences can be taken out of a model again."
    )
