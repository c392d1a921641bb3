"""The contract checks: what every plugin must do, whatever its method."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from eff.errors import EffError, InterruptedRunError, PluginError, RequestError
from eff.files import IN_PROGRESS
from eff.log import Log
from eff.method import Sample
from eff.options import check_config
from eff.registry import discover, find, load_method
from eff.schemas import CORE_TRAINING, CheckpointHeader, MethodUse, Recipe, Report, Schema

Check = Callable[[str], None]
CHECKS: dict[str, Check] = {}
_TIMES = ("s", "ms", "us", "samples/s")


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


def _recipe(plugin: str) -> Recipe:
    """Return the smallest run of the plugin: its own sample, or the tiny classifier."""
    from eff.testing.samples import DATA, MODEL

    method_type = load_method(plugin)
    sample = method_type.sample
    if sample is None:
        if not method_type.card.is_for("classification"):
            raise AssertionError("the tiny model is a classifier, this method is for other tasks; set `sample`")
        sample = Sample(model=MODEL, data=DATA)
    use = MethodUse(name=plugin, options=sample.options)
    return Recipe(model=sample.model, data=sample.data, methods=(use,), train=sample.train, device="cpu")


def _run(plugin: str, folder: Path, **changes: Any) -> Report:
    from eff.runner import apply

    return apply(_recipe(plugin).model_copy(update=changes), folder)


def _changes_models(plugin: str) -> bool:
    method_type = load_method(plugin)
    return method_type().trains or hasattr(method_type, "transform")


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
def the_same_seed_gives_the_same_result(plugin: str) -> None:
    """Two runs on the CPU agree bit for bit: weights, and every metric that is no time."""
    import torch

    with tempfile.TemporaryDirectory() as name:
        reports = [_run(plugin, Path(name, str(index))) for index in range(2)]
        values = [
            {key: m.value for key, m in report.after.metrics.values.items() if m.unit not in _TIMES}
            for report in reports
            if report.after is not None
        ]
        assert values[0] == values[1], f"two runs measured different values: {values[0]} and {values[1]}"
        if not _changes_models(plugin):
            assert not Path(name, "0", "model.pt").exists(), "the model was not changed, but model.pt was written"
            return
        states = [torch.load(Path(name, str(i), "model.pt"), weights_only=True)["state_dict"] for i in range(2)]
    assert states[0].keys() == states[1].keys(), "the two runs made different structures"
    different = [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    assert not different, (
        f"differ between two runs: {', '.join(different[:3])}; draw random numbers from torch or run.generator"
    )


@contract
def the_checkpoint_reloads_with_the_same_metrics(plugin: str) -> None:
    """`model.pt` rebuilds the structure without data and gives what the report says."""
    from eff.use import UseRequest, evaluate

    if not _changes_models(plugin):
        raise NotApplicable("the method changes no model")
    with tempfile.TemporaryDirectory() as name:
        report = _run(plugin, Path(name, "run"))
        request = UseRequest(str(Path(name, "run", "model.pt")), device="cpu")
        # A method without a structure of its own is not in the file, so its metrics have to be asked for.
        named = () if hasattr(load_method(plugin), "transform") else report.recipe.methods
        again = evaluate(request, named)
    assert report.after is not None
    for key, metric in report.after.metrics.values.items():
        if metric.unit in _TIMES:
            continue
        found = again.metrics.values.get(key)
        assert found is not None, f"'{key}' is missing after a reload"
        assert abs(found.value - metric.value) <= 1e-4 * max(1.0, abs(metric.value)), (
            f"{key}: {metric.value} in the report, {found.value} after a reload"
        )


@contract
def an_interrupted_run_resumes_to_the_same_weights(plugin: str) -> None:
    """Stopped after the first checkpoint and resumed, the run ends where an uninterrupted one does."""
    import torch

    from eff.runner import apply, resume

    if not load_method(plugin)().trains:
        raise NotApplicable("the method does not train")
    recipe = _recipe(plugin)
    every_step = recipe.model_copy(update={"train": recipe.train.model_copy(update={"checkpoint_every": 1})})
    with tempfile.TemporaryDirectory() as name:
        whole, parts = Path(name, "whole"), Path(name, "parts")
        apply(recipe, whole)
        with contextlib.suppress(InterruptedRunError):
            apply(every_step, parts, log=_StopInTheMiddle())
        if (parts / IN_PROGRESS).exists():  # a run of one step has nothing to interrupt
            resume(parts)
        states = [torch.load(folder / "model.pt", weights_only=True)["state_dict"] for folder in (whole, parts)]
    different = [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    assert not different, f"differ after a resume: {', '.join(different[:3])}; keep what is missing in state_dict"


class _StopInTheMiddle(Log):
    """Ends the run in its second step, when the first has been saved."""

    @contextlib.contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Callable[..., None]]:
        """Give an `advance` that raises as Ctrl-C does."""
        done = 0

        def advance(steps: int = 1, note: str = "") -> None:
            nonlocal done
            done += steps
            if description == "train" and done == 2:
                raise InterruptedRunError("stopped by the contract suite")

        yield advance


@contract
def the_given_model_file_stays_as_it_was(plugin: str) -> None:
    """A run reads its model file and never writes it."""
    from eff.files import sha256_of
    from eff.runner import apply

    recipe = _recipe(plugin)
    with tempfile.TemporaryDirectory() as name:
        path = _as_file(recipe, Path(name))
        before = sha256_of(path)
        apply(recipe.model_copy(update={"model": str(path)}), Path(name, "run"))
        assert sha256_of(path) == before, "the run changed the model file it was given"


def _as_file(recipe: Recipe, folder: Path) -> Path:
    """Write the recipe's model into a checkpoint, untrained."""
    from eff import __version__
    from eff.checkpoint import save_checkpoint
    from eff.models import ModelRequest, open_model
    from eff.session import Plugins

    plugins = Plugins()
    opened = open_model(ModelRequest(recipe.model, data=recipe.data, needs_data=False, needs_task=False), plugins)
    header = CheckpointHeader(eff=__version__, model=opened.spec, task=opened.task.spec, data=recipe.data)
    save_checkpoint(folder / "given.pt", header, opened.model.state_dict())
    return folder / "given.pt"


@contract
def own_exports_are_written(plugin: str) -> None:
    """Each format of the card gives a file with the size and checksum that the report states."""
    from eff.files import sha256_of

    formats = load_method(plugin).card.formats
    if not formats:
        raise NotApplicable("the card lists no formats")
    with tempfile.TemporaryDirectory() as name:
        report = _run(plugin, Path(name, "run"), export=formats)
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
    if not hasattr(method_type, "transform") or not method_type.card.is_for("classification"):
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
