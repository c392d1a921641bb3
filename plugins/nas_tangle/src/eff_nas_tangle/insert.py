"""From a network to its supernet before the search, and to the chosen network after it; what is written of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from eff import distributed
from eff.checkpoint import save_checkpoint
from eff.errors import RequestError
from eff.exporting import make_header
from eff.run import Run
from eff.schemas import Metric, Metrics, ModelSpec, TableRow
from eff_nas_kit.layers import Selection
from eff_nas_kit.space import Chosen, Genotype, SearchSpace
from eff_nas_kit.splitting import split_for_search
from eff_nas_kit.supernet import discretise, make_supernet
from eff_nas_kit.tracing import SpaceOptions, find_space
from eff_nas_tangle.choose import calibrate, choose, make_fresh, summary
from eff_nas_tangle.config import TangleConfig
from eff_nas_tangle.search import Search

if TYPE_CHECKING:
    from pydantic import JsonValue

NAME = "nas_tangle"


def prepare(
    model: nn.Module, config: TangleConfig, structure: dict[str, JsonValue], run: Run
) -> tuple[nn.Module, Search | None]:
    """Return the supernet and, where the run trains, the search; the chosen network where there is one.

    The run's training data becomes the part for the weights until `conclude`.
    """
    if "space" not in structure:
        _check_run(run)
        example = tuple(value.to(run.device) for value in run.task.example_inputs(2))
        space = find_space(model, example, _space_options(config), NAME)
        structure["space"] = space.model_dump(mode="json")
        structure["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        run.log.info(f"{NAME}: {space.architectures:,} networks in {len(space.choices)} choices")
    space = _space(structure)
    selection = Selection(space, config.mixing)
    if "chosen" in structure:
        return discretise(model, selection, _chosen(structure)), None
    search = None
    if run.training and run.data is not None:
        train, valid = split_for_search(run.split("train"), config.train_portion, run.generator(f"{NAME}/split"))
        search = Search(config, selection, run, run.data, valid)
        run.data = dataclasses.replace(run.data, train=train)
    return make_supernet(model, selection), search


def _check_run(run: Run) -> None:
    if distributed.processes() > 1:
        raise RequestError(f"{NAME} searches in one process; leave out --devices")
    if run.precision == "fp16":
        raise RequestError(
            f"{NAME}: fp16 scales the loss, and the architecture's gradients with it; use --precision bf16"
        )


def _space_options(config: TangleConfig) -> SpaceOptions:
    return SpaceOptions(
        config.search, config.width_choices, config.kernel_choices, config.depth_choices, config.include, config.crop
    )


def _space(structure: dict[str, JsonValue]) -> SearchSpace:
    return SearchSpace.model_validate(structure["space"])


def _chosen(structure: dict[str, Any]) -> Chosen:
    return {name: int(value) for name, value in structure["chosen"].items()}


def conclude(
    supernet: nn.Module,
    search: Search | None,
    config: TangleConfig,
    structure: dict[str, Any],
    run: Run,
    file_name: str,
) -> nn.Module:
    """Return the chosen network, note it in `structure`, and give the run its whole data back."""
    space = _space(structure)
    if search is None:
        run.warn(f"{NAME}: nothing was searched, the largest network stays; leave out --epochs 0")
        chosen, selection = space.largest, Selection(space)
    else:
        search.note_epoch(supernet, run)
        chosen, selection = choose(search, supernet, run), search.selection
        structure["search"] = summary(search, supernet, run, chosen)
        run.data = search.data
    model = discretise(supernet, selection, chosen)
    if search is not None:
        if config.weights == "fresh":
            make_fresh(model, run)
        calibrate(model, run)
    structure["chosen"] = dict(chosen)
    if run.keeps_files:
        with run.output(file_name, "genotype") as path:
            write_genotype(model, structure, path, run)
    return model


def genotype_of(structure: dict[str, Any], run: Run) -> Genotype:
    """Return what the search chose."""
    assert run.model_spec is not None
    return Genotype(model=run.model_spec, space=_space(structure), chosen=_chosen(structure))


def write_genotype(model: nn.Module, structure: dict[str, Any], path: Path, run: Run) -> dict[str, Any]:
    """Write the genotype as JSON."""
    path.write_text(genotype_of(structure, run).model_dump_json(indent=2), encoding="utf-8")
    return {"architectures": _space(structure).architectures}


def write_subnet(model: nn.Module, structure: dict[str, Any], path: Path, run: Run) -> dict[str, Any]:
    """Write the chosen network as a checkpoint of the source nas:genotype, with no method to replay."""
    before = tuple(item for item in run.applied() if item.name != NAME)
    if before:
        names = ", ".join(item.name for item in before)
        raise RequestError(f"{NAME}: a genotype cannot hold what {names} did to the model; use model.pt")
    genotype = genotype_of(structure, run).model_dump(mode="json")
    options = {key: value for key, value in run.task.model_options().items() if key in genotype["model"]["options"]}
    spec = ModelSpec(source="nas:genotype", options={"genotype": genotype, **options})
    save_checkpoint(path, make_header(run, model=spec, methods=()), model.state_dict())
    return {"source": spec.source}


def report(model: nn.Module, structure: dict[str, Any]) -> Metrics:
    """Return the measurements of a searched network; nothing for one that was not searched."""
    if "chosen" not in structure:
        return Metrics()
    space, chosen, found = _space(structure), _chosen(structure), structure.get("search", {})
    share = 100.0 * sum(parameter.numel() for parameter in model.parameters()) / structure["parameters"]
    values = {
        "architectures": Metric(value=float(space.architectures)),
        "share_of_largest": Metric(value=share, unit="%", better="lower"),
    }
    if found:
        values["search_entropy"] = Metric(value=found["entropy"])
        values["search_valid_score"] = Metric(value=found["valid_score"], better="higher")
        values["search_step_memory"] = Metric(value=float(found["step_bytes"]), unit="B", better="lower")
    if "ranking" in found:
        values["rank_kendall_tau"] = Metric(value=found["ranking"]["kendall_tau"], better="higher")
        values["rank_cka"] = Metric(value=found["ranking"]["cka"], better="higher")
    rows: list[TableRow] = [
        {
            "choice": name,
            "candidates": ", ".join(str(value) for value in choice.values),
            "chosen": chosen[name],
            "coefficients": ", ".join(f"{a:.2f}" for a in found.get("coefficients", {}).get(name, [])),
        }
        for name, choice in space.choices.items()
    ]
    tables = {"genotype": rows}
    if found.get("history"):
        tables["search_history"] = found["history"]
    return Metrics(values=values, tables=tables)
