"""Commands that use a model: evaluate, predict, export, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eff.cli.app import app
from eff.cli.runs import Arch, AsJson, BatchSize, Data, Device, Force, TrustPickle

Model = Annotated[str, typer.Argument(help="A model file, a run folder, or a source such as zoo:digits_cnn.")]

Bits = Annotated[int | None, typer.Option("--bits", help="Width to compute with, for a model that holds several.")]


def _settings(bits: int | None) -> dict[str, int]:
    return {} if bits is None else {"bits": bits}


@app.command()
def evaluate(
    model: Model,
    method: Annotated[
        str | None, typer.Option("--method", help="Methods whose measurements are added, with commas.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option("-o", "--option", help="Option of a method: name=value.")] = None,
    data: Data = None,
    arch: Arch = None,
    device: Device = None,
    batch_size: BatchSize = None,
    bits: Bits = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the figures and files of the methods.")] = None,
    force: Force = False,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model on the test split of its data.

    Example: eff evaluate digits/model.pt --data digits
    """
    from eff.cli.show import measurement_rows, print_json, print_table
    from eff.log import TerminalLog
    from eff.options import method_names, split_assignments
    from eff.schemas import MethodUse
    from eff.use import UseRequest
    from eff.use import evaluate as measure_model

    names = method_names(method) if method is not None else []
    options = split_assignments(option or [], names)
    uses = [MethodUse(name=name, options=options[name]) for name in names]
    request = UseRequest(
        model, arch, data, device or "auto", batch_size, trust_pickle=trust_pickle, settings=_settings(bits)
    )
    measured = measure_model(request, uses, out, force, TerminalLog(quiet=as_json))
    if as_json:
        print_json(measured)
        return
    print_table(model, ["", "value"], measurement_rows([measured]), right=(1,))
    for name, rows in measured.metrics.tables.items():
        if rows:
            columns = list(rows[0])
            print_table(name, columns, [[_cell(row.get(column)) for column in columns] for row in rows])


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


@app.command()
def predict(
    model: Model,
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Files, e.g. photos.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Where a task that makes a file writes it.")] = None,
    arch: Arch = None,
    data: Data = None,
    device: Device = None,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Show what a model says of a file.

    Example: eff predict model.pt photo.jpg
    """
    from eff.cli.show import print_json, print_table
    from eff.use import UseRequest
    from eff.use import predict as predict_files

    request = UseRequest(model, arch, data, device or "auto", trust_pickle=trust_pickle)
    predictions = predict_files(request, inputs, out)
    if as_json:
        print_json(predictions)
        return
    for prediction in predictions:
        if prediction.rows:
            columns = list(prediction.rows[0])
            print_table(
                prediction.input, columns, [[_cell(row[column]) for column in columns] for row in prediction.rows]
            )
        if prediction.file:
            typer.echo(f"{prediction.input} -> {prediction.file}")


@app.command()
def export(
    model: Model,
    to: Annotated[list[str], typer.Option("--to", help="onnx, pt2, safetensors, or a format of the model's methods.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder; unset: beside the model.")] = None,
    arch: Arch = None,
    data: Data = None,
    device: Device = None,
    bits: Bits = None,
    force: Force = False,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Write a model in another format.

    Example: eff export digits-quant_lsq --to onnx --to packed
    """
    from eff.cli.show import print_json, size_text
    from eff.log import TerminalLog
    from eff.models import file_of
    from eff.use import UseRequest, export_model

    path = file_of(model)
    folder = out or (path.parent if path else Path("."))
    formats = [name for item in to for name in item.split(",") if name]
    request = UseRequest(model, arch, data, device or "auto", trust_pickle=trust_pickle, settings=_settings(bits))
    artifacts = export_model(request, formats, folder, force, TerminalLog(quiet=as_json))
    if as_json:
        print_json(artifacts)
        return
    for artifact in artifacts:
        details = ", ".join(
            f"{key} {_cell(value)}" for key, value in artifact.details.items() if not isinstance(value, (dict, list))
        )
        typer.echo(
            f"{artifact.path}  {size_text(artifact.bytes)}  {artifact.format}" + (f"  ({details})" if details else "")
        )


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Model files, run folders or sources.")],
    data: Data = None,
    arch: Arch = None,
    batch_size: BatchSize = None,
    device: Device = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Time for each measurement.")] = 1.0,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Measure latency, throughput, memory and size of models side by side.

    Example: eff bench digits digits-quant_lsq
    """
    from eff.cli.show import print_json, print_table, size_text
    from eff.log import TerminalLog
    from eff.use import UseRequest
    from eff.use import bench as bench_models

    requests = [
        UseRequest(model, arch, data, device or "auto", batch_size, trust_pickle=trust_pickle) for model in models
    ]
    rows = bench_models(requests, seconds, TerminalLog(quiet=as_json))
    if as_json:
        print_json(rows)
        return
    print_table(
        f"batch {rows[0].batch_size} for throughput and memory; latency with one sample",
        ["model", "median ms", "p90 ms", "samples/s", "peak memory", "parameters", "file"],
        [
            [
                r.model,
                f"{r.latency_ms:.2f}",
                f"{r.latency_p90_ms:.2f}",
                f"{r.throughput:,.0f}",
                size_text(r.peak_memory_bytes),
                f"{r.parameters:,}",
                size_text(r.bytes),
            ]
            for r in rows
        ],
        right=range(1, 7),
    )
