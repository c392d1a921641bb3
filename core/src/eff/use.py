"""Using a finished model: evaluate, predict, export, bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from eff.data import move_batch
from eff.errors import MissingDependencyError, OutputError, RequestError, did_you_mean
from eff.exporting import export, file_name
from eff.files import atomic_path, check_output_folder, make_output_folder, write_text
from eff.log import Log
from eff.measure import measure, memory_in_use, peak_memory, reset_peak_memory, state_bytes, time_forward
from eff.method import Method
from eff.models import ModelRequest, OpenModel, open_model
from eff.run import Run
from eff.runner import resolve_device
from eff.schemas import CORE_TRAINING, Artifact, Measurement, MethodUse, Schema
from eff.seeding import seed_everything
from eff.session import Plugins, choose
from eff.tasks import Prediction


@dataclass(frozen=True)
class UseRequest:
    """A model to use, with what its file may leave open."""

    model: str
    arch: str | None = None
    data: str | None = None
    device: str = "auto"
    batch_size: int | None = None
    seed: int = 0
    trust_pickle: bool = False
    settings: Mapping[str, JsonValue] = field(default_factory=dict)
    """What a model that holds several settings computes with, e.g. {"bits": 4}."""


def open_for_use(
    request: UseRequest, plugins: Plugins, log: Log, needs_data: bool, needs_task: bool = True
) -> tuple[OpenModel, Run]:
    """Open a model for a command that uses it, in eval mode, with a run that trains nothing.

    Raises:
        RequestError: model or data cannot be used, or one of them is missing and needed.
    """
    device = resolve_device(request.device)
    opened = open_model(
        ModelRequest(
            request.model,
            request.arch,
            request.data,
            None,
            request.trust_pickle,
            device,
            request.seed,
            needs_data,
            needs_task,
        ),  # fmt: skip
        plugins,
        log,
    )
    size = request.batch_size or CORE_TRAINING.batch_size
    run = Run(
        task=opened.task, device=device, seed=request.seed, data=opened.data, model_spec=opened.spec, log=log,
        train=CORE_TRAINING.model_copy(update={"batch_size": size}),
    )  # fmt: skip
    run.applied = lambda: tuple(item.applied() for item in opened.applied)
    opened.model.eval()
    if request.settings:
        _switch(opened, request)
    return opened, run


def _switch(opened: OpenModel, request: UseRequest) -> None:
    """Let the method that can change the model's settings do so."""
    able = [item.method for item in opened.applied if type(item.method).switch is not Method.switch]
    if not able:
        raise RequestError(
            f"{request.model}: has no settings to switch ({', '.join(request.settings)}); none of its methods stores several"
        )
    able[-1].switch(opened.model, request.settings)


def evaluate(
    request: UseRequest,
    methods: Sequence[MethodUse] = (),
    out: Path | None = None,
    force: bool = False,
    log: Log | None = None,
) -> Measurement:
    """Measure a model on the test split: the task's metrics and what `methods` add.

    Args:
        request: the model.
        methods: methods whose measurements are added.
        out: folder for measurement.json and the files of the methods; None keeps none.
        force: write into a folder that holds results.
        log: where messages and progress go.

    Raises:
        RequestError: the model, the data or a method cannot be used.
    """
    log = log or Log()
    if out is not None:
        check_output_folder(out, force)
    plugins = Plugins(choose(methods))
    needs_data = not methods or any(item.method.card.needs_data for item in plugins.chosen)
    opened, run = open_for_use(request, plugins, log, needs_data, needs_data)
    for item in plugins.chosen:
        if not item.method.card.is_for(opened.task.name):
            raise RequestError(
                f"{item.name} is for {', '.join(item.method.card.tasks)}, the model's task is {opened.task.name}"
            )
        item.method.check(opened.model, run)
    if out is not None:
        make_output_folder(out)
        run.folder, run.keeps_files = out, True
    # The methods that made the model also have something to say of it.
    names = [item.name for item in plugins.chosen]
    replayed = [item for item in opened.applied if item.name not in names]
    again = Plugins(plugins.chosen, plugins.extensions, replayed)
    seed_everything(request.seed, "evaluate")
    measured = measure(opened.model, run, again, opened.file_bytes)
    if out is not None:
        write_text(out / "measurement.json", measured.model_dump_json(indent=2))
    return measured


def predict(
    request: UseRequest, inputs: Sequence[Path], out: Path | None = None, log: Log | None = None
) -> list[Prediction]:
    """Return what the model says of each input file.

    Raises:
        RequestError: the model or an input cannot be used.
    """
    if out is not None and len(inputs) > 1:
        raise RequestError("--out names one file, but there are several inputs; predict them one by one")
    opened, run = open_for_use(request, Plugins(), log or Log(), needs_data=False)
    predictions = []
    for path in inputs:
        batch = move_batch(opened.task.read_input(path), run.device)
        predictions.append(opened.task.show(opened.task.predict(opened.model, batch), path, out))
    return predictions


def export_model(
    request: UseRequest, formats: Sequence[str], out: Path, force: bool = False, log: Log | None = None
) -> list[Artifact]:
    """Write a finished model in other formats into the folder `out`.

    Raises:
        RequestError: nobody writes a format, or a file exists and `force` is false.
    """
    log = log or Log()
    extensions = Plugins().extensions
    opened, run = open_for_use(request, Plugins((), extensions), log, needs_data=False)
    plugins = Plugins((), extensions, opened.applied)
    known = plugins.export_formats()
    for name in formats:
        if name not in known:
            raise RequestError(
                f"nothing writes '{name}' for this model{did_you_mean(name, known)}; known: {', '.join(known)}"
            )
        if (out / file_name(name)).exists() and not force:
            raise OutputError(f"{out / file_name(name)} exists; add --force to replace it, or choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {out}: {error.strerror}; choose another --out") from error
    return [export(opened.model, name, out, run, plugins) for name in formats]


class BenchRow(Schema):
    """One model on this machine."""

    model: str
    latency_ms: float
    latency_p90_ms: float
    throughput: float
    """Samples per second at the batch size."""
    batch_size: int
    peak_memory_bytes: int | None
    parameters: int
    bytes: int


def bench(requests: Sequence[UseRequest], seconds: float = 1.0, log: Log | None = None) -> list[BenchRow]:
    """Measure latency, throughput, memory and size of models, after warm-up.

    Raises:
        RequestError: a model cannot be opened.
    """
    log = log or Log()
    rows = []
    for request in log.track(requests, "bench"):
        opened, run = open_for_use(request, Plugins(), log, needs_data=False)
        size = request.batch_size or 64
        single = time_forward(opened.model, run, 1, seconds)
        reset_peak_memory(run.device)
        before = memory_in_use(run.device)
        many = time_forward(opened.model, run, size, seconds)
        peak = peak_memory(run.device)
        rows.append(
            BenchRow(
                model=request.model,
                latency_ms=single.median,
                latency_p90_ms=single.p90,
                throughput=1000.0 * size / many.median,
                batch_size=size,
                peak_memory_bytes=None if peak is None or before is None else max(0, peak - before),
                parameters=sum(parameter.numel() for parameter in opened.model.parameters()),
                bytes=opened.file_bytes or state_bytes(opened.model),
            )
        )
    return rows


def load_pyplot() -> Any:
    """Return matplotlib's pyplot, drawing into files.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingDependencyError("the plot needs matplotlib; pip install 'eff-core[plots]'") from error
    return pyplot


def save_figure(figure: object, path: Path) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)  # type: ignore[attr-defined]
