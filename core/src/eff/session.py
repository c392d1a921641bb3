"""The plugins of one run: always-on extensions, the chosen methods, and core's defaults."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

from eff.errors import PluginError, RequestError, check_all, did_you_mean, raise_problems
from eff.hookspecs import PROJECT, Hooks
from eff.options import check_config
from eff.registry import find, import_object, load_extensions, load_method
from eff.schemas import AppliedMethod, MethodUse

if TYPE_CHECKING:
    from pydantic import JsonValue

    from eff.method import Extension, Method

DEFAULT = "eff"


@dataclass(eq=False)
class Chosen:
    """A method that takes part in a run."""

    name: str
    version: str
    distribution: str
    method: Method[Any]

    def applied(self) -> AppliedMethod:
        """Return the record for a checkpoint."""
        return AppliedMethod(
            name=self.name,
            version=self.version,
            distribution=self.distribution,
            config=self.method.config.model_dump(mode="json"),
            structure=self.method.structure,
        )


class Plugins:
    """One run's plugin manager with typed access to what the plugins add.

    Args:
        chosen: the methods of the run.
        extensions: always-on plugins; None loads them.
        replayed: methods that made the model in earlier runs; what cannot be done in one run may follow in another.
    """

    def __init__(
        self,
        chosen: Sequence[Chosen] = (),
        extensions: Sequence[tuple[str, Extension]] | None = None,
        replayed: Sequence[Chosen] = (),
    ):
        from eff.defaults import Defaults

        self.chosen = (*replayed, *chosen)
        self.broken: list[str] = []
        if extensions is None:
            extensions, broken = load_extensions()
            self.broken = [f"extension '{row.name}' left out: {row.reason}" for row in broken]
        self.extensions = tuple(extensions)
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(Hooks)
        for _, extension in self.extensions:
            for target in extension.hookspecs:
                self.manager.add_hookspecs(import_object(target, "hook specifications"))
        self.manager.register(Defaults(), DEFAULT)  # first, so that pluggy asks it last
        for name, extension in self.extensions:
            self.manager.register(extension, f"extension:{name}")
        names = [item.name for item in self.chosen]
        raise_problems(
            [
                PluginError(f"{name} is named twice; a method is applied once")
                for name in sorted({*names})
                if names.count(name) > 1
            ]
        )
        for item in self.chosen:
            self.manager.register(item.method, item.name)
        try:
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"{error.plugin}: {str(error).splitlines()[0]}") from error
        self._check_conflicts(chosen)

    @property
    def structural(self) -> tuple[Chosen, ...]:
        """The chosen methods that change the model's structure; only these are needed to reload it."""
        return tuple(item for item in self.chosen if hasattr(item.method, "transform"))

    @property
    def hook(self) -> Any:
        """The hook callers of this run."""
        return self.manager.hook

    def _check_conflicts(self, chosen: Sequence[Chosen]) -> None:
        problems: list[RequestError] = []
        names = [item.name for item in chosen]
        for hook in ("build_model", "train_step"):
            providers = [
                impl.plugin_name
                for impl in getattr(self.hook, hook).get_hookimpls()
                if not impl.wrapper
                and not impl.hookwrapper
                and (impl.plugin_name in names or (hook == "train_step" and impl.plugin_name.startswith("extension:")))
            ]
            if len(providers) > 1:
                problems.append(PluginError(f"{' and '.join(sorted(providers))} both provide {hook}; use one of them"))
        problems += _taken_twice([(name, extension.schemes) for name, extension in self.extensions], "model source")
        conflicts: dict[frozenset[str], RequestError] = {}
        for item in chosen[::-1]:
            for other in names:
                pair = frozenset((item.name, other))
                if len(pair) == 2 and any(_matches(other, rule) for rule in item.method.card.conflicts_with):
                    conflicts[pair] = PluginError(
                        f"{item.name} and {other} cannot be used in one run: {item.name} conflicts with {other}"
                    )
        formats = [(item.name, item.method.card.formats) for item in self.chosen]
        problems += conflicts.values() or _taken_twice(formats, "export format")  # a conflict says it already
        raise_problems(problems)

    def added(self, kind: str) -> dict[str, str]:
        """Return what all extensions add under one attribute (tasks, data_sources, ...).

        Raises:
            PluginError: two extensions add the same name.
        """
        found: dict[str, str] = {}
        raise_problems(
            _taken_twice([(name, tuple(getattr(extension, kind))) for name, extension in self.extensions], kind)
        )
        for _, extension in self.extensions:
            found |= getattr(extension, kind)
        return found

    def look_up(self, kind: str, name: str, built_in: dict[str, Any]) -> Any:
        """Return the object called `name`, from core or an extension.

        Raises:
            RequestError: nobody has it; near matches and all names are given.
        """
        if name in built_in:
            return built_in[name]
        added = self.added(kind)
        if name in added:
            return import_object(added[name], f"{kind[:-1]} '{name}'")
        known = sorted({*built_in, *added})
        raise RequestError(
            f"there is no {kind[:-1].replace('_', ' ')} '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}"
        )

    def export_formats(self) -> tuple[str, ...]:
        """Return all formats that this run can write."""
        from eff.defaults import FORMATS

        own = [name for item in self.chosen for name in item.method.card.formats]
        return (*own, *(name for name in FORMATS if name not in own))


def _matches(name: str, rule: str) -> bool:
    return name.startswith(rule[:-1]) if rule.endswith("*") else name == rule


def _taken_twice(owners: Sequence[tuple[str, Sequence[str]]], what: str) -> list[RequestError]:
    taken: dict[str, str] = {}
    problems: list[RequestError] = []
    for owner, names in owners:
        for name in names:
            if name in taken:
                problems.append(
                    PluginError(f"{taken[name]} and {owner} both provide the {what} '{name}'; use one of them")
                )
            taken[name] = owner
    return problems


def choose(uses: Sequence[MethodUse]) -> list[Chosen]:
    """Return the methods with their checked configurations, in the given order.

    Raises:
        PluginError, ConfigError: one fault. Problems: all faults of all methods together.
    """
    return check_all(*(functools.partial(make_chosen, use.name, use.options) for use in uses))


def choose_applied(methods: Sequence[AppliedMethod]) -> list[Chosen]:
    """Return the methods of a checkpoint, as they were applied.

    Raises:
        PluginError: one is not installed (its distribution is named). Problems: several.
    """
    return check_all(*(functools.partial(_choose_one_applied, item) for item in methods))


def _choose_one_applied(item: AppliedMethod) -> Chosen:
    try:
        chosen = make_chosen(item.name, item.config)
    except PluginError as error:
        raise PluginError(
            f"the model was changed by {item.name} {item.version}: {error}"
            + ("" if "pip install" in str(error) else f" (pip install {item.distribution})")
        ) from error
    chosen.method.structure = dict(item.structure)
    return chosen


def make_chosen(name: str, options: dict[str, JsonValue]) -> Chosen:
    """Return one method with its checked configuration.

    Raises:
        PluginError: not installed or broken. ConfigError, Problems: wrong options.
    """
    row = find(name)
    method_type = load_method(name)
    config = check_config(name, method_type.config_type(), options)
    return Chosen(name, row.version, row.distribution, method_type(config))
