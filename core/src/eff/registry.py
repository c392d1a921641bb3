"""Finding plugins in installed metadata, and loading one by name.

Discovery imports neither torch nor pydantic nor any plugin: name, family, version, summary and
whether plugin and core fit all stand in the distributions' metadata.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import importlib_metadata

import eff
from eff.errors import PluginError, did_you_mean

if TYPE_CHECKING:
    from eff.method import Extension, Method

METHODS = "eff.plugins"
EXTENSIONS = "eff.extensions"
COMMANDS = "eff.commands"
CONTRACT = 1  # hookspecs.CONTRACT without importing pluggy; a test holds them equal

FAMILIES = {
    "quant": "quantization",
    "adv": "adversarial attack and defence",
    "restore": "image and video restoration",
    "fl": "federated and distributed training",
    "nas": "architecture search",
    "prune": "pruning",
    "peft": "parameter-efficient tuning",
    "codec": "learned compression",
    "arch": "network blocks and backbones",
    "gen": "efficient generation",
    "train": "optimisers and losses",
    "eval": "analysis and benchmarks",
}
SHIPPED = (
    "adv_pma",
    "eval_filter_db",
    "fl_fedspeed",
    "nas_tangle",
    "peft_paca",
    "quant_adapt",
    "quant_adaquant",
    "quant_biadapter",
    "quant_codenet",
    "quant_dfp",
    "quant_double_rounding",
    "quant_efficientdm",
    "quant_emq",
    "quant_fliqs",
    "quant_gaqat",
    "quant_gradptq",
    "quant_hawqv3",
    "quant_lr2vq",
    "quant_lsq",
    "quant_quest",
    "quant_vq4dit",
    "quant_vqgan_lc",
    "quant_zipcache",
    "restore_deanet",
    "train_adamp",
)
"""Methods of this repository, to suggest where one is not installed; a test keeps it complete."""


@dataclass(frozen=True)
class Listed:
    """One entry point as the metadata describe it."""

    name: str
    family: str
    group: str
    version: str
    summary: str
    distribution: str
    target: str
    status: str
    """"ok" or "broken"; "ok" says that the metadata fit, the import has not been tried."""
    reason: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the fields for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Distribution:
    """What discovery needs of one distribution that has eff's entry points."""

    points: tuple[importlib_metadata.EntryPoint, ...]
    name: str = "unknown"
    version: str = "0"
    summary: str = ""
    keywords: str = ""
    requires: list[str] = field(default_factory=list)


@functools.cache
def _distributions() -> tuple[_Distribution, ...]:
    """Return the distributions with entry points of eff, the first of each name as Python would import it.

    Others are left at a look into their entry_points.txt, and of the metadata only the headers are read:
    `importlib_metadata.entry_points` and `Distribution.metadata` parse everything, which takes several times as long.
    """
    found: dict[str, _Distribution] = {}
    for distribution in importlib_metadata.distributions():
        text = distribution.read_text("entry_points.txt")
        if not text or "[eff." not in text:
            continue
        points = tuple(point for point in distribution.entry_points if point.group.startswith("eff."))
        made = _read_headers(distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "", points)
        found.setdefault(re.sub(r"[-_.]+", "-", made.name).lower(), made)
    return tuple(found.values())


def _read_headers(metadata: str, points: tuple[importlib_metadata.EntryPoint, ...]) -> _Distribution:
    values: dict[str, str] = {}
    requires: list[str] = []
    for line in metadata.splitlines():
        if not line:  # the description follows
            break
        key, _, value = line.partition(": ")
        if key == "Requires-Dist":
            requires.append(value)
        elif key in ("Name", "Version", "Summary", "Keywords"):
            values[key.lower()] = value
    return _Distribution(points, **values, requires=requires)


def forget_discovered() -> None:
    """Read the metadata afresh next time, e.g. after an installation in this process."""
    _distributions.cache_clear()


def discover(group: str = METHODS) -> list[Listed]:
    """Return every plugin of a group, sorted by name; broken ones carry the reason."""
    points = [(point, owner) for owner in _distributions() for point in owner.points if point.group == group]
    owners: dict[str, list[str]] = {}
    for point, owner in points:
        owners.setdefault(point.name, []).append(owner.name)
    return sorted(
        (_describe(point, owner, owners[point.name]) for point, owner in points),
        key=lambda row: (row.name, row.distribution),
    )


