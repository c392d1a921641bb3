"""`eff flower-app` and `eff flower-demo`. Imports nothing heavy before it is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

RecipeFile = Annotated[Path, typer.Argument(help="recipe.yaml of an eff run, or written by hand.")]
_START_TIMEOUT = 120.0

Out = Annotated[Path, typer.Option("--out", help="Run folder for model and report, on the server's machine.")]
RoundTimeout = Annotated[float, typer.Option(help="Seconds that a round waits for its clients.")]
StartTimeout = Annotated[float, typer.Option(help="Seconds that the start waits for all SuperNodes.")]


def flower_app(
    recipe: RecipeFile,
    app: Annotated[Path, typer.Argument(help="New folder for the Flower app.")],
    out: Out = Path("federation"),
    round_timeout: RoundTimeout = 600.0,
    start_timeout: StartTimeout = 300.0,
) -> None:
    """Write a Flower app that runs a recipe of a federated method: then `flwr run APP SUPERLINK`."""
    with _needs_flower():
        _write(recipe, app, out, out.with_name(out.name + ".notes"), round_timeout, start_timeout)
    typer.echo(f"wrote {app}; start it with: flwr run {app} SUPERLINK")


def flower_demo(
    recipe: RecipeFile,
    out: Out = Path("federation"),
    nodes: Annotated[int, typer.Option(min=1, help="SuperNodes to start.")] = 3,
    kill: Annotated[
        str | None, typer.Option(help="NODE@ROUND: kill that SuperNode after that round, e.g. 2@3.")
    ] = None,
    round_timeout: RoundTimeout = 60.0,
    timeout: Annotated[float, typer.Option(help="Seconds after which everything is stopped.")] = 600.0,
    force: Annotated[bool, typer.Option(help="Replace the results of an earlier run.")] = False,
) -> None:
    """Run a recipe on a SuperLink and SuperNodes started here, as processes of their own, with TLS."""
    from eff.errors import RunError

    with _needs_flower():
        note = _demo(recipe, out, nodes, kill, round_timeout, timeout, force)
    if note["event"] == "error":
        raise RunError(note["message"])
    _print_report(out)


def _write(recipe: Path, app: Path, out: Path, notes: Path, round_timeout: float, start_timeout: float) -> None:
    from eff.runner import make_plan, read_recipe
    from eff_fl_kit.flower.app_folder import write_app

    content = read_recipe(recipe)
    make_plan(content)  # refuses what can be seen to be wrong now
    write_app(app, content, out, notes, round_timeout, start_timeout)


def _demo(
    recipe: Path, out: Path, nodes: int, kill: str | None, round_timeout: float, timeout: float, force: bool
) -> dict[str, Any]:
    import shutil
    import signal
    import tempfile

    from eff.files import check_output_folder
    from eff_fl_kit.flower.processes import local_federation, watch

    victim, after = _parse_kill(kill, nodes)
    check_output_folder(out, force)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the processes below are ended then too
    folder = Path(tempfile.mkdtemp(prefix="eff-flower-"))
    notes = folder / "notes.jsonl"
    _write(recipe, folder / "app", out, notes, round_timeout, _START_TIMEOUT)
    with local_federation(folder, nodes) as federation:

        def seen(note: dict[str, Any]) -> None:
            if note["event"] == "warning":
                typer.echo(f"warning: {note['message']}", err=True)
            if note["event"] == "round":
                typer.echo(f"round {note['done']} of {note['total']}: {note['note']}", err=True)
                if victim is not None and note["done"] == after:
                    federation.kill(f"node-{victim}")
                    typer.echo(f"killed SuperNode {victim}", err=True)

        federation.run_app(folder / "app")
        last = watch(notes, timeout, seen)
    shutil.rmtree(folder)  # where something failed, the logs stay
    return last


def _parse_kill(kill: str | None, nodes: int) -> tuple[int | None, int]:
    from eff.errors import RequestError

    if kill is None:
        return None, 0
    node, _, after = kill.partition("@")
    if not (node.isdigit() and after.isdigit() and int(node) < nodes and int(after) > 0):
        raise RequestError(f"--kill {kill}: write NODE@ROUND with a node from 0 to {nodes - 1}, e.g. --kill 0@2")
    return int(node), int(after)


@contextmanager
def _needs_flower() -> Iterator[None]:
    """Name the extra where Flower is missing."""
    from eff.errors import MissingDependencyError

    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("flwr", "cryptography"):
            raise
        raise MissingDependencyError(f"{error.name} is not installed; pip install 'eff-fl-kit[flower]'") from error


def _print_report(out: Path) -> None:
    from eff.cli.show import print_report
    from eff.files import REPORT_FILE
    from eff.schemas import Report

    print_report(Report.model_validate_json((out / REPORT_FILE).read_text(encoding="utf-8")), str(out))
