"""Options of adv_pma. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from eff.method import Field, MethodConfig

AttackName = Literal[
    "pma",
    "pgd_ce",
    "pgd_margin",
    "pgd_dlr",
    "pgd_mifpe",
    "pgd_pm",
    "apgd_ce",
    "apgd_dlr",
    "apgd_t",
    "fab_t",
    "square",
    "noise",
]
PRESETS: dict[str, tuple[AttackName, ...]] = {
    "pma": ("pma",),
    "pma_plus": ("pma", "apgd_t"),
    "aa_style": ("pma", "apgd_t", "fab_t", "square"),
}


class PMAConfig(MethodConfig):
    """Options of adv_pma; the defaults are the paper's code's."""

    preset: Literal["pma", "pma_plus", "aa_style", "custom"] = Field(
        "pma",
        description="The attack alone, with APGD-T on the survivors (PMA+), or as AutoAttack does with PMA first.",
    )
    sequence: tuple[AttackName, ...] = Field(
        (), description="Attacks in order, each on the survivors of those before; for preset=custom."
    )
    norm: Literal["linf", "l2"] = Field("linf", description="Norm of the threat model.")
    eps: float = Field(8 / 255, gt=0, description="Radius of the threat model, for images in [0, 1].")
    steps: int = Field(100, ge=2, description="Steps of each run of PMA, and of every gradient attack.")
    restarts: int = Field(1, ge=1, description="Restarts of PMA, two runs each, and of PGD.")
    loss: Literal["pm", "margin", "ce", "dlr", "mifpe"] = Field(
        "pm", description="What PMA raises; margin with schedule=decomposed is the MD attack."
    )
    schedule: Literal["decomposed", "plain"] = Field(
        "decomposed", description="One term, then the margin, with falling moves; or plain PGD on the loss."
    )
    odi: bool = Field(False, description="The first two moves are eps long (ODI) instead of up to 2 eps.")
    n_targets: int = Field(9, ge=1, description="Target classes of APGD-T and FAB-T; at most all others are taken.")
    target_loss: Literal["dlr", "margin", "pm", "ce"] = Field("dlr", description="Loss of APGD-T; dlr needs 4 classes.")
    queries: int = Field(5000, ge=1, description="Queries of Square.")
    batch_size: int = Field(256, ge=1, description="Images attacked together; does not change the result.")
    clamp_start: bool = Field(True, description="Cut random starts to [0, 1]; the paper's code does not.")
    eot: int = Field(1, ge=1, description="Passes averaged per gradient, for randomised models.")
    eight_bit: bool = Field(False, description="Show the model images rounded to 256 levels.")
    samples: int | None = Field(None, ge=1, description="Attack the first so many test samples; unset: all.")
    signs: bool = Field(True, description="Look for hidden gradients on 100 samples, and warn.")
    records: Literal["npz", "parquet"] = Field("npz", description="Format of the record per sample.")
    keep: int = Field(0, ge=0, description="Adversarial images to write, as a data set for --data.")
    seed: int = Field(0, ge=0, description="Seed of the attacks' random numbers.")

    @model_validator(mode="after")
    def _options_agree(self) -> PMAConfig:
        if (self.preset == "custom") != bool(self.sequence):
            raise ValueError("sequence belongs to preset=custom: give both, or neither")
        if self.schedule == "decomposed" and self.loss not in ("pm", "margin"):
            raise ValueError(
                f"loss={self.loss} has no two terms to decompose; use schedule=plain, or loss pm or margin"
            )
        return self

    @property
    def attacks(self) -> tuple[AttackName, ...]:
        """The attacks in order."""
        return self.sequence or PRESETS[self.preset]
