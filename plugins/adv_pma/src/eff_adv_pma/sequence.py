"""From options to the attacks that are run."""

from __future__ import annotations

from eff_adv_kit.apgd import APGD, TargetedAPGD
from eff_adv_kit.classifier import check_classes
from eff_adv_kit.fab import TargetedFAB
from eff_adv_kit.hunt import Attack
from eff_adv_kit.pgd import PGD, Noise
from eff_adv_kit.square import Square
from eff_adv_pma.attack import MarginAttack
from eff_adv_pma.config import PMAConfig


def make_attack(name: str, config: PMAConfig) -> Attack:
    """Return the attack that `config.sequence` calls `name`."""
    kind, _, loss = name.partition("_")
    if name == "pma":
        return MarginAttack(
            config.loss, config.steps, config.restarts, config.schedule == "decomposed", config.odi, config.clamp_start
        )
    if name == "md":
        return MarginAttack(
            "margin", config.steps, config.restarts, odi=config.odi, clamp_start=config.clamp_start, name="md"
        )
    if name == "apgd_t":
        return TargetedAPGD(config.target_loss, config.steps, config.n_targets)
    if name == "fab_t":
        return TargetedFAB(config.steps, config.n_targets)
    if name == "square":
        return Square(config.queries)
    if name == "noise":
        return Noise()
    if kind == "apgd":
        return APGD(loss, config.steps, config.restarts)
    return PGD(loss, config.steps, config.restarts, clamp_start=config.clamp_start)


def make_sequence(config: PMAConfig, classes: int) -> list[Attack]:
    """Return the attacks for a model with this number of classes.

    Raises:
        UnsupportedModelError: too few classes for a loss.
    """
    losses = tuple(name.partition("_")[2] for name in config.attacks if name.startswith(("pgd_", "apgd_")))
    own = (config.loss,) if "pma" in config.attacks else ()
    check_classes(classes, losses + own, (config.target_loss,) if "apgd_t" in config.attacks else ())
    return [make_attack(name, config) for name in config.attacks]
