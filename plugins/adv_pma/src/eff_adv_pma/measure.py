"""Robust accuracy of a model: the attacks of the options, what they found, and the files of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from eff.data import Data
from eff.errors import RequestError
from eff.run import Run
from eff.schemas import Metric, Metrics, TableRow
from eff_adv_kit.apgd import APGD, TargetedAPGD
from eff_adv_kit.classifier import attacked, check_classes
from eff_adv_kit.fab import TargetedFAB
from eff_adv_kit.files import check_parquet, write_examples, write_records
from eff_adv_kit.hunt import Attack
from eff_adv_kit.obfuscation import Part, Signs, look_for_signs
from eff_adv_kit.pgd import PGD, Noise
from eff_adv_kit.runner import Outcome, Plan, Stage, run_sequence
from eff_adv_kit.square import Square
from eff_adv_kit.threat import Threat
from eff_adv_pma.attack import PMA
from eff_adv_pma.config import PMAConfig


def make_attack(name: str, config: PMAConfig) -> Attack:
    """Return the attack that the options call `name`."""
    kind, _, loss = name.partition("_")
    if name == "pma":
        if config.schedule == "plain":
            return PGD(config.loss, config.steps, config.restarts, clamp_start=config.clamp_start)
        return PMA(config.loss, config.steps, config.restarts, config.odi, config.clamp_start)  # type: ignore[arg-type]
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


def check(config: PMAConfig, run: Run) -> None:
    """Refuse what cannot be attacked, before anything is written.

    Raises:
        UnsupportedModelError: too few classes. MissingDependencyError: Parquet without pyarrow.
        RequestError: the data has fewer samples than asked for.
    """
    classes = len(run.task.options.classes)
    names = config.attacks
    untargeted = tuple(name.partition("_")[2] for name in names if name in ("pgd_dlr", "apgd_dlr"))
    plain = (config.loss,) if "pma" in names and config.schedule == "plain" else ()
    check_classes(classes, (*untargeted, *plain), (config.target_loss,) if "apgd_t" in names else ())
    if config.records == "parquet":
        check_parquet()
    if config.samples is not None and run.data is not None and config.samples > len(run.split("test")):
        raise RequestError(
            f"adv_pma: samples={config.samples}, but data '{run.data.spec}' has {len(run.split('test'))} test samples; "
            "leave samples out to attack all of them"
        )


def measure_robustness(model: nn.Module, data: Data, config: PMAConfig, run: Run) -> Metrics:
    """Return robust accuracy after each attack; leave a record per sample in the run folder."""
    whole = data.split("test")
    split = whole if config.samples is None else Part(whole, range(config.samples))
    threat = Threat(config.norm, config.eps)
    plan = Plan(
        threat, [make_attack(name, config) for name in config.attacks], config.batch_size, config.seed,
        config.keep if run.keeps_files else 0,
    )  # fmt: skip
    _say_what_gradients_are(run)
    with attacked(model, run, config.eot, config.eight_bit) as classifier:
        outcome = run_sequence(classifier, split, plan, run.device, run.log)
        signs = look_for_signs(classifier, split, threat, run.device, run.log, config.seed) if config.signs else None
    if signs is not None and (found := signs.warnings()):
        run.warn("adv_pma: this robustness may be an illusion, gradients look hidden: " + "; ".join(found))
    if run.keeps_files:
        _write_files(outcome, config, run)
    return Metrics(values=_values(outcome, signs), tables={"attacks": _rows(outcome)})


def _say_what_gradients_are(run: Run) -> None:
    quantizers = [item.name for item in run.applied() if item.name.startswith("quant_")]
    if quantizers:
        run.log.info(f"adv_pma: gradients pass the rounding of {', '.join(quantizers)} straight through")


def _values(outcome: Outcome, signs: Signs | None) -> dict[str, Metric]:
    low, high = outcome.last.interval
    stages = outcome.stages
    values = {
        "clean_accuracy": Metric(value=outcome.clean.robust_accuracy, unit="%", better="higher"),
        "robust_accuracy": Metric(value=outcome.last.robust_accuracy, unit="%", better="higher"),
        "robust_accuracy_low": Metric(value=low, unit="%", better="higher"),
        "robust_accuracy_high": Metric(value=high, unit="%", better="higher"),
        "gradients_per_sample": Metric(value=sum(stage.gradients for stage in stages) / outcome.last.samples),
        "attack_time": Metric(value=sum(stage.seconds for stage in stages), unit="s"),
    }
    if signs is not None:
        values["gradients_look_hidden"] = Metric(value=float(len(signs.warnings())), better="lower")
    return values


def _rows(outcome: Outcome) -> list[TableRow]:
    return [_row(stage) for stage in (outcome.clean, *outcome.stages)]


def _row(stage: Stage) -> dict[str, Any]:
    low, high = stage.interval
    return {
        "attack": stage.name,
        "attacked": stage.attacked,
        "broken": stage.broken,
        "robust_accuracy": stage.robust_accuracy,
        "low": low,
        "high": high,
        "gradients": stage.gradients,
        "forwards": stage.forwards,
        "seconds": round(stage.seconds, 2),
    }


def _write_files(outcome: Outcome, config: PMAConfig, run: Run) -> None:
    with run.output(f"robustness.{config.records}", config.records, samples=outcome.last.samples) as path:
        write_records(outcome, path, config.records)
    if outcome.examples.images:
        with run.output("adversarial.npz", "npz", images=len(outcome.examples.images)) as path:
            write_examples(outcome, path, run.task.options.classes)
