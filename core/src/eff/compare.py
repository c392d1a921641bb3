"""The same model and data through several methods or settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eff.errors import EffError, InterruptedRunError, RequestError, RunError
from eff.files import check_output_folder, write_text
from eff.log import Log
from eff.options import read_value
from eff.registry import load_method
from eff.runner import apply, make_plan
from eff.schemas import Artifact, Measurement, MethodUse, Recipe, Schema
from eff.use import UseRequest, export_model, load_pyplot, save_figure


class ComparisonRow(Schema):
    """One setting and what came of it: a measurement, or the error that ended it."""

    setting: str
    folder: Path | None = None
    measured: Measurement | None = None
    artifacts: tuple[Artifact, ...] = ()
    seconds: float | None = None
    """Of the whole run: calibration or training, exports and measurements."""
    peak_memory_bytes: int | None = None
    error: str = ""

    def artifact(self, format: str) -> Artifact | None:
        """Return the file of a format."""
        return next((item for item in self.artifacts if item.format == format), None)


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
    settings: Sequence[str],
    recipe: Recipe,
    out: Path,
    *,
    force: bool = False,
    log: Log | None = None,
) -> Comparison:
    """Apply each setting to the recipe's model; write runs, `compare.json` and `compare.png` into `out`.

    Of the recipe's export formats a method writes those of its card, one without formats all; ONNX of the untouched
    model is written too. A setting that fails in its run gets a row with the error, and the others go on.

    Raises:
        RequestError: a setting or the model is wrong; all settings are checked before the first runs.
        RunError: every setting failed.
    """
    log = log or Log()
    check_output_folder(out, force)
    recipes = [_recipe(recipe, parse_setting(text)) for text in settings]
    for one in recipes:
        make_plan(one)
    pyplot = load_pyplot()
    rows: list[ComparisonRow] = []
    before: Measurement | None = None
    for text, one in zip(settings, recipes, strict=True):
        log.info(f"compare: {text}")
        folder = out / text.replace(":", "-").replace("=", "_")
        try:
            report = apply(one, folder, force=force, log=log)
        except InterruptedRunError:  # the user's wish is for all of it
            raise
        except EffError as error:
            log.warn(f"{text}: {error}")
            rows.append(ComparisonRow(setting=text, error=str(error)))
            continue
        before = before or report.before
        rows.append(
            ComparisonRow(
                setting=text,
                folder=folder.relative_to(out),
                measured=report.after,
                artifacts=report.artifacts,
                seconds=report.seconds,
                peak_memory_bytes=report.peak_memory_bytes,
            )
        )
    if before is None and not any(row.measured for row in rows):
        raise RunError(f"no setting came to its end; the first: {rows[0].error}")
    if before is not None:
        artifacts = _export_untouched(recipe, out, force, log)
        rows.insert(0, ComparisonRow(setting="as it came", measured=before, artifacts=artifacts))
    first = next(row.measured for row in rows if row.measured)
    comparison = Comparison(model=recipe.model, headline=next(iter(first.metrics.values)), rows=tuple(rows))
    write_text(out / "compare.json", comparison.model_dump_json(indent=2))
    _plot(comparison, out / "compare.png", pyplot)
    return comparison


def _recipe(recipe: Recipe, use: MethodUse) -> Recipe:
    """Return the recipe of one setting, with the formats that its method writes, the one to ship first."""
    own = load_method(use.name).card.formats
    formats = recipe.export if not own else tuple(name for name in own if name in (recipe.export or ()))
    return recipe.model_copy(update={"methods": (use,), "export": formats or None})


def _export_untouched(recipe: Recipe, out: Path, force: bool, log: Log) -> tuple[Artifact, ...]:
    """Write the ONNX that those of the settings stand beside."""
    if "onnx" not in (recipe.export or ()):
        return ()
    request = UseRequest(recipe.model, recipe.arch, recipe.data, device=recipe.device)
    return tuple(export_model(request, ["onnx"], out / "as-it-came", force, log))


def _plot(comparison: Comparison, path: Path, pyplot: Any) -> None:
    """Draw quality against file size, one labelled point a setting."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    name = comparison.headline
    measured = [row for row in comparison.rows if row.measured and name in row.measured.metrics.values]
    for row in measured:
        assert row.measured is not None
        metric = row.measured.metrics.values[name]
        size = row.measured.bytes / 1024
        axes.scatter([size], [metric.value], s=60, zorder=3)
        axes.annotate(row.setting, (size, metric.value), xytext=(6, 6), textcoords="offset points", fontsize=9)
    assert measured[0].measured is not None
    unit = measured[0].measured.metrics.values[name].unit
    axes.set_xscale("log")
    axes.set_xlabel("file size (KiB, log scale)")
    axes.set_ylabel(f"{name} ({unit})" if unit else name)
    axes.set_title(f"{Path(comparison.model).name}: {name} against size")
    axes.margins(0.2)
    axes.grid(alpha=0.3)
    save_figure(figure, path)
    pyplot.close(figure)
