"""Core's own export formats: ONNX, torch.export (.pt2) and safetensors."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eff.checkpoint import header_metadata
from eff.errors import MissingDependencyError, RunError, UnsupportedModelError
from eff.files import atomic_path, describe_artifact
from eff.measure import time_calls
from eff.run import Run
from eff.schemas import Artifact, CheckpointHeader, ExportTarget

if TYPE_CHECKING:
    from eff.session import Plugins

LATENCY_SECONDS = 0.2
SUFFIX = {"onnx": ".onnx", "pt2": ".pt2", "safetensors": ".safetensors"}


def file_name(format: str) -> str:
    """Return the name of an export within a run folder."""
    return f"model{SUFFIX.get(format, f'.{format}.safetensors' if format == 'packed' else f'.{format}')}"


def export(model: nn.Module, format: str, folder: Path, run: Run, plugins: Plugins) -> Artifact:
    """Write one format into `folder`, whole or not at all.

    Raises:
        RunError: nobody writes this format, or the writer failed.
    """
    final = folder / file_name(format)
    model.eval()
    with atomic_path(final) as temporary:
        artifact = plugins.hook.export(model=model, target=ExportTarget(format=format, path=temporary), run=run)
        if not isinstance(artifact, Artifact):
            raise RunError(f"no plugin of this run writes '{format}'")
    return artifact.model_copy(update={"path": final})


def export_standard(model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
    """Write one of core's formats; None for any other."""
    writer = {"onnx": _write_onnx, "pt2": _write_pt2, "safetensors": _write_safetensors}.get(target.format)
    if writer is None:
        return None
    details = writer(model, target.path, run)
    return describe_artifact(target.path, target.format, details)


def make_header(run: Run, **changes: Any) -> CheckpointHeader:
    """Return the header for a file of the run's model; `changes` set e.g. encoding."""
    import eff

    assert run.model_spec is not None
    base = CheckpointHeader(
        eff=eff.__version__,
        model=run.model_spec,
        task=run.task.spec,
        data=str(run.data.spec) if run.data else None,
        methods=run.applied(),
    )
    return base.model_copy(update=changes)


def _write_safetensors(model: nn.Module, path: Path, run: Run) -> dict[str, Any]:
    from safetensors.torch import save_file

    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, path, metadata=header_metadata(make_header(run)))
    return {}


def _write_pt2(model: nn.Module, path: Path, run: Run) -> dict[str, Any]:
    inputs = tuple(value.to(run.device) for value in run.task.example_inputs(2))
    batch = torch.export.Dim("batch")
    try:
        program = torch.export.export(model, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    except Exception as error:  # torch.export raises many types
        raise UnsupportedModelError(f"{type(model).__name__} cannot be exported: {_first_line(error)}") from error
    with open(path, "wb") as file:
        torch.export.save(program, file)
    return {"input": "normalised", "shape": list(inputs[0].shape[1:])}


def _write_onnx(model: nn.Module, path: Path, run: Run) -> dict[str, Any]:
    onnx_export(model, path, run)
    return onnx_agreement(model, path, run)


def onnx_export(
    model: nn.Module, path: Path, run: Run, *, rewrite: Callable[[Any], None] | None = None, **options: Any
) -> None:
    """Write an ONNX file with a free batch size; normalisation stands in its metadata.

    Args:
        model: the module, in eval mode.
        path: where to write.
        run: for example inputs and the task.
        rewrite: changes the graph (`onnx_ir.Graph`) before it is written.
        **options: passed on to torch.onnx.export, e.g. custom_translation_table.

    Raises:
        MissingDependencyError: onnx or onnxscript is not installed.
        UnsupportedModelError: torch.onnx cannot translate the model.
    """
    try:
        import onnx  # noqa: F401 - torch.onnx needs both
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"ONNX export needs {error.name}; pip install 'eff-core[onnx]'") from error
    inputs = tuple(value.to(run.device) for value in run.task.example_inputs(2))
    batch = torch.export.Dim("batch")
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                model, inputs, dynamo=True, input_names=list(run.task.input_names), output_names=["output"],
                dynamic_shapes=tuple({0: batch} for _ in inputs), verbose=False, **options,
            )  # fmt: skip
    except Exception as error:  # the exporter raises many types
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be written as ONNX: {_first_line(error)}"
        ) from error
    assert program is not None
    if rewrite is not None:
        rewrite(program.model.graph)
    save_onnx(program.model_proto, path, run)


def save_onnx(proto: Any, path: Path, run: Run) -> None:
    """Check and write an ONNX model (`onnx.ModelProto`); the task's options, e.g. normalisation, go into its metadata.

    What torch's exporter says about the origin of each node is left out: it names paths of this machine and can be half
    the file.
    """
    import onnx

    graph = proto.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    for key, value in run.task.spec.options.items():
        proto.metadata_props.add(key=f"eff.{key}", value=json.dumps(value))
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep from the terminal what torch says about itself while exporting, e.g. that torchvision is missing."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def onnx_agreement(model: nn.Module, path: Path, run: Run, samples: int = 256) -> dict[str, Any]:
    """Run the file in onnxruntime beside the model on test data; empty where either is missing.

    Returns:
        samples, agreement (share of equal argmax) and max_difference of the outputs; latency_ms of one sample in
        onnxruntime, on as many threads as torch has.
    """
    try:
        import onnxruntime
    except ImportError:
        return {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    inputs = _comparison_inputs(run, samples)
    if len(names) != len(inputs):  # the model ignores one of them
        return {}
    with torch.inference_mode():
        expected = model(*(value.to(run.device) for value in inputs))
    if not isinstance(expected, Tensor):
        return {}
    feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    found = torch.from_numpy(session.run(None, feed)[0])
    expected = expected.cpu()
    difference = float((found - expected).abs().max())
    details: dict[str, Any] = {"samples": len(inputs[0]), "max_difference": difference}
    one = {name: value[:1] for name, value in feed.items()}
    latency = time_calls(lambda: session.run(None, one), torch.device("cpu"), LATENCY_SECONDS)
    details["latency_ms"] = latency.median
    if expected.ndim == 2:
        details["agreement"] = float((found.argmax(1) == expected.argmax(1)).double().mean())
    return details


def _comparison_inputs(run: Run, samples: int) -> tuple[Tensor, ...]:
    """Return inputs of the bare module: test samples where there are any."""
    if run.data is not None and run.data.test is not None:
        batch = run.data.test.batch(range(min(samples, len(run.data.test))))
        inputs = run.task.module_inputs(batch)
        if inputs is not None:
            return inputs
    return run.task.example_inputs(min(samples, 16))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
