"""What a sweep found: figures of each trial, the Pareto front, and the files they are written to."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from eff.errors import RequestError, did_you_mean
from eff.files import write_text
from eff.schemas import Measurement, Metric, Schema
from eff.sweep.plan import Definition

SWEEP_FILE = "sweep.json"
CSV_FILE = "sweep.csv"
FIGURE_FILE = "pareto.png"
OF_EVERY_TRIAL = ("size", "parameters", "latency", "seconds")
"""Names that can be asked for besides the metrics."""


class TrialResult(Schema):
    """One trial and what came of it."""

    number: int
    setting: dict[str, JsonValue]
    folder: Path
    state: Literal["done", "failed", "waiting"] = "waiting"
    reason: str = ""
    measured: Measurement | None = None
    seconds: float | None = None
    on_front: bool = False

    def figure(self, name: str) -> Metric | None:
        """Return a metric, or size, parameters, latency, seconds; None where it was not measured."""
        if self.measured is None:
            return None
        if name == "seconds":
            return None if self.seconds is None else Metric(value=self.seconds, unit="s", better="lower")
        return figure_of(self.measured, name)


class SweepResult(Schema):
    """The whole search; `sweep.json`."""

    version: Literal[1] = 1
    definition: Definition
    metric: str | None = None
    cost: str
    before: Measurement | None = None
    trials: tuple[TrialResult, ...]

    def of_state(self, state: str) -> list[TrialResult]:
        """Return the trials in a state."""
        return [trial for trial in self.trials if trial.state == state]


def figure_of(measured: Measurement, name: str) -> Metric | None:
    """Return one figure of a measured model by the name a user gives it."""
    if name == "size":
        return Metric(value=measured.bytes, unit="B", better="lower")
    if name == "parameters":
        return Metric(value=measured.parameters, better="lower")
    if name == "latency":
        latency = measured.latency_ms
        return None if latency is None else Metric(value=latency, unit="ms", better="lower")
    return measured.metrics.values.get(name)


def name_metric(trials: Iterable[TrialResult], wanted: str | None) -> str | None:
    """Return the metric to judge by: the one asked for, else the first that was measured."""
    if wanted is not None:
        return wanted
    return next((name for trial in trials if trial.measured for name in trial.measured.metrics.values), None)


def check_measured(trials: Sequence[TrialResult], name: str, flag: str) -> None:
    """Refuse a figure that no finished trial has.

    Raises:
        RequestError: with the names there are.
    """
    done = [trial for trial in trials if trial.measured is not None]
    if not done or any(trial.figure(name) is not None for trial in done):
        return
    names = list(dict.fromkeys(key for trial in done if trial.measured for key in trial.measured.metrics.values))
    known = [*names, *OF_EVERY_TRIAL]
    raise RequestError(
        f"{flag} {name}: no trial measured it{did_you_mean(name, known)}; known: {', '.join(known)} "
        "(the same command with another name computes nothing again)"
    )


def with_front(trials: Sequence[TrialResult], metric: str | None, cost: str) -> tuple[TrialResult, ...]:
    """Return the trials with those on the Pareto front marked.

    A trial is on the front when no other is at least as good in both figures and better in one. Where
    a figure states no direction, more of the metric and less of the cost is better.
    """
    points: dict[int, tuple[float, float]] = {}
    for trial in trials:
        quality = trial.figure(metric) if metric is not None else None
        price = trial.figure(cost)
        if quality is not None and price is not None:
            points[trial.number] = (
                quality.value * (-1 if quality.better == "lower" else 1),
                price.value * (-1 if price.better == "higher" else 1),
            )
    front = pareto_front(points)
    return tuple(trial.model_copy(update={"on_front": trial.number in front}) for trial in trials)


def pareto_front(points: dict[int, tuple[float, float]]) -> set[int]:
    """Return the keys of the points (quality, cost) that no other dominates; of equal points all stay."""
    front: set[int] = set()
    best = float("-inf")
    finite = {key: point for key, point in points.items() if point[0] == point[0] and point[1] == point[1]}  # no NaN
    by_cost = sorted(finite, key=lambda key: (finite[key][1], -finite[key][0]))
    previous: tuple[float, float] | None = None
    for key in by_cost:
        if finite[key][0] > best or finite[key] == previous:
            front.add(key)
            best = finite[key][0]
            previous = finite[key]
    return front


def best_first(result: SweepResult) -> list[TrialResult]:
    """Return the trials for a table: by metric, then those without it in their order."""
    name = result.metric

    def key(trial: TrialResult) -> tuple[bool, float, int]:
        figure = trial.figure(name) if name is not None else None
        if figure is None or figure.value != figure.value:
            return True, 0.0, trial.number
        return False, figure.value if figure.better == "lower" else -figure.value, trial.number

    return sorted(result.trials, key=key)


def write_results(result: SweepResult, out: Path) -> None:
    """Write `sweep.json` and `sweep.csv`."""
    write_text(out / SWEEP_FILE, result.model_dump_json(indent=2))
    write_text(out / CSV_FILE, csv_text(result))


def csv_text(result: SweepResult) -> str:
    """Return one line per trial: its setting, its state, every figure."""
    settings = list(dict.fromkeys(name for trial in result.trials for name in trial.setting))
    metrics = dict.fromkeys(name for trial in result.trials if trial.measured for name in trial.measured.metrics.values)
    figures = [*metrics, *OF_EVERY_TRIAL]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", *settings, "state", "on_front", *figures, "folder", "reason"])
    for trial in result.trials:
        found = [trial.figure(name) for name in figures]
        writer.writerow(
            [
                trial.number,
                *(trial.setting.get(name) for name in settings),
                trial.state,
                int(trial.on_front),
                *("" if figure is None else figure.value for figure in found),
                trial.folder,
                trial.reason,
            ]
        )
    return text.getvalue()
