"""Options of quant_dfp. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from eff.method import Field, MethodConfig


class DFPConfig(MethodConfig):
    """Options of quant_dfp; the defaults are the paper's 16 bits in all three products."""

    bits: int = Field(16, ge=4, le=16, description="P, bits of an operand; below 16 for ablations.")
    pre_shift: int = Field(
        0, ge=0, le=6, description="r, bits of head-room in each operand; each one makes the safe chain 4 times longer."
    )
    chain: int | Literal["auto"] = Field(
        "auto", description="Products per 32-bit accumulation; auto: as many as cannot overflow."
    )
    overflow: Literal["guaranteed", "checked", "saturate", "wrap"] = Field(
        "guaranteed",
        description="guaranteed: chains that cannot overflow; checked: longer ones, an overflow stops the run; "
        "saturate and wrap: what such hardware would do.",
    )
    rounding: Literal["nearest", "truncate", "stochastic"] = Field("nearest", description="Rounding to integers.")
    forward: bool = Field(True, description="Integers in the forward product.")
    backward_data: bool = Field(True, description="Integers in the product for the gradient of the input.")
    backward_weight: bool = Field(True, description="Integers in the product for the gradient of the weight.")
    exempt: tuple[str, ...] = Field((), description="Layers left in float32, by name or pattern (*).")
    seed: int = Field(0, description="Seed of stochastic rounding.")

    @model_validator(mode="after")
    def _bits_and_chain_fit(self) -> DFPConfig:
        if self.bits - self.pre_shift < 2:
            raise ValueError(f"bits={self.bits} less pre_shift={self.pre_shift} leaves no magnitude; keep at least 2")
        longest = self.guaranteed_chain
        if self.chain == "auto":
            return self
        if self.chain < 1:
            raise ValueError(f"chain must be at least 1, got {self.chain}")
        if self.overflow == "guaranteed" and self.chain > longest:
            raise ValueError(
                f"chain is {self.chain}, at most {longest} products are safe with bits={self.bits} and "
                f"pre_shift={self.pre_shift}; use a shorter chain, a larger pre_shift or overflow=checked"
            )
        return self

    @property
    def largest(self) -> int:
        """The largest magnitude of an operand: 2^(P - 1 - r) - 1."""
        return int(2 ** (self.bits - 1 - self.pre_shift)) - 1

    @property
    def guaranteed_chain(self) -> int:
        """How many products of the largest operands fit 32 bits: floor((2^31 - 1) / largest^2), even above 1."""
        count = (2**31 - 1) // self.largest**2
        return count - count % 2 if count > 1 else count

    @property
    def products(self) -> int:
        """Products per 32-bit accumulation; lanes pair two products, so an odd chain loses one."""
        if self.chain == "auto":
            return self.guaranteed_chain
        return self.chain - self.chain % 2 if self.chain > 1 else 1
