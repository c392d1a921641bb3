"""The same model and data through several methods or settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eff.errors import RequestError
from eff.files import check_output_folder, write_text
from eff.log import Log
from eff.options import read_value
from eff.runner import apply, make_plan
from eff.schemas import Measurement, MethodUse, Recipe, Schema
from eff.use import load_pyplot, save_figure


class ComparisonRow(Schema):
    """One setting and what came of it."""

    setting: str
    folder: Path | None
    measured: Measurement


class Comparison(Schema):
    """All settings, the untouched model first; `compare.json`."""

    model: str
    headline: str
    rows: tuple[ComparisonRow, ...]


def parse_setting(text: str) -> MethodUse:
    """Return the method of `quant_lsq` or `quant_lsq:weight_bits=2:act_bits=2`.

    Raises:
        RequestError: an option has no '='.
    """
    name, *assignments = text.split(":")
    options = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise RequestError(f"setting '{text}': write options as method:name=value:name=value")
        options[key] = read_value(value)
    return MethodUse(name=name, options=options)


def compare(
    settings: Sequence[str], recipe: Recipe, out: Path, *, force: bool = False, log: Log | None = None
) -> Comparison:
    """Apply each setting to the recipe's model; write runs, `compare.json` and `compare.png` into `out`.

    Raises:
        RequestError: a setting or the model is wrong; all settings are checked before the first runs.
    """
    log = log or Log()
    check_output_folder(out, force)
    uses = [parse_setting(text) for text in settings]
    recipes = [recipe.model_copy(update={"methods": (use,)}) for use in uses]
    for one in recipes:
        make_plan(one)
    pyplot = load_pyplot()
    rows: list[ComparisonRow] = []
    for text, one in zip(settings, recipes, strict=True):
        log.info(f"compare: {text}")
        folder = out / text.replace(":", "-").replace("=", "_")
        report = apply(one, folder, force=force, log=log)
        if not rows and report.before is not None:
            rows.append(ComparisonRow(setting="as it came", folder=None, measured=report.before))
        assert report.after is not None
        rows.append(ComparisonRow(setting=text, folder=folder.relative_to(out), measured=report.after))
    headline = next(iter(rows[0].measured.metrics.values))
    comparison = Comparison(model=recipe.model, headline=headline, rows=tuple(rows))
    write_text(out / "compare.json", comparison.model_dump_json(indent=2))
    _plot(comparison, out / "compare.png", pyplot)
    return comparison


def _plot(comparison: Comparison, path: Path, pyplot: Any) -> None:
    """Draw quality against file size, one labelled point a setting."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    name = comparison.headline
    for row in comparison.rows:
        metric = row.measured.metrics.values[name]
        size = row.measured.bytes / 1024
        axes.scatter([size], [metric.value], s=60, zorder=3)
        axes.annotate(row.setting, (size, metric.value), xytext=(6, 6), textcoords="offset points", fontsize=9)
    unit = comparison.rows[0].measured.metrics.values[name].unit
    axes.set_xscale("log")
    axes.set_xlabel("file size (KiB, log scale)")
    axes.set_ylabel(f"{name} ({unit})" if unit else name)
    axes.set_title(f"{Path(comparison.model).name}: {name} against size")
    axes.margins(0.2)
    axes.grid(alpha=0.3)
    save_figure(figure, path)
    pyplot.close(figure)
