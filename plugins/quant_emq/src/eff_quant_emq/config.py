"""Options of quant_emq. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from eff.method import Field, MethodConfig


class EMQConfig(MethodConfig):
    """Options of quant_emq; the defaults are those of the authors' sibling code where it has one."""

    structure: Literal["tree", "linear", "graph"] = Field("tree", description="Shape of the expressions.")
    population: int = Field(50, ge=10, description="Expressions kept.")
    iterations: int = Field(1000, ge=0, description="Children bred.")
    tournament: float = Field(0.5, gt=0, le=1, description="Share of the population that parents are drawn from.")
    p_cross: float = Field(0.5, ge=0, le=1, description="Probability of crossover; otherwise a parent is copied.")
    p_mut: float = Field(
        0.5, ge=0, le=1, description="Probability that each gene of a child is redrawn, if it is mutated."
    )
    topk: tuple[float, ...] = Field(
        (1.0, 0.5, 0.2), description="Shares of the best configurations for rank correlations."
    )
    bits: tuple[int, ...] = Field((2, 3, 4), description="Widths of a layer.")
    bench_size: int = Field(100, ge=20, description="Configurations in the table.")
    exhaustive: int = Field(1000, ge=0, description="Take all configurations where there are at most this many.")
    bench_samples: int = Field(512, ge=1, description="Samples that each configuration is measured on.")
    batch_size: int = Field(64, ge=1, description="Samples for activations and gradients.")
    use_hessian: bool = Field(False, description="Offer Hessian traces as inputs.")
    align_gradients: bool = Field(
        True, description="Pair each gradient with its own layer; false: in the released order."
    )
    screening: bool = Field(True, description="Reject broken and known expressions before their full evaluation.")
    diversity: bool = Field(
        True, description="Mate the best of a tournament with a random one instead of the second best."
    )
    prioritised: bool = Field(True, description="Draw operators with the published probabilities instead of evenly.")
    budget: float = Field(0.5, gt=0, le=1, description="Bytes of the weights over those of 8 bits everywhere.")
    preset: Literal["none", "released", "snip", "synflow", "hawq_trace", "plain", "fisher"] = Field(
        "none",
        description="A known proxy instead of a search; released: the authors' expression, as far as its ids are known.",
    )

    @model_validator(mode="after")
    def _fits(self) -> EMQConfig:
        if len(set(self.bits)) < 2 or any(not 2 <= item <= 8 for item in self.bits):
            raise ValueError(f"bits must name at least two widths of 2 to 8, got {list(self.bits)}")
        if not self.topk or any(not 0 < share <= 1 for share in self.topk):
            raise ValueError(f"topk must hold shares above 0 and at most 1, got {list(self.topk)}")
        return self
