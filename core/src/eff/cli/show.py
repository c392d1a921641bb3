"""Tables and JSON on stdout."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from eff.compare import Comparison
    from eff.schemas import ClaimResult, Measurement, Metric, Report

_WIDTH = 120


def print_json(value: Any) -> None:
    """Print a JSON value; pydantic models and lists of them too."""
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    elif isinstance(value, (list, tuple)):
        value = [item.model_dump(mode="json") if hasattr(item, "model_dump") else item for item in value]
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_columns(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of plain text whose last column takes the rest of the line; without rich, which `list-plugins` would
    mostly wait for."""
    lines = [columns, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns) - 1)]
    room = max(20, (_width() or shutil.get_terminal_size().columns) - sum(widths) - 2 * len(widths) - 1)
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        first, *more = textwrap.wrap(line[-1], room) or [""]
        typer.echo((" " + "  ".join([*cells, first])).rstrip())
        for rest in more:
            typer.echo(" " * (sum(widths) + 2 * len(widths) + 1) + rest)
        if line is columns:
            typer.echo(" " + "─" * (sum(widths) + 2 * len(widths) + min(room, max(len(row[-1]) for row in lines))))


def _width() -> int | None:
    """Return the width where it is not the terminal's: into a pipe or a file 80 columns would break names in two."""
    return None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[int] = ()
) -> None:
    """Print a table; columns whose index is in `right` are right-aligned. Headings break at words, names nowhere else."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if title:
        typer.echo(title)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        # As Text: rich looks for emoji in plain strings, and their table takes a tenth of `list-plugins` to import.
        table.add_column(Text(name.replace("_", " ")), justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console(width=_width()).print(table)


def size_text(count: int | None) -> str:
    """Return bytes for people: 17.2 KiB."""
    if count is None:
        return "-"
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def metric_text(metric: Metric | None) -> str:
    """Return a metric with its unit."""
    if metric is None:
        return "-"
    if metric.unit == "B":
        return size_text(int(metric.value))
    if not metric.unit and metric.value.is_integer() and abs(metric.value) >= 100:  # a count
        return f"{int(metric.value):,}"
    number = f"{metric.value:.2f}" if abs(metric.value) >= 1 or metric.value == 0 else f"{metric.value:.3g}"
    return f"{number} {metric.unit}".rstrip()


def measurement_rows(columns: Sequence[Measurement | None]) -> list[list[str]]:
    """Return one row per metric, then size, parameters and latency, with a column per measurement."""
    names: dict[str, None] = {}
    for measured in columns:
        names |= dict.fromkeys(measured.metrics.values if measured else ())
    rows = [
        [name.replace("_", " "), *(metric_text(m.metrics.values.get(name)) if m else "-" for m in columns)]
        for name in names
    ]
    rows.append(["file to ship", *(size_text(m.bytes) if m else "-" for m in columns)])
    rows.append(["parameters", *(f"{m.parameters:,}" if m else "-" for m in columns)])
    rows.append(["latency, 1 sample", *(f"{m.latency_ms:.2f} ms" if m and m.latency_ms else "-" for m in columns)])
    return rows


def comparison_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return headers and one row per setting: metrics that two settings have, sizes, latencies, time and memory."""
    rows = comparison.rows
    measured = [row.measured for row in rows if row.measured]
    counts = Counter(name for one in measured for name in one.metrics.values)
    names = [name for name in counts if counts[name] > 1 or name == comparison.headline]
    formats = sorted({item.format for row in rows for item in row.artifacts} & {"onnx", "packed"})
    headers = ["", *(name.replace("_", " ") for name in names), "file to ship", *formats, "latency"]
    headers += ["onnxruntime"] * ("onnx" in formats) + ["time", "peak memory"]
    cells = []
    for row in rows:
        if (one := row.measured) is None:
            cells.append([row.setting, f"failed: {row.error}", *[""] * (len(headers) - 2)])
            continue
        line = [row.setting, *(metric_text(one.metrics.values.get(name)) for name in names), size_text(one.bytes)]
        files = {name: row.artifact(name) for name in formats}
        line += [size_text(file.bytes) if file else "-" for file in files.values()]
        line.append(_milliseconds(one.latency_ms))
        if "onnx" in formats:
            file = files["onnx"]
            line.append(_milliseconds(file.details.get("latency_ms") if file else None))
        line.append("-" if row.seconds is None else f"{row.seconds:.1f} s")
        line.append("-" if row.peak_memory_bytes is None else size_text(row.peak_memory_bytes))
        cells.append(line)
    return headers, cells


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _milliseconds(value: object) -> str:
    return f"{value:.2f} ms" if isinstance(value, float) else "-"


