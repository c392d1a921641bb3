"""`eff sensitivity`: how much each layer of a model minds fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sensitivity(
    model: Annotated[str, typer.Argument(help="A model file, a run folder, or a source such as zoo:digits_cnn.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Data; unset: the one that the model's file names.")
    ] = None,
    metric: Annotated[
        str, typer.Option("--metric", help="output_error, kl, hessian, fisher, with commas, or all.")
    ] = "all",
    bits: Annotated[str, typer.Option("--bits", help="Numbers of bits, 2 to 8, with commas.")] = "8,4,3,2",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Training samples to measure on.")] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Samples in memory at a time.")] = 32,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for sensitivity.json and the charts.")] = None,
    arch: Annotated[str | None, typer.Option("--arch", help="Architecture of a bare state dict.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that holds results.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Measure how much each layer minds fewer bits: table, bar charts and a file for mixed precision.

    Example: eff sensitivity digits/model.pt --data digits --out sensitivity
    """
    from eff.cli.show import print_json, print_table
    from eff.errors import RequestError
    from eff.files import check_output_folder, make_output_folder
    from eff.log import TerminalLog
    from eff.session import Plugins
    from eff.use import UseRequest, open_for_use
    from eff_quant_kit.calibration import CalibrationSet
    from eff_quant_kit.sensitivity import AXES, measure_sensitivity, parse_measures, write_sensitivity

    measures = parse_measures(metric)
    widths = [item.strip() for item in bits.split(",")]
    if not all(item.isdigit() and 2 <= int(item) <= 8 for item in widths):
        raise RequestError(f"--bits takes numbers from 2 to 8 with commas, e.g. 8,4,3,2; got '{bits}'")
    if out is not None:
        check_output_folder(out, force)
    log = TerminalLog(quiet=as_json)
    opened, run = open_for_use(UseRequest(model, arch, data, device, batch_size), Plugins(), log, needs_data=True)
    if metric == "all" and not hasattr(run.task.options, "classes"):
        measures = tuple(item for item in measures if item != "kl")
    with CalibrationSet(run, samples, batch_size, plugin="sensitivity") as calibration:
        found = measure_sensitivity(
            opened.model, run, calibration, measures, [int(item) for item in widths], source=model
        )
    if out is not None:
        make_output_folder(out)
        written = write_sensitivity(found, out)
    if as_json:
        print_json(found)
        return
    for measure in measures:
        print_table(
            f"{AXES[measure]}; {found.samples} samples of {found.data}",
            ["layer", "weights", *(f"{b} bits" for b in found.bits)],
            [
                [item.layer, f"{item.parameters:,}", *(f"{item.values[measure][str(b)]:.1e}" for b in found.bits)]
                for item in found.layers
            ],
            right=range(1, 2 + len(found.bits)),
        )
    if out is not None:
        for path in written:
            typer.echo(f"  {path}")
