"""What eff reports of a classifier under attack: accuracy after each stage, its interval, cost, signs of masking."""

from __future__ import annotations

import numpy as np
from torch import nn

from eff.data import Data
from eff.run import Run
from eff.schemas import Metric, Metrics, TableRow
from eff_adv_kit.checks import Finding, find_signs
from eff_adv_kit.classifier import attacked
from eff_adv_kit.files import check_parquet, write_examples, write_records
from eff_adv_kit.interval import wilson
from eff_adv_kit.runner import Array, Outcome, Plan, Stage, run_sequence
from eff_adv_kit.threat import Threat
from eff_adv_pma.config import PMAConfig
from eff_adv_pma.sequence import make_sequence


def check(config: PMAConfig, run: Run) -> None:
    """Refuse what cannot be attacked or kept, before anything is written.

    Raises:
        UnsupportedModelError: too few classes for a loss.
        MissingDependencyError: Parquet is asked for without pyarrow.
    """
    make_sequence(config, len(run.task.options.classes))
    if config.records == "parquet":
        check_parquet()


def measure_robustness(model: nn.Module, data: Data, run: Run, config: PMAConfig) -> Metrics:
    """Attack the test split, report it, and leave records in the run folder.

    Raises:
        DataError, UnsupportedModelError: the images, labels or classes do not fit an attack.
    """
    classes = run.task.options.classes
    plan = Plan(
        Threat(config.norm, config.radius), make_sequence(config, len(classes)), config.batch_size, config.seed,
        config.examples if run.keeps_files else 0, config.labels == "prediction",
    )  # fmt: skip
    split = data.split("test")
    _say_straight_through(run)
    with attacked(model, run, config.eot, config.eight_bit) as classifier:
        outcome = run_sequence(classifier, split, plan, run.device, run.log)
        signs = find_signs(classifier, split, plan, _chosen(outcome, config.checks), run.device)
    for stage in (outcome.clean, *outcome.stages):
        run.log.info(in_words(stage))
    for sign in signs:
        if sign.flagged:
            run.warn(f"adv_pma: {sign.name} is {sign.value:.3g} {sign.unit}".rstrip() + f"; {sign.advice}")
    if run.keeps_files:
        keep_files(outcome, classes, run, config)
    return report(outcome, signs, config)


def in_words(stage: Stage) -> str:
    """Return one line of progress for people."""
    low, high = stage.interval
    return (
        f"{stage.name}: {stage.robust_accuracy:.2f} % of {stage.samples} stand (95 %: {low:.1f} to {high:.1f}), "
        f"{stage.gradients} gradients, {stage.seconds:.1f} s"
    )


def _say_straight_through(run: Run) -> None:
    quantized = [item.name for item in run.applied() if item.name.startswith("quant_")]
    if quantized:
        run.warn(
            f"adv_pma: the attacks see the straight-through gradients of {', '.join(quantized)}, not those of its "
            "rounding; the robust accuracy is an upper bound, compare with sequence=pma,square"
        )


def _chosen(outcome: Outcome, count: int) -> Array:
    """Return `count` rightly classified samples, evenly spaced."""
    right = np.flatnonzero(outcome.records.clean_ok)
    return right[np.unique(np.linspace(0, len(right) - 1, min(count, len(right))).round().astype(int))]


def report(outcome: Outcome, signs: list[Finding], config: PMAConfig) -> Metrics:
    """Return the figures and tables."""
    last = outcome.last
    low, high = last.interval
    values = {"clean_accuracy": _accuracy(outcome.clean.robust_accuracy)}
    if len(outcome.stages) > 1:
        values |= {f"robust_after_{stage.name}": _accuracy(stage.robust_accuracy) for stage in outcome.stages}
    values |= {
        "robust_accuracy": _accuracy(last.robust_accuracy),
        "robust_accuracy_low": _accuracy(low),
        "robust_accuracy_high": _accuracy(high),
        "gradients_per_sample": Metric(value=sum(stage.gradients for stage in outcome.stages) / last.samples),
        "attack_time": Metric(value=sum(stage.seconds for stage in outcome.stages), unit="s", better="lower"),
    }
    if signs:
        flagged = sum(sign.flagged for sign in signs)
        values["signs_of_masked_gradients"] = Metric(value=flagged, better="lower")
    tables = {
        "attacks": [_attack_row(stage) for stage in (outcome.clean, *outcome.stages)],
        "signs": [_sign_row(sign) for sign in signs],
        "subsets": subset_rows(outcome.records.robust, config.seed),
    }
    return Metrics(values=values, tables={name: rows for name, rows in tables.items() if rows})


def _accuracy(value: float) -> Metric:
    return Metric(value=value, unit="%", better="higher")


def _attack_row(stage: Stage) -> TableRow:
    low, high = stage.interval
    return {
        "attack": stage.name, "tried": stage.attacked, "broken": stage.broken, "accuracy": stage.robust_accuracy,
        "low": low, "high": high, "gradients": stage.gradients, "passes": stage.forwards, "s": stage.seconds,
    }  # fmt: skip


def _sign_row(sign: Finding) -> TableRow:
    return {
        "sign": sign.name, "value": sign.value, "limit": sign.limit, "unit": sign.unit,
        "flagged": "yes" if sign.flagged else "no",
    }  # fmt: skip


def subset_rows(robust: Array, seed: int) -> list[TableRow]:
    """Return the robust accuracy of nested random subsets of 100, 1000, ... samples: what a small test would say."""
    order = np.random.default_rng(seed).permutation(len(robust))
    rows: list[TableRow] = []
    size = 100
    while size < len(robust):
        standing = int(robust[order[:size]].sum())
        low, high = wilson(standing, size)
        rows.append({"samples": size, "robust": 100 * standing / size, "low": 100 * low, "high": 100 * high})
        size *= 10
    return rows


def keep_files(outcome: Outcome, classes: tuple[str, ...], run: Run, config: PMAConfig) -> None:
    """Write the records and the adversarial images that are asked for."""
    threat = {"norm": config.norm, "eps": config.radius}
    if config.records != "none":
        with run.output(f"robustness.{config.records}", config.records, **threat) as path:
            write_records(outcome, path, config.records)
    if outcome.examples.index:
        with run.output("adversarial.npz", "npz", **threat, images=len(outcome.examples.index)) as path:
            write_examples(outcome, path, classes)
    elif config.examples:
        run.log.info("adv_pma: no adversarial image was found, so adversarial.npz is not written")
