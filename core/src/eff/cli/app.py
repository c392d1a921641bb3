"""The typer application: which commands there are, core's and those that plugins add."""

from __future__ import annotations

from typing import Annotated

import click
import typer
from typer.core import TyperGroup

import eff


class Commands(TyperGroup):
    """Core's commands and the plugins' (entry-point group eff.commands), the latter loaded when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names, core's first."""
        from eff.registry import COMMANDS, discover

        own = super().list_commands(ctx)
        return [*own, *(row.name for row in discover(COMMANDS) if row.status == "ok" and row.name not in own)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return one command; a plugin's function becomes a command here."""
        found = super().get_command(ctx, cmd_name)
        if found is not None:
            return found
        from eff.registry import COMMANDS, discover, import_object

        for row in discover(COMMANDS):
            if row.name == cmd_name and row.status == "ok":
                single = typer.Typer(add_completion=False, rich_markup_mode=None)
                single.command(name=cmd_name)(import_object(row.target, f"command '{cmd_name}'"))
                return typer.main.get_command(single)
        return None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Published deep-learning methods as commands. Start with: eff demo",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"eff {eff.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Published deep-learning methods as commands. Start with: eff demo."""


from eff.cli import authors, plugins, runs, scale, use  # noqa: E402, F401 - they add their commands to app
