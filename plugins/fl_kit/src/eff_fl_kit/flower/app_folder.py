"""The Flower app that runs a recipe: a folder for `flwr run`."""

from __future__ import annotations

import json
from pathlib import Path

from eff.errors import OutputError
from eff.files import write_text
from eff.schemas import Recipe

_PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "eff-federation"
version = "1.0.0"
description = "A recipe of eff on Flower"
license = "Apache-2.0"
dependencies = ["eff-fl-kit[flower]"]

[tool.flwr.app]
publisher = "eff"

[tool.flwr.app.components]
serverapp = "federation:server"
clientapp = "federation:client"

[tool.flwr.app.config]
recipe = {recipe}
out = {out}
notes = {notes}
round-timeout = {round_timeout}
start-timeout = {start_timeout}
"""

_MODULE = '''\
"""The two sides of the federation, as Flower wants to find them."""

from eff_fl_kit.flower.client import app as client
from eff_fl_kit.flower.server import app as server

__all__ = ["client", "server"]
'''


def write_app(folder: Path, recipe: Recipe, out: Path, notes: Path, round_timeout: float, start_timeout: float) -> None:
    """Write the app into `folder`.

    Args:
        folder: new or empty.
        recipe: what to run; a model file must lie where the server runs, nodes are sent what they need.
        out: run folder on the server's machine.
        notes: file on the server's machine for progress as JSON lines.
        round_timeout: seconds a round waits for its clients.
        start_timeout: seconds the start waits for all nodes.

    Raises:
        OutputError: `folder` holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not empty; name another folder for the app")
    folder.mkdir(parents=True, exist_ok=True)
    # JSON strings are TOML strings.
    text = _PYPROJECT.format(
        recipe=json.dumps(recipe.model_dump_json(exclude_none=True)),
        out=json.dumps(str(out.resolve())),
        notes=json.dumps(str(notes.resolve())),
        round_timeout=float(round_timeout),
        start_timeout=float(start_timeout),
    )
    write_text(folder / "pyproject.toml", text)
    write_text(folder / "federation.py", _MODULE)
