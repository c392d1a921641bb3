"""The other models of a comparison: from files, sources and filter data bases."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from eff.checkpoint import read_model_file
from eff.errors import ConfigError
from eff.models import ModelRequest, file_of, open_model
from eff.run import Run
from eff.session import Plugins
from eff_eval_filter_db.config import FilterDBConfig
from eff_eval_filter_db.database import FILE, read_database
from eff_eval_filter_db.layers import Layer, layers_of_model, layers_of_state

ARCH = "?arch="
"""Stands between bare weights and the architecture they are of, e.g. resnet20.th?arch=zoo:cifar_resnet20."""


def open_others(config: FilterDBConfig, run: Run) -> list[Layer]:
    """Return the layers of all `others`, each model under a name of its own.

    Raises:
        ConfigError: a tag is missing where groups are made by tag.
        ModelError: one cannot be opened or has no such filters.
    """
    taken = {model_name(config, run)}
    layers: list[Layer] = []
    for text in config.others:
        tag, source = split_tag(text)
        found = _open(source, config.kernel, run)
        if tag:
            found = [replace(layer, tag=tag) for layer in found]
        if config.group_by == "tag" and not all(layer.tag for layer in found):
            raise ConfigError(f"eval_filter_db: group_by=tag, but '{source}' has no tag; write -o others=TAG={source}")
        layers += _renamed(found, taken)
    return layers


def model_name(config: FilterDBConfig, run: Run) -> str:
    """Return what tables and figures call the measured model."""
    spec = run.model_spec
    return config.label or (_stem(spec.source) if spec else "model")


def split_tag(text: str) -> tuple[str, str]:
    """Return tag and source of `tag=SOURCE`; an existing path with '=' in it has no tag."""
    match = re.match(r"([\w.-]+)=(.+)", text)
    return (match[1], match[2]) if match and not Path(text).exists() else ("", text)


def _open(text: str, kernel: int, run: Run) -> list[Layer]:
    source, _, arch = text.partition(ARCH)
    database = Path(source, FILE) if Path(source).is_dir() else Path(source)
    path = file_of(source)
    if database.suffix == ".parquet" and (path is None or path.suffix not in (".pt", ".pth")):
        return read_database(database, kernel)
    name = _stem(source)
    if path is not None and not arch:
        file = read_model_file(path)
        if file.header is None and file.module is None:
            return layers_of_state(file.state, name, kernel)
    request = ModelRequest(
        source, arch or None, device=run.device, seed=run.seed, needs_data=False, needs_task=False
    )  # fmt: skip
    opened = open_model(request, Plugins(), run.log)
    return [replace(layer, task=opened.task.name) for layer in layers_of_model(opened.model, name, kernel)]


def _stem(source: str) -> str:
    path = file_of(source)
    if path is None:
        return source.partition("?")[0].rpartition(":")[2]
    return path.stem if path.stem != "model" else path.resolve().parent.name


def _renamed(layers: Iterable[Layer], taken: set[str]) -> list[Layer]:
    """Give each model a name that is not taken yet, and take it."""
    names: dict[str, str] = {}
    renamed = []
    for layer in layers:
        if layer.model not in names:
            number, name = 2, layer.model
            while name in taken:
                name, number = f"{layer.model} ({number})", number + 1
            taken.add(name)
            names[layer.model] = name
        renamed.append(replace(layer, model=names[layer.model]))
    return renamed
