"""The contract checks: what every plugin must do, whatever its method."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from eff.errors import EffError, PluginError, RequestError
from eff.options import check_config
from eff.registry import discover, find, load_method
from eff.schemas import CORE_TRAINING, MethodUse, Recipe, Report, Schema, TrainOptions

Check = Callable[[str], None]
CHECKS: dict[str, Check] = {}


class CheckOutcome(Schema):
    """What came of one check."""

    name: str
    state: Literal["passed", "failed", "skipped"]
    detail: str = ""


class NotApplicable(Exception):
    """This check has nothing to check in this plugin."""


def contract(function: Check) -> Check:
    """Register a check under its name in words."""
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


def run_check(name: str, plugin: str) -> CheckOutcome:
    """Run one check on one installed method."""
    try:
        CHECKS[name](plugin)
    except NotApplicable as reason:
        return CheckOutcome(name=name, state="skipped", detail=str(reason))
    except (AssertionError, EffError) as error:
        return CheckOutcome(name=name, state="failed", detail=str(error) or type(error).__name__)
    except Exception as error:  # anything else a plugin raises is a failure too
        return CheckOutcome(name=name, state="failed", detail=f"{type(error).__name__}: {error}")
    return CheckOutcome(name=name, state="passed")


def check_plugin(plugin: str) -> list[CheckOutcome]:
    """Run all checks on one installed method."""
    return [run_check(name, plugin) for name in CHECKS]


def plugin_at(text: str) -> str:
    """Return the method's name for a name or a package folder.

    Raises:
        PluginError: the folder holds no plugin package, or it is not installed.
    """
    folder = Path(text)
    if not folder.is_dir():
        return find(text).name
    packaging = folder / "pyproject.toml"
    if not packaging.exists():
        raise PluginError(f"{folder}: has no pyproject.toml; name the folder of a plugin package")
    project = _read_toml(packaging).get("project", {})
    names = list(project.get("entry-points", {}).get("eff.plugins", {}))
    if len(names) != 1:
        raise PluginError(f'{packaging}: names {len(names)} plugins under entry-points."eff.plugins"; it must name one')
    if names[0] not in {row.name for row in discover()}:
        raise PluginError(f"plugin '{names[0]}' is not installed; pip install -e {folder}")
    return str(names[0])


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # the standard library has it from 3.11 on
        import tomli as tomllib
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _tiny_recipe(plugin: str, epochs: int = 1) -> Recipe:
    from eff.testing.samples import DATA, MODEL

    if "classification" not in load_method(plugin).card.tasks:
        raise NotApplicable("the tiny model is a classifier; this method is for other tasks")
    options = TrainOptions(epochs=epochs, batch_size=64)
    return Recipe(model=MODEL, data=DATA, methods=(MethodUse(name=plugin),), train=options, device="cpu")


def _run(plugin: str, folder: Path) -> Report:
    from eff.runner import apply

    return apply(_tiny_recipe(plugin), folder)


@contract
def listing_and_import_need_no_torch(plugin: str) -> None:
    """plugin.py and config.py import no torch."""
    target = find(plugin).target.partition(":")[0]
    code = f"import sys, {target}; sys.exit(3 if 'torch' in sys.modules else 0)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode != 3, f"importing {target} imports torch; import it inside the hooks"
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


@contract
def options_survive_a_round_trip(plugin: str) -> None:
    """Configuration -> JSON -> configuration."""
    config_type = load_method(plugin).config_type()
    config = config_type()
    again = config_type.model_validate(json.loads(config.model_dump_json()))
    assert again == config, f"{config} became {again}"


@contract
def every_option_is_described(plugin: str) -> None:
    """The tables in `eff info` and the README are made from the descriptions."""
    bare = [name for name, field in load_method(plugin).config_type().model_fields.items() if not field.description]
    assert not bare, f"no description: {', '.join(bare)}; add Field(description=...)"


@contract
def an_unknown_option_is_refused(plugin: str) -> None:
    """MethodConfig does this; a plugin that loosens it fails here."""
    try:
        check_config(plugin, load_method(plugin).config_type(), {"surely_no_option": 1})
    except RequestError:
        return
    raise AssertionError("an unknown option was accepted; derive the options from eff.method.MethodConfig")


@contract
def the_same_seed_gives_the_same_weights(plugin: str) -> None:
    """Two runs on the CPU agree bit for bit."""
    import torch

    with tempfile.TemporaryDirectory() as name:
        states = []
        for index in range(2):
            folder = Path(name, str(index))
            _run(plugin, folder)
            states.append(torch.load(folder / "model.pt", weights_only=True)["state_dict"])
    assert states[0].keys() == states[1].keys(), "the two runs made different structures"
    different = [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    assert not different, (
        f"differ between two runs: {', '.join(different[:3])}; draw random numbers from torch or run.generator"
    )


@contract
def the_checkpoint_reloads_with_the_same_metrics(plugin: str) -> None:
    """`model.pt` rebuilds the structure without data and gives what the report says."""
    from eff.use import UseRequest, evaluate

    with tempfile.TemporaryDirectory() as name:
        report = _run(plugin, Path(name, "run"))
        again = evaluate(UseRequest(str(Path(name, "run", "model.pt")), device="cpu"))
    assert report.after is not None
    for key, metric in report.after.metrics.values.items():
        found = again.metrics.values.get(key)
        assert found is not None, f"'{key}' is missing after a reload"
        assert abs(found.value - metric.value) <= 1e-4 * max(1.0, abs(metric.value)), (
            f"{key}: {metric.value} in the report, {found.value} after a reload"
        )


@contract
def own_exports_are_written(plugin: str) -> None:
    """Each format of the card gives a file with the size and checksum that the report states."""
    from eff.files import sha256_of
    from eff.runner import apply

    formats = load_method(plugin).card.formats
    if not formats:
        raise NotApplicable("the card lists no formats")
    with tempfile.TemporaryDirectory() as name:
        report = apply(_tiny_recipe(plugin, 0).model_copy(update={"export": formats}), Path(name, "run"))
        for artifact in report.artifacts:
            path = Path(name, "run") / artifact.path
            assert path.stat().st_size == artifact.bytes, f"{artifact.format}: the size in the report is wrong"
            assert sha256_of(path) == artifact.sha256, f"{artifact.format}: the checksum in the report is wrong"


@contract
def a_model_it_cannot_change_is_refused_or_left(plugin: str) -> None:
    """A module without layers gives eff's own error, or comes back unchanged."""
    import torch
    from torch import nn

    from eff.run import Run
    from eff.schemas import DataSpec
    from eff.tasks import Classification, ClassificationOptions
    from eff.testing.samples import DATA, blobs

    method_type = load_method(plugin)
    if not hasattr(method_type, "transform") or "classification" not in method_type.card.tasks:
        raise NotApplicable("the method does not transform classifiers")
    options = ClassificationOptions(input_shape=(1, 8, 8), classes=("a", "b", "c", "d"))
    run = Run(Classification(options), torch.device("cpu"), data=blobs(DataSpec.parse(DATA)), train=CORE_TRAINING)
    try:
        changed = method_type().transform(model=nn.Flatten(), run=run)  # type: ignore[attr-defined]
    except EffError as error:
        assert len(str(error).splitlines()) == 1, f"the error has several lines: {error}"
        return
    assert isinstance(changed, nn.Module), f"transform returned {type(changed).__name__}"


@contract
def claims_name_functions_that_exist(plugin: str) -> None:
    """Each claim's function can be imported."""
    from eff.registry import import_object

    claims = load_method(plugin).claims
    if not claims:
        raise NotApplicable("the method states no claim")
    for claim in claims:
        assert callable(import_object(claim.run, f"claim '{claim.id}'")), f"{claim.run} is not callable"