def _change(name: str, before: Measurement, after: Measurement) -> str:
    old, new = before.metrics.values.get(name), after.metrics.values.get(name)
    if old is None or new is None:
        return ""
    return f"{new.value - old.value:+.2f}" if abs(new.value - old.value) >= 0.005 else f"{new.value - old.value:+.2g}"


def print_report(report: Report, folder: str) -> None:
    """Print the before/after table of a run and where its files are."""
    after = report.after
    assert after is not None
    names = ", ".join(method.name for method in report.methods) or "training"
    if report.before is None:
        print_table(names, ["", "result"], measurement_rows([after]), right=(1,))
    else:
        rows = measurement_rows([report.before, after])
        changes = [_change(row[0].replace(" ", "_"), report.before, after) for row in rows]
        ratio = report.before.bytes / max(1, after.bytes)
        changes[-3] = f"{ratio:.1f}x smaller" if ratio >= 1 else f"{1 / ratio:.1f}x larger"
        print_table(
            names,
            ["", "before", "after", "change"],
            [[*row, change] for row, change in zip(rows, changes, strict=True)],
            right=(1, 2, 3),
        )
    for artifact in report.artifacts:
        agreement = artifact.details.get("agreement")
        note = (
            f", agrees with the model on {100 * agreement:.1f} % of {artifact.details.get('samples')} samples"
            if isinstance(agreement, float)
            else ""
        )
        typer.echo(f"  {folder}/{artifact.path}  {size_text(artifact.bytes)} ({artifact.format}{note})")
    typer.echo(f"  {folder}/report.json, {folder}/recipe.yaml  ({report.seconds:.1f} s on {report.device})")


def _figure(value: float) -> str:
    """Two decimals, or three digits where that would hide a small value."""
    return f"{value:.2f}" if abs(value) >= 1 or not value else f"{value:.3g}"


def print_claims(results: Sequence[ClaimResult]) -> None:
    """Print all claims in one table, then what each setting measured."""
    rows: list[list[object]] = []
    for result in results:
        rows.append([f"{result.plugin} {result.id}", "", "", "", ""])
        for check in result.checks:
            spread = f" ± {check.spread:.2g}" if check.spread is not None else ""
            verdict = "holds" if check.holds else "DOES NOT HOLD"
            figures = [_figure(check.left), _figure(check.right), f"{check.gap:+.3g}{spread}"]
            rows.append([f"  {check.check}", *figures, verdict])
    print_table("claims", ["claim and check", "left", "right", "gap", "verdict"], rows, right=(1, 2, 3))
    for result in results:
        typer.echo(f"{result.plugin} {result.id}: {result.statement}")
        widest = max(map(len, result.measured), default=0)
        for name, values in result.measured.items():
            mean = sum(values) / len(values)
            unit = f" {result.unit_of(name)}".rstrip()
            typer.echo(f"  {name:<{widest}} {_figure(mean):>8}{unit}   per seed: {', '.join(map(_figure, values))}")
        typer.echo(f"  paper: {result.paper}")
        typer.echo(f"  {len(result.seeds)} seeds, {result.seconds:.0f} s")
