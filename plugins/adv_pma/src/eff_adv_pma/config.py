"""Options of adv_pma. Imports no torch."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, model_validator

from eff.method import Field, MethodConfig

AttackName = Literal[
    "pma", "md", "pgd_ce", "pgd_margin", "pgd_dlr", "pgd_mifpe", "pgd_pm", "apgd_ce", "apgd_margin", "apgd_dlr",
    "apgd_t", "fab_t", "square", "noise",
]  # fmt: skip
PRESETS: dict[str, tuple[AttackName, ...]] = {
    "pma": ("pma",),
    "pma_plus": ("pma", "apgd_t"),
    "aa_style": ("pma", "apgd_t", "fab_t", "square"),
}
DEFAULT_EPS = {"linf": 8 / 255, "l2": 0.5}


def _fraction(value: Any) -> Any:
    """Read "8/255" as the number that it is."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            return value
    return value


class PMAConfig(MethodConfig):
    """Options of adv_pma; the defaults are the paper's where it states one."""

    preset: Literal["pma", "pma_plus", "aa_style", "custom"] = Field(
        "pma", description="PMA alone; then APGD-T on its survivors; then FAB-T and Square too; or `sequence`."
    )
    sequence: tuple[AttackName, ...] = Field(
        (), description=f"Attacks in their order, for preset=custom: {', '.join(get_args(AttackName))}."
    )
    norm: Literal["linf", "l2"] = Field("linf", description="Norm of the perturbation; the paper has linf.")
    eps: Annotated[float | None, BeforeValidator(_fraction)] = Field(
        None,
        gt=0,
        description="Radius for images in [0, 1], e.g. 8/255; unset: 8/255 for linf, 0.5 for l2. ImageNet: 4/255.",
    )
    steps: int = Field(100, ge=2, description="Gradients per start (PMA has two starts) and, for APGD-T, per target.")
    restarts: int = Field(1, ge=1, description="Random starts; for PMA pairs of them.")
    loss: Literal["pm", "margin", "ce", "dlr", "mifpe"] = Field(
        "pm",
        description="What the attack `pma` raises: the probability margin or another loss (margin: the MD attack).",
    )
    schedule: Literal["decomposed", "plain"] = Field(
        "decomposed", description="One term of the margin alone, then the margin; or the whole loss at every step."
    )
    odi: bool = Field(False, description="Let the first two moves of each start have size eps.")
    n_targets: int = Field(9, ge=1, description="Target classes of APGD-T and FAB-T; at most classes - 1 are used.")
    target_loss: Literal["dlr", "margin", "ce", "pm"] = Field("dlr", description="Loss of APGD-T; dlr needs 4 classes.")
    queries: int = Field(5000, ge=1, description="Forward passes per sample of Square.")
    eot: int = Field(1, ge=1, description="Passes whose gradients and logits are averaged, for randomised models.")
    eight_bit: bool = Field(False, description="Round the attacked images to 256 levels before the model sees them.")
    clamp_start: bool = Field(True, description="Cut random starts to [0, 1]; the reference code does not.")
    labels: Literal["data", "prediction"] = Field(
        "data", description="What must not change: the data's label, or the model's own prediction (unlabelled images)."
    )
    checks: int = Field(64, ge=0, description="Samples on which signs of masked gradients are looked for; 0: none.")
    batch_size: int = Field(256, ge=1, description="Images attacked at a time; the result does not depend on it.")
    seed: int = Field(0, ge=0, description="Seed of the random starts.")
    records: Literal["npz", "parquet", "none"] = Field(
        "npz", description="One record per sample in the run folder: robustness.npz or .parquet."
    )
    examples: int = Field(
        0, ge=0, description="Adversarial images to keep, in adversarial.npz, which eff reads as data."
    )

    @model_validator(mode="after")
    def _options_fit_together(self) -> PMAConfig:
        if self.preset == "custom" and not self.sequence:
            raise ValueError("preset=custom needs a sequence, e.g. sequence=pma,apgd_t,square")
        if self.sequence and self.preset != "custom":
            raise ValueError(f"sequence is for preset=custom, preset is {self.preset}; add preset=custom")
        if len(set(self.sequence)) != len(self.sequence):
            raise ValueError(
                f"sequence names an attack twice: {', '.join(self.sequence)}; use restarts for more starts"
            )
        if self.schedule == "decomposed" and self.loss not in ("pm", "margin"):
            raise ValueError(f"only pm and margin have two terms to decompose; loss={self.loss} needs schedule=plain")
        if self.norm == "linf" and self.eps is not None and self.eps > 1:
            raise ValueError(
                f"eps is for images in [0, 1], got {self.eps:g}; for {self.eps:g} of 255 write {self.eps:g}/255"
            )
        return self

    @property
    def radius(self) -> float:
        """The radius that applies."""
        return DEFAULT_EPS[self.norm] if self.eps is None else self.eps

    @property
    def attacks(self) -> tuple[AttackName, ...]:
        """The attacks in their order."""
        return self.sequence or PRESETS[self.preset]
