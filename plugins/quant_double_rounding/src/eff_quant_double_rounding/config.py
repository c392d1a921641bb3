"""Options of quant_double_rounding. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from eff.method import Field, MethodConfig


class DoubleRoundingConfig(MethodConfig):
    """Options of quant_double_rounding; the defaults are the paper's where it states one."""

    bits: tuple[int, ...] = Field((8, 6, 4, 2), description="Widths to train, 2 to 8 each; the highest is stored.")
    act_bits: tuple[int, ...] | None = Field(
        None, description="Widths of the inputs, one for each of bits; unset: the same."
    )
    rounding: Literal["double", "floor", "floor_centred"] = Field(
        "double", description="The second rounding; floor (AdaBits) and floor to the middle of its bin are ablations."
    )
    alrs: Literal["literal", "ratio", "off"] = Field(
        "literal",
        description="Learning rate of the scales by width: eta (lr - mean gradient), not below 0; eta lr; or lr.",
    )
    accumulate: bool = Field(False, description="One update on the sum over the widths instead of one after each.")
    distill: Literal["none", "self", "teacher"] = Field(
        "none",
        description="Add for lower widths the cross entropy to the highest one's, or to the float model's, outputs.",
    )
    mixed: bool = Field(
        False, description="Train a supernet of widths by layer after the joint training, and search it."
    )
    mixed_share: float = Field(0.5, gt=0, lt=1, description="Share of the steps that the supernet gets.")
    hasb_sigma: float = Field(1.0, ge=0, le=1, description="Threshold of the Hessian-aware choice at the last step.")
    target_avg_bits: float = Field(3.0, ge=2, le=8, description="Mean width over the layers that the search looks for.")
    objective: Literal["hawq", "paper"] = Field(
        "hawq",
        description="Cost of a width: trace / n times the squared rounding error; or times the width, as printed.",
    )
    hessian_samples: int = Field(1000, ge=1, description="Training samples for the Hessian's traces.")
    sensitivity: Path | None = Field(
        None, description="With mixed: file of eff sensitivity whose Hessian traces are taken; unset: measured."
    )
    lr: float = Field(5e-4, gt=0, description="Learning rate of Adam.")
    weight_decay: float = Field(5e-5, ge=0, description="Weight decay of all but the scales.")
    epochs: int = Field(90, ge=0, description="Training epochs.")
    init_batch: int = Field(256, ge=1, description="Samples of the batch that initialises the inputs' scales.")
    exclude: tuple[str, ...] | None = Field(
        None, description="Layers left in float; unset: the first and the last to run."
    )

    @model_validator(mode="after")
    def _fits(self) -> DoubleRoundingConfig:
        if not self.bits or len(set(self.bits)) != len(self.bits):
            raise ValueError(f"bits must name different widths, got {list(self.bits)}")
        if any(not 2 <= item <= 8 for item in self.bits):
            raise ValueError(f"bits must be between 2 and 8, got {list(self.bits)}")
        if self.act_bits is not None and len(self.act_bits) != len(self.bits):
            raise ValueError(f"act_bits has {len(self.act_bits)} widths, bits has {len(self.bits)}")
        if self.act_bits is not None and any(not 2 <= item <= 8 for item in self.act_bits):
            raise ValueError(f"act_bits must be between 2 and 8, got {list(self.act_bits)}")
        if self.sensitivity is not None and not self.mixed:
            raise ValueError("sensitivity is for widths by layer; it needs mixed=true")
        if self.mixed and not min(self.bits) <= self.target_avg_bits <= max(self.bits):
            raise ValueError(
                f"target_avg_bits is {self.target_avg_bits:g}, outside the widths {min(self.bits)} to {max(self.bits)}"
            )
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths, highest first."""
        return tuple(sorted(self.bits, reverse=True))

    def inputs(self, width: int) -> int:
        """Return the width of the inputs that goes with a width of the weights."""
        return width if self.act_bits is None else self.act_bits[self.bits.index(width)]