def _describe(point: importlib_metadata.EntryPoint, owner: _Distribution, owners: list[str]) -> Listed:
    reason = _misfit(point.name, owner.name, owner.keywords, owner.requires, point.group)
    if len(owners) > 1:
        others = ", ".join(sorted(set(owners)))
        reason = f"the name is taken by several distributions ({others}); uninstall all but one"
    return Listed(
        name=point.name,
        family=point.name.partition("_")[0],
        group=point.group,
        version=owner.version,
        summary=owner.summary,
        distribution=owner.name,
        target=point.value,
        status="broken" if reason else "ok",
        reason=reason,
    )


def _misfit(plugin: str, distribution: str, keywords: str, requires: Iterable[str], group: str) -> str:
    """Return why this plugin does not fit this core by its metadata, or an empty string."""
    if group == METHODS and not re.fullmatch(r"[a-z]+_[a-z0-9_]+", plugin):
        return f"name '{plugin}' is not <family>_<method> in lower case"
    contracts = [int(found) for found in re.findall(r"\beff-api-(\d+)\b", keywords)]
    if not contracts:
        return f"states no contract; add the keyword eff-api-{CONTRACT} to the pyproject.toml of {distribution}"
    if CONTRACT not in contracts:
        return (
            f"speaks contract {contracts[0]}, this eff-core {eff.__version__} speaks {CONTRACT}; update {distribution}"
        )
    for line in requires:
        if re.match(r"eff[-_.]core\b", line, re.IGNORECASE) and (range_ := _range_without_us(line)):
            return f"needs eff-core{range_}, this is {eff.__version__}; update {distribution} or eff-core"
    return ""


@functools.cache
def _range_without_us(requirement: str) -> str:
    """Return the versions of eff-core that a requirement names where this one is not among them, else an empty string."""
    # The usual range is read here: `packaging` takes a tenth of `list-plugins` to import.
    usual = re.fullmatch(r"eff[-_.]core ?>=([\d.]*\d), ?<([\d.]*\d)", requirement)
    if usual and re.fullmatch(r"[\d.]*\d", eff.__version__):
        low, ours, high = ([int(part) for part in text.split(".")] for text in (usual[1], eff.__version__, usual[2]))
        if low <= ours < high:
            return ""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement).specifier
    return "" if wanted.contains(eff.__version__, prereleases=True) else str(wanted)


def find(name: str, group: str = METHODS) -> Listed:
    """Return the installed plugin `name`.

    Raises:
        PluginError: it is not installed (with near matches and the install command), or broken.
    """
    rows = discover(group)
    for row in rows:
        if row.name == name:
            if row.status == "broken":
                raise PluginError(f"plugin '{name}' cannot be used: {row.reason}")
            return row
    if name in SHIPPED:
        raise PluginError(f"plugin '{name}' is not installed; pip install {distribution_name(name)}")
    installed = [row.name for row in rows]
    if hint := did_you_mean(name, installed):
        raise PluginError(f"plugin '{name}' is not installed{hint}")
    if hint := did_you_mean(name, SHIPPED):
        near = hint.split("'")[1]
        raise PluginError(f"plugin '{name}' is not installed{hint} (pip install {distribution_name(near)})")
    raise PluginError(f"plugin '{name}' is not installed; eff list-plugins shows what is")


def distribution_name(plugin: str) -> str:
    """Return the distribution that ships a plugin of this repository, e.g. eff-quant-lsq."""
    return "eff-" + plugin.replace("_", "-")


def load_method(name: str) -> type[Method[Any]]:
    """Import the method `name` and check it against the contract.

    Raises:
        PluginError: not installed, does not import, or breaks the contract; one line each.
    """
    from eff.contract import check_method

    row = find(name)
    return check_method(name, _import_target(row))


def load_extensions() -> tuple[list[tuple[str, Extension]], list[Listed]]:
    """Import all extensions; a broken one is left out and returned with its reason."""
    from dataclasses import replace

    from eff.contract import check_extension

    good: list[tuple[str, Extension]] = []
    broken: list[Listed] = []
    for row in discover(EXTENSIONS):
        try:
            if row.status == "broken":
                raise PluginError(row.reason)
            good.append((row.name, check_extension(row.name, _import_target(row))()))
        except PluginError as error:
            broken.append(replace(row, status="broken", reason=str(error)))
    return good, broken


def _import_target(row: Listed) -> Any:
    module, _, attribute = row.target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a plugin may raise anything when it is imported
        raise PluginError(
            f"plugin '{row.name}' does not import: {type(error).__name__}: {_first_line(error)}; "
            f"reinstall or uninstall {row.distribution}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def import_object(target: str, purpose: str) -> Any:
    """Return what "package.module:attribute" names.

    Raises:
        PluginError: it cannot be imported; the message starts with `purpose`.
    """
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs foreign code
        raise PluginError(f"{purpose}: cannot import {target}: {type(error).__name__}: {_first_line(error)}") from error
