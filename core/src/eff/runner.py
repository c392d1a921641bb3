"""A run from recipe to report: resolve, measure, transform, train, evaluate, export."""

from __future__ import annotations

import datetime
import os
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
from eff import distributed
from eff.beginning import beginning_of, check_same_beginning
from eff.checkpoint import check_model_file, save_checkpoint
from eff.data.loading import check_source
from eff.errors import DataError, PluginError, RequestError, check_all, did_you_mean, raise_problems
from eff.exporting import export, file_name, make_header
from eff.files import (
    IN_PROGRESS,
    MODEL_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    STATE_FILE,
    check_output_folder,
    check_space,
    describe_artifact,
    make_output_folder,
    write_text,
)
from eff.log import Log
from eff.measure import measure, peak_memory, reset_peak_memory
from eff.models import ModelRequest, OpenModel, file_of, open_model
from eff.run import Run
from eff.schemas import (
    CORE_TRAINING,
    Artifact,
    DataSpec,
    Measurement,
    MethodUse,
    Recipe,
    Report,
    TrainingSummary,
    TrainOptions,
)
from eff.seeding import make_deterministic, seed_everything
from eff.session import Chosen, Plugins, choose
from eff.training import Training, optimizer_of, read_resume_file


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

    @property
    def changes(self) -> bool:
        """Whether there will be another model; otherwise the one given is only measured."""
        return self.trains or not self.chosen or bool(self.plugins.structural)

    @property
    def needs_data(self) -> bool:
        """Whether the run cannot do without data."""
        return self.trains or not self.chosen or any(item.method.card.needs_data for item in self.chosen)

    def steps(self) -> list[str]:
        """Return the plan in words, for `--dry-run`."""
        steps = [f"open {self.recipe.model}" + (f" as {self.recipe.arch}" if self.recipe.arch else "")]
        steps += [f"{self._verb(item)} {item.name} {item.version}" for item in self.chosen]
        if not self.changes:
            return [*steps, f"write {REPORT_FILE}, {RECIPE_FILE} and the methods' files"]
        if self.trains:
            train = self.train
            steps.append(
                f"train {train.epochs} epochs, batches of {train.batch_size}, {train.optimizer}, lr {train.lr}, {train.schedule}"
                + (f", on {self.recipe.devices} devices" if self.recipe.devices > 1 else "")
            )
        steps.append("measure before and after")
        steps.append(
            "write " + ", ".join([MODEL_FILE, *(file_name(name) for name in self.formats), REPORT_FILE, RECIPE_FILE])
        )
        return steps

    def _verb(self, item: Chosen) -> str:
        if item in self.plugins.structural:
            return "transform with"
        return "train with" if item.method.trains else "measure with"


def make_plan(recipe: Recipe, log: Log | None = None) -> Plan:
    """Check a recipe and resolve what it leaves open; reads no weights, writes nothing.

    Raises:
        RequestError: one fault. Problems: all faults that can be seen at once.
    """
    path = file_of(recipe.model)
    chosen, device, *_ = check_all(
        lambda: choose(recipe.methods),
        lambda: resolve_device(recipe.device, recipe.devices),
        lambda: check_model_file(path) if path is not None else None,
        lambda: check_source(DataSpec.parse(recipe.data), Plugins().added("data_sources")) if recipe.data else None,
    )
    problems: list[RequestError] = []
    plugins = Plugins(chosen)
    for warning in plugins.broken:
        (log or Log()).warn(warning)
    train = CORE_TRAINING
    for item in chosen:
        train = item.method.training().over(train)
    train = recipe.train.over(train)
    trains = bool(train.epochs) and (not chosen or any(item.method.trains for item in chosen))
    if trains:
        optimizer_of([{"params": [nn.Parameter(torch.zeros(1))]}], train, plugins)  # refuses wrong options now
    elif recipe.devices > 1:
        problems.append(RequestError("nothing is trained in this run; leave out --devices"))
    if (train.batch_size or 0) % recipe.devices:
        problems.append(
            RequestError(f"--batch-size {train.batch_size} cannot be divided among {recipe.devices} devices")
        )
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
    plan = Plan(recipe, tuple(chosen), plugins, train, trains, tuple(dict.fromkeys(formats)), device)
    if formats and not plan.changes:
        problems.append(RequestError("this run changes nothing that could be exported; use eff export MODEL --to ..."))
    raise_problems(problems)
    return plan


