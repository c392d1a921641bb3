"""A run from recipe to report: resolve, measure, transform, train, evaluate, export."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import nn

import eff
from eff.checkpoint import save_checkpoint
from eff.errors import DataError, PluginError, RequestError, did_you_mean, raise_problems
from eff.exporting import export, file_name, make_header
from eff.files import IN_PROGRESS, check_output_folder, check_space, describe_artifact, make_output_folder, write_text
from eff.log import Log
from eff.measure import measure
from eff.models import ModelRequest, OpenModel, file_of, open_model
from eff.run import Run
from eff.schemas import (
    CORE_TRAINING,
    Artifact,
    Measurement,
    MethodUse,
    Recipe,
    Report,
    TrainingSummary,
    TrainOptions,
)
from eff.seeding import make_deterministic, seed_everything
from eff.session import Chosen, Plugins, choose
from eff.training import OPTIMIZERS, STATE_FILE, Training, read_resume_file

RECIPE_FILE = "recipe.yaml"
REPORT_FILE = "report.json"
MODEL_FILE = "model.pt"


@dataclass(frozen=True)
class Plan:
    """A recipe with everything resolved that can be without opening the model."""

    recipe: Recipe
    chosen: tuple[Chosen, ...]
    plugins: Plugins
    train: TrainOptions
    trains: bool
    formats: tuple[str, ...]
    device: torch.device

    def steps(self) -> list[str]:
        """Return the plan in words, for `--dry-run`."""
        steps = [f"open {self.recipe.model}" + (f" as {self.recipe.arch}" if self.recipe.arch else "")]
        steps += [f"transform with {item.name} {item.version}" for item in self.chosen]
        if self.trains:
            train = self.train
            steps.append(
                f"train {train.epochs} epochs, batches of {train.batch_size}, {train.optimizer}, lr {train.lr}, {train.schedule}"
            )
        steps.append("measure before and after")
        steps.append(
            "write " + ", ".join([MODEL_FILE, *(file_name(name) for name in self.formats), REPORT_FILE, RECIPE_FILE])
        )
        return steps


def make_plan(recipe: Recipe, log: Log | None = None) -> Plan:
    """Check a recipe and resolve what it leaves open; reads no model, writes nothing.

    Raises:
        RequestError: one fault. Problems: all faults that can be seen at once.
    """
    problems: list[RequestError] = []
    chosen: list[Chosen] = []
    try:
        chosen = choose(recipe.methods)
    except RequestError as error:
        problems += getattr(error, "problems", (error,))
    device = torch.device("cpu")
    try:
        device = resolve_device(recipe.device)
    except RequestError as error:
        problems.append(error)
    raise_problems(problems)
    plugins = Plugins(chosen)
    for warning in plugins.broken:
        (log or Log()).warn(warning)
    train = CORE_TRAINING
    for item in chosen:
        train = item.method.training().over(train)
    train = recipe.train.over(train)
    trains = bool(train.epochs) and (not chosen or any(item.method.card.trains for item in chosen))
    plugins.look_up("optimizers", train.optimizer or "sgd", OPTIMIZERS)
    formats = (
        recipe.export
        if recipe.export is not None
        else tuple(item.method.card.formats[0] for item in chosen if item.method.card.formats)
    )
    known = plugins.export_formats()
    for name in formats:
        if name not in known:
            problems.append(
                RequestError(
                    f"nothing in this run writes '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}"
                )
            )
    raise_problems(problems)
    return Plan(recipe, tuple(chosen), plugins, train, trains, tuple(dict.fromkeys(formats)), device)


def resolve_device(name: str) -> torch.device:
    """Return the device; "auto" takes an accelerator where there is one.

    Raises:
        RequestError: no such device here.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RequestError(
            f"device '{name}' cannot be used: {str(error).splitlines()[0]}; use --device cpu or auto"
        ) from error
    return device


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from YAML.

    Raises:
        RequestError: missing, no YAML, or a field is wrong (all are named).
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Recipe.model_validate(content)
    except OSError as error:
        raise RequestError(f"recipe {path}: {error.strerror}; name an existing recipe.yaml") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"recipe {path}: is no YAML ({str(error).splitlines()[0]})") from error
    except ValidationError as error:
        faults: list[RequestError] = []
        for fault in error.errors():
            name = ".".join(str(part) for part in fault["loc"])
            hint = (
                did_you_mean(name.rpartition(".")[2], [*Recipe.model_fields, *TrainOptions.model_fields])
                if fault["type"] == "extra_forbidden"
                else ""
            )
            faults.append(RequestError(f"recipe {path}: {name}: {fault['msg'].lower()}{hint}"))
        raise_problems(faults)
        raise


