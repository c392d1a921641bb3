"""Commands for plugin authors: new, check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eff.cli.app import app


@app.command()
def new(
    plugin: Annotated[str, typer.Argument(help="Name <family>_<method>, e.g. quant_mine.")],
    out: Annotated[Path, typer.Option("--out", help="Where the package's folder is made.")] = Path("."),
    title: Annotated[str, typer.Option("--title", help="Title of the paper.")] = "",
    author: Annotated[str, typer.Option("--author", help="Your name.")] = "",
) -> None:
    """Make a plugin package from the template: method, options, claim, tests.

    Example: eff new quant_mine && pip install -e eff-quant-mine
    """
    from eff.scaffold import new_plugin

    folder = new_plugin(plugin, out, title=title, author=author)
    typer.echo(f"made {folder}")
    typer.echo(f"next: pip install -e {folder} && eff info {plugin} && pytest {folder}")


@app.command()
def check(
    plugin: Annotated[
        str, typer.Argument(metavar="PATH|PLUGIN", help="A package folder or the name of an installed method.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Run the contract checks on a plugin. Exit code 1 where one fails or none ran.

    Example: eff check quant_lsq
    """
    from eff.cli.show import print_json, print_table
    from eff.testing import check_plugin, plugin_at

    results = check_plugin(plugin_at(plugin))
    if as_json:
        print_json(results)
    else:
        print_table(plugin, ["check", "result", "detail"], [[r.name, r.state, r.detail] for r in results])
    failed = [result for result in results if result.state == "failed"]
    ran = sum(result.state != "skipped" for result in results)
    typer.echo(f"{ran} checks ran, {len(failed)} failed", err=as_json)
    if failed or not ran:
        raise typer.Exit(1)