def resolve_device(name: str, count: int = 1) -> torch.device:
    """Return the device; "auto" takes an accelerator where there is one.

    Args:
        name: auto, cpu, cuda, cuda:1, mps.
        count: how many devices the run shares; then each process takes the one of its number.

    Raises:
        RequestError: no such device here, or not as many.
    """
    if count > 1:
        kind = resolve_device(name)
        if kind.type == "cpu":
            return kind
        if kind.type != "cuda" or kind.index is not None and name != "auto":
            raise RequestError(f"--device {name} is one device; with --devices {count} use --device cuda or cpu")
        if count > torch.cuda.device_count():
            raise RequestError(f"--devices {count}: there are {torch.cuda.device_count()} here")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
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
    plan, _ = check_all(
        lambda: make_plan(recipe, log),
        lambda: check_output_folder(out, force) if distributed.is_first() else None,
    )
    if recipe.devices > distributed.processes():
        return distributed.launch(recipe, out, force, False, log)
    return _Execution(plan, out, log).run_all(None)


def resume(folder: Path, *, log: Log | None = None) -> Report:
    """Go on with an interrupted run; the result equals that of an uninterrupted one.

    The device, the number of devices, formats to export and where model and data lie may differ from then.

    Raises:
        RequestError: `folder` holds no unfinished run, or the model, the data or an option is another than when it began.
    """
    log = log or Log()
    if not (folder / RECIPE_FILE).exists():
        raise RequestError(f"{folder}: holds no run to resume ({RECIPE_FILE} is missing)")
    if not (folder / IN_PROGRESS).exists():
        raise RequestError(f"{folder}: this run is finished; start a new one with another --out")
    state = read_resume_file(folder)
    recipe = read_recipe(folder / RECIPE_FILE)
    plan = make_plan(recipe, log)
    if recipe.devices > distributed.processes():
        return distributed.launch(recipe, folder, False, True, log)
    return _Execution(plan, folder, log).run_all(state)


def check_opens(plan: Plan, log: Log | None = None) -> None:
    """Open a plan's model and data and let go of them again; for callers with many runs of one model.

    Raises:
        ModelError, DataError, PluginError, RequestError: what `apply` would raise before it writes.
    """
    _Execution(plan, Path(), log or Log())._open()