def recipe_text(recipe: Recipe) -> str:
    """Return a recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def apply(recipe: Recipe, out: Path, *, force: bool = False, log: Log | None = None) -> Report:
    """Run a recipe and write model, exports, report and recipe into `out`.

    With no methods in the recipe this trains a plain model.

    Args:
        recipe: what to do.
        out: run folder; new, empty, or replaced with `force`.
        force: replace the results of an earlier run.
        log: where messages and progress go.

    Raises:
        RequestError: something asked for is wrong; nothing was written.
        RunError: the work failed; what is resumable stays in `out`.
    """
    log = log or Log()
    check_output_folder(out, force)
    plan = make_plan(recipe, log)
    return _Execution(plan, out, log).run_all(None)


def resume(folder: Path, *, log: Log | None = None) -> Report:
    """Go on with an interrupted run; the result equals that of an uninterrupted one.

    Raises:
        RequestError: `folder` holds no unfinished run.
    """
    log = log or Log()
    if not (folder / RECIPE_FILE).exists():
        raise RequestError(f"{folder}: holds no run to resume ({RECIPE_FILE} is missing)")
    if not (folder / IN_PROGRESS).exists():
        raise RequestError(f"{folder}: this run is finished; start a new one with another --out")
    state = read_resume_file(folder)
    plan = make_plan(read_recipe(folder / RECIPE_FILE), log)
    return _Execution(plan, folder, log).run_all(state)


class _Execution:
    """The state of one run while it goes on."""

    def __init__(self, plan: Plan, out: Path, log: Log):
        self.plan = plan
        self.out = out
        self.log = log
        self.started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.clock = time.monotonic()

    def run_all(self, state: dict[str, Any] | None) -> Report:
        """Do everything; `state` is what an interrupted run left."""
        plan = self.plan
        if plan.device.type == "cpu":
            make_deterministic()
        opened = self._open()
        run = self._make_run(opened)
        self.log.info(f"measure {plan.recipe.model}")
        before = (
            measure(opened.model, run, plan.plugins, opened.file_bytes)
            if opened.file_bytes is not None or plan.chosen
            else None
        )
        check_space(self.out, 4 * _bytes_of(opened.model))
        model = self._transform(opened, run, state)
        training = Training(model, run, plan.plugins) if plan.trains else None
        self._begin(opened)
        summary = self._train(training, state)
        run.training = False
        model = training.raw_model if training else model
        return self._finish(model, run, opened, before, summary)

    def _open(self) -> OpenModel:
        recipe = self.plan.recipe
        request = ModelRequest(
            recipe.model, recipe.arch, recipe.data, recipe.task, recipe.trust_pickle, self.plan.device, recipe.seed
        )
        opened = open_model(request, self.plan.plugins, self.log)
        names = [item.name for item in opened.applied]
        for item in self.plan.chosen:
            if item.name in names:
                raise PluginError(
                    f"{recipe.model}: {item.name} has already been applied; start from the model before it"
                )
            for rule in item.method.card.conflicts_with:
                if clash := [
                    name for name in names if name == rule or (rule.endswith("*") and name.startswith(rule[:-1]))
                ]:
                    raise PluginError(
                        f"{recipe.model}: {item.name} conflicts with {clash[0]}, which has been applied to it"
                    )
            if opened.task.name not in item.method.card.tasks:
                raise RequestError(
                    f"{item.name} is for {', '.join(item.method.card.tasks)}, the model's task is {opened.task.name}"
                )
        if self.plan.trains and opened.data is not None and opened.data.train is None:
            raise DataError(f"data '{opened.data.spec}' has no train split; use other data or --epochs 0")
        return opened

    def _make_run(self, opened: OpenModel) -> Run:
        chosen = (*opened.applied, *self.plan.chosen)
        done = len(opened.applied)
        run = Run(
            task=opened.task,
            device=self.plan.device,
            seed=self.plan.recipe.seed,
            data=opened.data,
            model_spec=opened.spec,
            train=self.plan.train,
            precision=self.plan.recipe.precision,
            folder=self.out,
            log=self.log,
            training=self.plan.trains,
        )
        run.applied = lambda: tuple(item.applied() for item in chosen[: done + len(self.plan.chosen)])
        return run

    def _transform(self, opened: OpenModel, run: Run, state: dict[str, Any] | None) -> nn.Module:
        model = opened.model
        run.restoring = state is not None
        for item in self.plan.chosen:
            self.log.info(f"apply {item.name}")
            if state is not None:
                item.method.structure = dict(state["structure"].get(item.name, {}))
            if not hasattr(item.method, "transform"):
                continue
            seed_everything(run.seed, f"transform/{item.name}")
            changed = item.method.transform(model=model, run=run)
            if not isinstance(changed, nn.Module):
                raise PluginError(
                    f"{item.name}: transform returned {type(changed).__name__}; it must return the module"
                )
            model = changed.to(run.device)
        run.restoring = False
        return model

    def _begin(self, opened: OpenModel) -> None:
        """Write the first files; everything that can be wrong with the request has been checked."""
        make_output_folder(self.out)
        recipe = self.plan.recipe
        path = Path(recipe.model)
        if path.exists():
            recipe = recipe.model_copy(update={"model": str(path.resolve())})
        write_text(self.out / IN_PROGRESS, f"started {self.started}\n")
        write_text(self.out / RECIPE_FILE, recipe_text(recipe))

    def _train(self, training: Training | None, state: dict[str, Any] | None) -> TrainingSummary | None:
        if training is None:
            return None
        if state is not None:
            training.load(state)
            self.log.info(f"resume at step {training.done} of {training.total}")
        return training.run_all()

    def _finish(
        self, model: nn.Module, run: Run, opened: OpenModel, before: Measurement | None, summary: TrainingSummary | None
    ) -> Report:
        model.eval()
        path = self.out / MODEL_FILE
        save_checkpoint(path, make_header(run), model.state_dict())
        artifacts = [describe_artifact(path, "checkpoint")]
        for name in self.plan.formats:
            self.log.info(f"export {name}")
            artifacts.append(export(model, name, self.out, run, self.plan.plugins))
        shipped = next((item.bytes for item in artifacts if item.format in self._own_formats()), artifacts[0].bytes)
        self.log.info("measure the result")
        after = measure(model, run, self.plan.plugins, shipped)
        report = self._report(opened, run, before, after, summary, artifacts)
        write_text(self.out / REPORT_FILE, report.model_dump_json(indent=2))
        (self.out / STATE_FILE).unlink(missing_ok=True)
        (self.out / IN_PROGRESS).unlink(missing_ok=True)
        return report

    def _own_formats(self) -> set[str]:
        return {name for item in self.plan.chosen for name in item.method.card.formats}

    def _report(
        self,
        opened: OpenModel,
        run: Run,
        before: Measurement | None,
        after: Measurement,
        summary: TrainingSummary | None,
        artifacts: Sequence[Artifact],
    ) -> Report:
        relative = tuple(item.model_copy(update={"path": item.path.relative_to(self.out)}) for item in artifacts)
        return Report(
            recipe=self.plan.recipe.model_copy(update={"train": self.plan.train}),
            methods=run.applied(),
            before=before,
            after=after,
            training=summary,
            artifacts=relative,
            warnings=tuple(self.log.warnings),
            seed=run.seed,
            device=_device_name(run.device),
            data=str(opened.data.spec) if opened.data else None,
            data_fingerprint=opened.data.fingerprint() if opened.data else None,
            versions=versions(self.plan.plugins),
            started=self.started,
            seconds=time.monotonic() - self.clock,
        )


def versions(plugins: Plugins) -> dict[str, str]:
    """Return the versions of Python, core, the libraries that decide numbers, and every plugin used."""
    import accelerate
    import numpy

    found = {
        "python": platform.python_version(),
        "eff-core": eff.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "accelerate": accelerate.__version__,
    }
    return found | {item.distribution: item.version for item in plugins.chosen}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _bytes_of(model: nn.Module) -> int:
    from eff.measure import state_bytes

    return state_bytes(model)


def default_out(model: str, methods: Sequence[MethodUse]) -> Path:
    """Return the run folder where none was named, e.g. `digits-quant_lsq`, in the current folder."""
    path = Path(model)
    if file_of(model) is None:
        stem = model.partition("?")[0].rpartition(":")[2]
    elif path.is_dir() or path.stem != "model":
        stem = path.stem
    else:
        stem = path.resolve().parent.name
    return Path("-".join([stem or "model", *(use.name for use in methods)]))
