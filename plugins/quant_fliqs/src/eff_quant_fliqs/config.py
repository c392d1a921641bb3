"""Options of quant_fliqs. Imports no torch."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import model_validator

from eff.method import Field, MethodConfig

FORMAT = re.compile(r"int([2-8])|e([1-5])m([0-6])")


class FLIQSConfig(MethodConfig):
    """Options of quant_fliqs; the defaults are the reference variant's where it has one."""

    formats: tuple[str, ...] = Field(
        ("int4", "int8"), description="Choices: int2 to int8, and eXmY such as e2m1 or e4m3."
    )
    granularity: Literal["layer", "block", "single"] = Field("layer", description="What shares a decision.")
    block_patterns: tuple[str, ...] = Field(
        (), description="With block: regular expressions, each layer fits exactly one."
    )
    weight_only: bool = Field(False, description="Leave the inputs in float.")
    per_channel: bool = Field(True, description="A scale per output channel of the weights.")
    per_token: bool = Field(False, description="A scale per token (last dimension) of the inputs instead of one.")
    clip: float | Literal["mse"] = Field(1.0, description="Share of the largest magnitude; mse: the best of 0.1 to 1.")
    symmetric: bool = Field(False, description="Drop the integer code -2^(b-1), which breaks symmetry by one.")
    reward: Literal["abs", "abs_one_sided", "soft_exp", "hard_exp"] = Field(
        "abs", description="How quality (minus the batch's loss) and cost become one number."
    )
    beta: float = Field(1.0, gt=0, description="Weight, or exponent, of the cost.")
    target_cost: float = Field(0.3, gt=0, description="Cost to reach, relative to 8 bits everywhere.")
    cost_type: Literal["compute", "memory"] = Field(
        "compute", description="Multiply-adds times squared bits, or bytes."
    )
    delay_frac: float = Field(
        0.25, ge=0, lt=1, description="Share of the steps with formats at random before the policy learns."
    )
    entropy_max: float = Field(0.1, ge=0, description="Largest weight of the entropy's penalty.")
    entropy_schedule: Literal["linear", "cosine", "constant", "step"] = Field("cosine", description="How it rises.")
    policy_lr: float = Field(5e-2, gt=0, description="Learning rate of the policy's Adam.")
    temperature: float = Field(1.0, gt=0, description="T of the softmax.")
    ema: float = Field(0.99, ge=0, lt=1, description="Decay of the reward's running mean.")
    skip: tuple[str, ...] | None = Field(
        None, description="Layers fixed at int8; unset: the first and the last to run."
    )
    bn_samples: int = Field(1024, ge=0, description="Training samples that batch norms are estimated on at the end.")

    @model_validator(mode="after")
    def _fits(self) -> FLIQSConfig:
        for name in self.formats:
            found = FORMAT.fullmatch(name)
            if not found or (found[2] and not 3 <= 1 + int(found[2]) + int(found[3]) <= 8):
                raise ValueError(
                    f"formats: '{name}' is none; write int2 to int8, or eXmY of 3 to 8 bits such as e2m1 or e4m3"
                )
        if not self.formats or len(set(self.formats)) != len(self.formats):
            raise ValueError(f"formats must name different formats, got {list(self.formats)}")
        if self.clip != "mse" and not 0 < self.clip <= 1:
            raise ValueError(f"clip must be above 0 and at most 1, got {self.clip:g}")
        if (self.granularity == "block") != bool(self.block_patterns):
            raise ValueError("granularity=block and block_patterns belong together")
        return self