class _Execution:
    """The state of one run while it goes on."""

    def __init__(self, plan: Plan, out: Path, log: Log):
        self.plan = plan
        self.out = out
        self.log = log
        self.started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.clock = time.monotonic()
        reset_peak_memory(plan.device)

    def run_all(self, state: dict[str, Any] | None) -> Report:
        """Do everything; `state` is what an interrupted run left."""
        plan = self.plan
        if plan.device.type == "cpu":
            make_deterministic()
        opened = self._open()
        began = beginning_of(opened, plan.recipe, plan.chosen, plan.train) if plan.trains else {}
        if state is not None:
            check_same_beginning(state.get("began"), began, plan.recipe, self.out)
        run = self._make_run(opened)
        for item in plan.chosen:
            item.method.check(opened.model, run)
        first = distributed.is_first()
        before = None
        if plan.changes and first and (opened.file_bytes is not None or plan.chosen):
            self.log.info(f"measure {plan.recipe.model}")
            seed_everything(run.seed, "evaluate")
            before = measure(opened.model, run, plan.plugins, opened.file_bytes)
        if plan.changes:
            check_space(self.out, 4 * _bytes_of(opened.model))
        model = self._transform(opened, run, state)
        training = Training(model, run, plan.plugins, began) if plan.trains else None
        if first:
            self._begin(opened)
            run.keeps_files = True
        summary = self._train(training, state)
        run.training = False
        model = training.raw_model if training else model
        if not first:  # the first process measures and writes
            return self._report(opened, run, None, None, summary, ())
        for item in plan.chosen:
            model = self._checked(item, "finish", item.method.finish(model, run)).to(run.device)
        return self._finish(model, run, opened, before, summary)

    def _open(self) -> OpenModel:
        recipe = self.plan.recipe
        request = ModelRequest(
            recipe.model, recipe.arch, recipe.data, recipe.task, recipe.trust_pickle, self.plan.device, recipe.seed,
            self.plan.needs_data, self.plan.needs_data,
        )  # fmt: skip
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
            if not item.method.card.is_for(opened.task.name):
                raise RequestError(
                    f"{item.name} is for {', '.join(item.method.card.tasks)}, the model's task is {opened.task.name}"
                )
        if self.plan.trains and opened.data is not None and opened.data.train is None:
            raise DataError(f"data '{opened.data.spec}' has no train split; use other data or --epochs 0")
        return opened

    def _make_run(self, opened: OpenModel) -> Run:
        chosen = (*opened.applied, *self.plan.plugins.structural)
        run = Run(
            task=opened.task,
            device=self.plan.device,
            seed=self.plan.recipe.seed,
            data=opened.data,
            model_spec=opened.spec,
            train=self.plan.train,
            precision=self.plan.recipe.precision,
            folder=self.out if distributed.is_first() else None,
            log=self.log,
            training=self.plan.trains,
        )
        run.applied = lambda: tuple(item.applied() for item in chosen)
        return run

    def _transform(self, opened: OpenModel, run: Run, state: dict[str, Any] | None) -> nn.Module:
        model = opened.model
        run.restoring = state is not None
        for item in self.plan.chosen:
            if state is not None:
                item.method.structure = dict(state["structure"].get(item.name, {}))
        for item in self.plan.plugins.structural:
            self.log.info(f"apply {item.name}")
            seed_everything(run.seed, f"transform/{item.name}")
            changed = item.method.transform(model=model, run=run)  # type: ignore[attr-defined]
            model = self._checked(item, "transform", changed).to(run.device)
        run.restoring = False
        return model

    def _checked(self, item: Chosen, hook: str, changed: object) -> nn.Module:
        if not isinstance(changed, nn.Module):
            raise PluginError(f"{item.name}: {hook} returned {type(changed).__name__}; it must return the module")
        return changed

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
        artifacts: list[Artifact] = []
        if self.plan.changes:
            path = self.out / MODEL_FILE
            save_checkpoint(path, make_header(run), model.state_dict())
            artifacts.append(describe_artifact(path, "checkpoint"))
        for name in self.plan.formats:
            self.log.info(f"export {name}")
            artifacts.append(export(model, name, self.out, run, self.plan.plugins))
        own = self._own_formats()  # a delta is no use without the base model, so it is not what one ships
        shipped = next((i.bytes for i in artifacts if i.format in own and not i.details.get("needs_base")), None)
        self.log.info("measure the result" if self.plan.changes else f"measure {self.plan.recipe.model}")
        seed_everything(run.seed, "evaluate")
        size = shipped or (artifacts[0].bytes if artifacts else opened.file_bytes)
        after = measure(model, run, self.plan.plugins, size)
        report = self._report(opened, run, before, after, summary, [*artifacts, *run.outputs])
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
        after: Measurement | None,
        summary: TrainingSummary | None,
        artifacts: Sequence[Artifact],
    ) -> Report:
        relative = tuple(item.model_copy(update={"path": item.path.relative_to(self.out)}) for item in artifacts)
        return Report(
            recipe=self.plan.recipe.model_copy(update={"train": self.plan.train}),
            methods=tuple(item.applied() for item in (*opened.applied, *self.plan.chosen)),
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
            peak_memory_bytes=peak_memory(self.plan.device),
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
