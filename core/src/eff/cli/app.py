"""The typer application: which commands there are, core's and those that plugins add.

A command's module is imported when the command is named: reading all of them takes as long as `list-plugins` itself.
"""

from __future__ import annotations

import importlib
from typing import Annotated

import click
import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import CommandInfo

import eff

MODULES = {
    "apply": "runs", "train": "runs", "evaluate": "use", "predict": "use", "export": "use", "bench": "use",
    "compare": "runs", "sweep": "scale", "list-plugins": "plugins", "info": "plugins", "verify": "plugins",
    "new": "authors", "check": "authors", "doctor": "plugins", "demo": "runs",
}  # fmt: skip
"""Core's commands in the order of the help, and the module of `eff.cli` that each stands in."""


class Command(TyperCommand):
    """A command whose help is plain text: typer escapes brackets for rich even where rich does not print."""

    def get_help(self, ctx: click.Context) -> str:
        """Return the help."""
        return super().get_help(ctx).replace("\\[", "[")


class Commands(TyperGroup):
    """Core's commands and the plugins' (entry-point group eff.commands), loaded when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names, core's first."""
        from eff.registry import COMMANDS, discover

        return [*MODULES, *(row.name for row in discover(COMMANDS) if row.status == "ok" and row.name not in MODULES)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return one command; a plugin's function becomes a command here."""
        if cmd_name in MODULES:
            importlib.import_module(f"eff.cli.{MODULES[cmd_name]}")  # its commands register with `app`
            (info,) = (item for item in app.registered_commands if _name(item) == cmd_name)
            info.cls = Command
            return typer.main.get_command_from_info(info, pretty_exceptions_short=True, rich_markup_mode=None)
        from eff.registry import COMMANDS, discover, import_object

        for row in discover(COMMANDS):
            if row.name == cmd_name and row.status == "ok":
                single = typer.Typer(add_completion=False, rich_markup_mode=None)
                single.command(name=cmd_name, cls=Command)(import_object(row.target, f"command '{cmd_name}'"))
                return typer.main.get_command(single)
        return None


def _name(info: CommandInfo) -> str:
    assert info.callback is not None
    return info.name or str(info.callback.__name__).replace("_", "-")


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    suggest_commands=False,  # click does it too
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
