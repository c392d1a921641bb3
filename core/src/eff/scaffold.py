"""`eff new`: a plugin package from the template."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import eff
from eff.errors import MissingDependencyError, OutputError, RequestError, did_you_mean
from eff.registry import FAMILIES, distribution_name


def template_folder() -> Path:
    """Return the template: inside the installed package, or in the checkout it runs from."""
    package = Path(eff.__file__).parent
    for folder in (package / "_template", package.parents[2] / "templates" / "plugin"):
        if (folder / "cookiecutter.json").exists():
            return folder
    raise RequestError("the plugin template is not installed; reinstall eff-core")


def check_name(plugin: str) -> None:
    """Raise where `plugin` is not <family>_<method> with a known family.

    Raises:
        RequestError: it is not.
    """
    if not re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", plugin):
        raise RequestError(f"'{plugin}' is no plugin name; write <family>_<method> in lower case, e.g. quant_mine")
    family = plugin.partition("_")[0]
    if family not in FAMILIES:
        raise RequestError(
            f"there is no family '{family}'{did_you_mean(family, FAMILIES)}; known: {', '.join(FAMILIES)}"
        )


def new_plugin(plugin: str, out: Path, *, title: str = "", author: str = "") -> Path:
    """Render the template into `out` and return the package's folder.

    Raises:
        RequestError: the name is no plugin name. OutputError: the folder exists or cannot be made.
        MissingDependencyError: cookiecutter is not installed.
    """
    check_name(plugin)
    final = out / distribution_name(plugin)
    if final.exists():
        raise OutputError(f"{final} exists; choose another --out or another name")
    try:
        from cookiecutter.main import cookiecutter
    except ImportError as error:
        raise MissingDependencyError("eff new needs cookiecutter; pip install 'eff-core[new]'") from error
    context = {"plugin": plugin, "title": title, "author": author}
    for key, value in context.items():
        if json.dumps(value) != f'"{value}"':
            raise RequestError(f"--{key} holds a quote, a backslash or a control character; write it without")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".eff-new-", dir=out) as scratch:
            extra = {key: value for key, value in context.items() if value}
            made = cookiecutter(
                str(template_folder()), no_input=True, output_dir=scratch, extra_context=extra, default_config=True
            )
            Path(made).rename(final)
    except OSError as error:
        raise OutputError(f"cannot make {final}: {error.strerror or error}; choose another --out") from error
    return final
