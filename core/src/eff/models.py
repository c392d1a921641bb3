"""Opening a model: from a file, a run folder, or a source such as `zoo:digits_cnn`."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import torch
from torch import nn

from eff.checkpoint import SUFFIXES, ModelFile, decode_state, load_state, read_model_file
from eff.data import Data, load_data
from eff.errors import MissingDependencyError, ModelError, did_you_mean
from eff.log import Log
from eff.options import read_value
from eff.registry import import_object
from eff.run import Run
from eff.schemas import CheckpointHeader, DataSpec, ModelSpec, TaskSpec
from eff.seeding import seed_everything
from eff.session import Chosen, Plugins, choose_applied
from eff.tasks import BUILT_IN, NoTask, Task

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(eq=False)
class OpenModel:
    """A model ready to use, with what belongs to it."""

    model: nn.Module
    spec: ModelSpec
    task: Task[Any]
    data: Data | None
    header: CheckpointHeader | None
    applied: tuple[Chosen, ...]
    """Methods that had been applied before, in their order."""
    file_bytes: int | None


def file_of(model: str) -> Path | None:
    """Return the file that `model` names, or None where it is a model source.

    A folder stands for the model.pt in it.
    """
    path = Path(model)
    if path.is_dir() and (path / "model.pt").exists():
        return path / "model.pt"
    if path.exists() or path.suffix in SUFFIXES:
        return path
    scheme, colon, _ = model.partition(":")
    if colon and len(scheme) > 1 and "/" not in scheme and "\\" not in scheme:  # hf:owner/name; C:\\ is a drive
        return None
    return path


def parse_source(text: str) -> ModelSpec:
    """Return the spec of `zoo:vit_tiny?depth=4`; options stand behind the question mark."""
    source, _, query = text.partition("?")
    return ModelSpec(source=source, options={key: read_value(value) for key, value in parse_qsl(query)})


@dataclass(frozen=True)
class ModelRequest:
    """What the user said about the model and its data."""

    model: str
    arch: str | None = None
    data: str | None = None
    task: TaskSpec | None = None
    trust_pickle: bool = False
    device: torch.device = torch.device("cpu")
    seed: int = 0
    needs_data: bool = True
    needs_task: bool = True


def open_model(request: ModelRequest, plugins: Plugins, log: Log | None = None) -> OpenModel:
    """Open the model and, where asked for, its data; replay the methods a checkpoint names.

    Raises:
        ModelError, DataError, PluginError: as their messages say.
    """
    path = file_of(request.model)
    file = read_model_file(path, request.trust_pickle) if path is not None else None
    header = file.header if file else None
    given = header.task if header else request.task
    data_text = request.data or (header.data if header else None)
    data = load_data(DataSpec.parse(data_text), given, plugins.added("data_sources")) if data_text else None
    if data is None and request.needs_data:
        raise ModelError(f"{request.model}: names no data; add --data, e.g. --data digits")
    task_spec = given or (data.task if data else None)
    if task_spec is None:
        if request.needs_task:
            raise ModelError(f"{request.model}: says nothing about its task; add --data, e.g. --data digits")
        task_spec = TaskSpec(name=NoTask.name)
    task = make_task(task_spec, plugins)
    run = Run(task=task, device=request.device, seed=request.seed, log=log or Log(), restoring=header is not None)
    spec = _spec_of(request, file)
    seed_everything(request.seed, "build_model")
    if file and file.module is not None:
        model = file.module
        if path is not None and path.suffix == ".pt2":
            _allow_mode_changes(model)
    else:
        needed = {} if header else _wanted_options(spec, task, plugins)
        spec = spec.model_copy(update={"options": {**needed, **spec.options}})
        model = build_model(spec, run, plugins)
    if header is None:
        task = _with_model_options(task, model, plugins)
        run.task = task
        if data_text and task.spec != task_spec:  # the model wants e.g. another image size
            data = load_data(DataSpec.parse(data_text), task.spec, plugins.added("data_sources"))
    model.to(request.device)
    applied = choose_applied(header.methods) if header else []
    run.model_spec = spec
    if file and file.module is None:
        model = restore(model, applied, run, file, spec, plugins)
    if data is not None:
        for note in data.notes:
            run.log.warn(f"data '{data.spec}': {note}")
        task.check_fit(model, data)
    size = path.stat().st_size if path else None
    return OpenModel(model, spec, task, data, header, tuple(applied), size)


def restore(
    model: nn.Module, applied: Sequence[Chosen], run: Run, file: ModelFile, spec: ModelSpec, plugins: Plugins
) -> nn.Module:
    """Rebuild the structure that the methods of a checkpoint made, then load its weights."""
    for chosen in applied:
        seed_everything(run.seed, f"transform/{chosen.name}")
        model = chosen.method.transform(model=model, run=run)  # type: ignore[attr-defined]
    state = file.state
    if file.header and file.header.encoding:
        state = decode_state(file, plugins.look_up("encodings", file.header.encoding, {}))
    load_state(model, state, str(file.path), spec.source)
    return model.to(run.device)


def make_task(spec: TaskSpec, plugins: Plugins) -> Task[Any]:
    """Return the task of a spec, from core or an extension."""
    found = plugins.look_up("tasks", spec.name, dict(BUILT_IN))
    task_type: type[Task[Any]] = import_object(found, f"task '{spec.name}'") if isinstance(found, str) else found
    return task_type.from_spec(spec)


def _spec_of(request: ModelRequest, file: ModelFile | None) -> ModelSpec:
    if file is None:
        return parse_source(request.model)
    if file.header:
        if request.arch not in (None, file.header.model.source):
            raise ModelError(
                f"{file.path}: the file says itself that it is {file.header.model.source}; leave out --arch {request.arch}"
            )
        return file.header.model
    if file.module is not None:
        return ModelSpec(source=f"pickle:{file.path.resolve()}")
    if request.arch is None:
        raise ModelError(
            f"{file.path}: holds weights without an architecture; add --arch, e.g. --arch zoo:cifar_resnet20"
        )
    return parse_source(request.arch)


def _with_model_options(task: Task[Any], model: nn.Module, plugins: Plugins) -> Task[Any]:
    """Put what a pretrained model says of itself (`model.task_options`) over what the data says."""
    own = getattr(model, "task_options", None)
    if not own or task.name == NoTask.name:
        return task
    spec = task.spec
    return make_task(spec.model_copy(update={"options": {**spec.options, **own}}), plugins)


def _wanted_options(spec: ModelSpec, task: Task[Any], plugins: Plugins) -> dict[str, Any]:
    """Return what the architecture must know of the task, so that the checkpoint remembers it.

    The schemes of extensions get all of it; an importable factory takes what its signature names.
    """
    options = task.model_options()
    if spec.scheme == "timm":
        return {"num_classes": options["num_classes"]} if "num_classes" in options else {}
    if spec.scheme == "hf":
        return task.hub_options()
    if any(spec.scheme in extension.schemes for _, extension in plugins.extensions):
        return options
    return {}


def build_model(spec: ModelSpec, run: Run, plugins: Plugins) -> nn.Module:
    """Return the module that `spec` names.

    Raises:
        ModelError: nobody answers for this source.
    """
    model = plugins.hook.build_model(spec=spec, run=run)
    if not isinstance(model, nn.Module):
        names = sorted({name for _, extension in plugins.extensions for name in extension.models})
        raise ModelError(
            f"'{spec.source}' is no model source{did_you_mean(spec.source, names)}; "
            f"known: {', '.join([*names, 'timm:NAME', 'hf:NAME', 'package.module:factory'])}"
        )
    return model


def build_from_library(spec: ModelSpec, run: Run) -> nn.Module | None:
    """Answer `timm:`, `hf:` and `package.module:factory`; None for anything else."""
    if spec.scheme == "timm":
        timm = _library("timm", spec)
        return _module(_call(timm.create_model, spec, spec.name), spec)
    if spec.scheme == "hf":
        if not run.task.hub_class:
            raise ModelError(f"'{spec.source}': hf: has no models for the task '{run.task.name}'; add --data")
        transformers = _library("transformers", spec)
        made = _module(_call(getattr(transformers, run.task.hub_class).from_pretrained, spec, spec.name), spec)
        if not run.restoring and (own := run.task.options_of_hub_model(spec.name, made)):
            made.task_options = own  # type: ignore[assignment]
        return made
    if "." not in spec.scheme and spec.scheme != "__main__" and importlib.util.find_spec(spec.scheme) is None:
        return None
    try:
        module = importlib.import_module(spec.scheme)
    except ImportError as error:
        raise ModelError(f"'{spec.source}': cannot import {spec.scheme}: {error}") from error
    factory = getattr(module, spec.name, None)
    if not callable(factory):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ModelError(
            f"'{spec.source}': {spec.scheme} has no function '{spec.name}'{did_you_mean(spec.name, known)}"
        )
    options = dict(spec.options)
    parameters = inspect.signature(factory).parameters
    for key, value in run.task.model_options().items():
        if key in parameters:
            options.setdefault(key, value)
    return _module(_call(factory, spec.model_copy(update={"options": options})), spec)


def _module(made: Any, spec: ModelSpec) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise ModelError(f"'{spec.source}': returned a {type(made).__name__}, not an nn.Module")
    return made


def _allow_mode_changes(model: nn.Module) -> None:
    """Let an exported program be asked for eval mode; its graph has one mode and refuses by default."""
    model.train = lambda mode=True: model  # type: ignore[method-assign]
    model.eval = lambda: model  # type: ignore[method-assign]


def _library(name: str, spec: ModelSpec) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # timm needs torchvision, whose import may fail in many ways
        raise MissingDependencyError(
            f"'{spec.source}' needs {name}, which does not import here ({str(error).splitlines()[0]}); pip install {name}"
        ) from error


def _call(factory: Any, spec: ModelSpec, *arguments: Any) -> Any:
    try:
        return factory(*arguments, **spec.options)
    except Exception as error:  # foreign code
        raise ModelError(f"'{spec.source}': {type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
