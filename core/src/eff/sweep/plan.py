"""From a request to trials: every one a complete, checked recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from eff.errors import ConfigError, RequestError, did_you_mean, raise_problems
from eff.files import sha256_of
from eff.log import Log
from eff.models import file_of
from eff.registry import load_method
from eff.runner import Plan, make_plan
from eff.schemas import DataSpec, Recipe, Schema, TrainOptions
from eff.sweep.space import Axis, Setting, draw_settings, grid, parse_axes

Search = Literal["grid", "random"]
TRAIN_FIELDS = tuple(name for name in TrainOptions.model_fields if name != "optimizer_options")
RUN_FIELDS = ("seed", "precision")
FILE_SCHEMES = ("folder", "parquet", "npz")
RUN = "run"
TRAIN = "train"


@dataclass(frozen=True)
class SweepRequest:
    """What the user asked for."""

    recipe: Recipe
    """What all trials share."""
    space: tuple[str, ...]
    search: Search | None = None
    """None: random where the space has a distribution or `trials` is given, else grid."""
    trials: int | None = None


class Definition(Schema):
    """What makes two sweeps the same search; a folder holds one."""

    recipe: Recipe
    space: tuple[str, ...]
    search: Search
    model_sha256: str | None


@dataclass(frozen=True)
class Trial:
    """One setting of the search."""

    number: int
    setting: Setting
    recipe: Recipe

    @property
    def folder(self) -> str:
        """The name of its run folder."""
        return f"trial-{self.number:03d}"


@dataclass(frozen=True)
class SweepPlan:
    """A checked search."""

    definition: Definition
    axes: tuple[Axis, ...]
    trials: tuple[Trial, ...]
    first: Plan
    """The first trial's plan; all have the same model and data."""


def plan_sweep(request: SweepRequest, log: Log | None = None) -> SweepPlan:
    """Check a request as a whole: every option of every trial; reads no model, writes nothing.

    Raises:
        RequestError: one fault. Problems: all faults.
    """
    axes = parse_axes(request.space)
    owners = _owners(axes, request.recipe)
    search = request.search or ("random" if request.trials or any(a.kind != "values" for a in axes) else "grid")
    settings = _settings(axes, search, request)
    if request.recipe.devices > 1 or ":" in request.recipe.device:
        raise RequestError(
            f"--device {request.recipe.device}: a sweep gives each trial its own device; use --device cuda or auto"
        )
    recipe = _with_full_paths(request.recipe)
    trials: list[Trial] = []
    plans: list[Plan] = []
    problems: dict[str, RequestError] = {}  # by message: many trials share one fault
    for number, setting in enumerate(settings):
        try:
            trial = Trial(number, setting, recipe_of(recipe, setting, owners))
            plans.append(make_plan(trial.recipe, log))
            trials.append(trial)
        except RequestError as error:
            for problem in getattr(error, "problems", (error,)):
                problems.setdefault(str(problem), problem)
    raise_problems(list(problems.values()))
    path = file_of(recipe.model)
    definition = Definition(
        recipe=recipe,
        space=request.space,
        search=search,
        model_sha256=sha256_of(path) if path is not None and path.is_file() else None,
    )
    return SweepPlan(definition, axes, tuple(trials), plans[0])


def _settings(axes: Sequence[Axis], search: Search, request: SweepRequest) -> list[Setting]:
    if search == "random":
        if request.trials is None:
            raise RequestError("a random search needs --trials N")
        return draw_settings(axes, request.trials, request.recipe.seed)
    if request.trials is not None:
        raise RequestError("a grid tries every combination; leave out --trials, or use --search random")
    return grid(axes)


def _with_full_paths(recipe: Recipe) -> Recipe:
    """Name model and data files by their full paths: a sweep may be resumed from another folder."""
    changes: dict[str, str] = {}
    if Path(recipe.model).exists():
        changes["model"] = str(Path(recipe.model).resolve())
    if recipe.data is not None:
        data = DataSpec.parse(recipe.data)
        if data.scheme in FILE_SCHEMES and data.location:
            changes["data"] = str(data.model_copy(update={"location": str(Path(data.location).resolve())}))
    return recipe.model_copy(update=changes)


def _owners(axes: Sequence[Axis], recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Return whose option each axis is: a method's, `train`'s or the run's, and the option's name.

    Raises:
        ConfigError: nobody's, several methods', or fixed by another option. Problems: several.
    """
    known = {use.name: tuple(load_method(use.name).config_type().model_fields) for use in recipe.methods}
    owners: dict[str, tuple[str, str]] = {}
    problems: list[RequestError] = []
    for axis in axes:
        try:
            owners[axis.name] = _owner(axis.name, known)
            _check_free(axis.name, owners[axis.name], recipe)
        except RequestError as error:
            problems.append(error)
    raise_problems(problems)
    return owners


def _owner(name: str, known: dict[str, tuple[str, ...]]) -> tuple[str, str]:
    prefix, _, option = name.rpartition(".")
    places = {**known, TRAIN: TRAIN_FIELDS}
    if prefix and prefix not in places:
        raise ConfigError(f"-s {name}: '{prefix}' is not part of this run{did_you_mean(prefix, places)}")
    if prefix:
        if option not in places[prefix]:
            raise ConfigError(f"-s {name}: {prefix} has no option '{option}'{did_you_mean(option, places[prefix])}")
        return prefix, option
    methods = [method for method, options in known.items() if option in options]
    if len(methods) > 1:
        raise ConfigError(f"-s {name}: say whose, e.g. -s {methods[0]}.{name}=...")
    if methods:
        return methods[0], option
    if option in TRAIN_FIELDS:
        return TRAIN, option
    if option in RUN_FIELDS:
        return RUN, option
    everything = [*(option for options in known.values() for option in options), *TRAIN_FIELDS, *RUN_FIELDS]
    raise ConfigError(f"-s {name}: there is no such option{did_you_mean(option, everything)}")


def _check_free(name: str, owner: tuple[str, str], recipe: Recipe) -> None:
    """Refuse an axis whose option is also fixed: all its trials would be the same."""
    place, option = owner
    if any(use.name == place and option in use.options for use in recipe.methods):
        raise ConfigError(f"-s {name}: -o fixes it too; leave one of them out")
    if place != RUN and getattr(recipe.train, option, None) is not None:
        raise ConfigError(f"-s {name}: --{option.replace('_', '-')} fixes it too; leave one of them out")


def recipe_of(base: Recipe, setting: Setting, owners: dict[str, tuple[str, str]]) -> Recipe:
    """Return the recipe of one setting.

    Raises:
        ConfigError: a training option is out of range. Problems: several. (Methods check their own later.)
    """
    content: dict[str, Any] = base.model_dump(mode="json", exclude_unset=True)
    content["train"] = dict(content.get("train", {}))
    methods = {use.name: dict(use.options) for use in base.methods}
    for name, value in setting.items():
        place, option = owners[name]
        if place in methods:
            methods[place][option] = value
        elif place == TRAIN:
            content["train"][option] = value
        else:
            content[option] = value
    content["methods"] = [{"name": name, "options": options} for name, options in methods.items()]
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise_problems(
            [
                ConfigError(
                    f"-s {fault['loc'][-1]}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r}"
                )
                for fault in error.errors()
            ]
        )
        raise
