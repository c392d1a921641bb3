"""The picture of a sweep: quality against cost, with the Pareto front."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eff.schemas import Metric
from eff.sweep.results import SweepResult, TrialResult, figure_of
from eff.use import save_figure

LABELLED = 8
"""Points of the front with a label; more would cover each other."""
FRONT, OTHER, BEFORE = "#1f5fa8", "#9aa4ad", "#c2410c"


def draw_front(result: SweepResult, path: Path, pyplot: Any) -> bool:
    """Draw all finished trials and the front; returns whether there was anything to draw."""
    assert result.metric is not None
    found = [(trial, trial.figure(result.cost), trial.figure(result.metric)) for trial in result.trials]
    measured = [(trial, x, y) for trial, x, y in found if x is not None and y is not None]
    if not measured:
        return False
    _, x, y = measured[0]
    to_axis, x_label = _x_scale(result.cost, x)
    points = [(trial, to_axis(x), y.value) for trial, x, y in measured]
    figure, (axes, notes) = pyplot.subplots(1, 2, figsize=(9.5, 4.8), width_ratios=(3, 1), layout="constrained")
    if _is_wide([x for _, x, _ in points]):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(pyplot.matplotlib.ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(pyplot.matplotlib.ticker.NullFormatter())
    others = [(x, y) for trial, x, y in points if not trial.on_front]
    if others:
        axes.scatter(*zip(*others, strict=True), s=34, color=OTHER, zorder=2, label="trial")
    front = sorted(((x, y, trial) for trial, x, y in points if trial.on_front), key=lambda point: point[:2])
    axes.plot(
        [x for x, _, _ in front], [y for _, y, _ in front], "o-", color=FRONT, markersize=7, zorder=3, linewidth=1.4,
        drawstyle="steps-post" if x.better != "higher" else "steps-pre", label="Pareto front",
    )  # fmt: skip
    _draw_before(axes, result, [y for _, _, y in points], to_axis)
    _label(axes, notes, front)
    axes.set_xlabel(x_label)
    axes.set_ylabel(_axis_label(result.metric, y))
    name = ", ".join(use.name for use in result.definition.recipe.methods)
    axes.set_title(f"{name}: {_words(result.metric)} against {_words(result.cost)}, {len(points)} trials")
    axes.margins(0.1, 0.12)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", frameon=False, fontsize=9)
    save_figure(figure, path)
    pyplot.close(figure)
    return True


def _x_scale(cost: str, figure: Metric) -> tuple[Any, str]:
    """Return how a cost is shown: bytes as KiB."""
    if figure.unit == "B":
        return (lambda metric: metric.value / 1024), f"{_words(cost)} (KiB)"
    return (lambda metric: metric.value), _axis_label(cost, figure)


def _draw_before(axes: Any, result: SweepResult, qualities: Sequence[float], to_axis: Any) -> None:
    """Draw the untouched model as a line at its quality; it is mostly too large or too poor to be a point."""
    assert result.metric is not None
    if result.before is None:
        return
    quality, cost = figure_of(result.before, result.metric), figure_of(result.before, result.cost)
    low, high = min(qualities), max(qualities)
    if quality is None or not low - 2 * (high - low) <= quality.value <= high + 2 * (high - low):
        return
    label = "as it came"
    if cost is not None:
        label += f", {to_axis(cost):.3g} {'KiB' if cost.unit == 'B' else cost.unit}".rstrip()
    axes.axhline(quality.value, color=BEFORE, linestyle="--", linewidth=1.2, zorder=1, label=label)


def _is_wide(values: Sequence[float]) -> bool:
    low, high = min(values), max(values)
    return low > 0 and math.isfinite(high) and high / low > 8


def _label(axes: Any, notes: Any, front: Sequence[tuple[float, float, TrialResult]]) -> None:
    """Number up to `LABELLED` points of the front, spread evenly over it, and list their settings beside."""
    step = max(1, math.ceil(len(front) / LABELLED))
    lines: list[str] = []
    for x, y, trial in front[::step]:
        number = f"{trial.number:03d}"
        axes.annotate(number, (x, y), xytext=(-5, 5), textcoords="offset points", fontsize=8, ha="right", color=FRONT)
        setting = ", ".join(f"{name.rpartition('.')[2]}\u00a0{value}" for name, value in trial.setting.items())
        lines += textwrap.wrap(f"{number}  {setting}", width=32, subsequent_indent="        ")
    notes.axis("off")
    notes.text(0, 1, "\n".join(lines), va="top", fontsize=8, color=FRONT, linespacing=1.4)


def _axis_label(name: str, figure: Metric) -> str:
    return f"{_words(name)} ({figure.unit})" if figure.unit else _words(name)


def _words(name: str) -> str:
    return name.replace("_", " ")
