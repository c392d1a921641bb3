"""Options of train_adamp. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import JsonValue, model_validator

from eff.method import Field, MethodConfig

ADAMP_LR = 1e-3
_Beta = Annotated[float, Field(ge=0, lt=1)]
# Options that only one of the two optimizers has.
_OWN = {"adamp": ("betas",), "sgdp": ("momentum", "dampening")}


class AdamPConfig(MethodConfig):
    """Options of train_adamp; the defaults are those of the paper's code."""

    optimizer: Literal["adamp", "sgdp"] = Field("adamp", description="Which of the two optimizers.")
    lr: float | None = Field(None, gt=0, description="Learning rate; unset: 0.001 for adamp, sgdp needs one.")
    betas: tuple[_Beta, _Beta] = Field((0.9, 0.999), description="Decay of the two moments (adamp).")
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum (sgdp).")
    dampening: float = Field(0.0, ge=0, le=1, description="Share of the gradient kept out of the momentum (sgdp).")
    eps: float = Field(1e-8, gt=0, description="Guards divisions by norms and, in adamp, by the second moment.")
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled weight decay; sgdp divides it by (1 - momentum), as coupled decay would act."
    )
    delta: float = Field(0.1, gt=0, description="A cosine below delta / sqrt(n) counts as scale invariance.")
    wd_ratio: float = Field(0.1, ge=0, le=1, description="Share of the weight decay that scale-invariant weights get.")
    nesterov: bool = Field(False, description="Nesterov momentum.")
    track: bool = Field(True, description="Follow norms and effective steps per layer for the report.")

    @model_validator(mode="after")
    def _options_belong_to_the_optimizer(self) -> AdamPConfig:
        if self.optimizer == "sgdp" and self.lr is None:
            raise ValueError("sgdp has no default learning rate; set lr, e.g. -o lr=0.05")
        other = "sgdp" if self.optimizer == "adamp" else "adamp"
        for name in _OWN[other]:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is an option of {other}; leave it out, or use -o optimizer={other}")
        return self

    def constructor_options(self) -> dict[str, JsonValue]:
        """Return what the optimizer's constructor takes beside lr, weight decay and momentum."""
        own: dict[str, JsonValue] = (
            {"betas": list(self.betas)} if self.optimizer == "adamp" else {"dampening": self.dampening}
        )
        shared: dict[str, JsonValue] = {
            "eps": self.eps,
            "delta": self.delta,
            "wd_ratio": self.wd_ratio,
            "nesterov": self.nesterov,
        }
        return own | shared
