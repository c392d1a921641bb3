"""Several devices: the same run in several processes, which torch's elastic launcher starts.

Every process opens the model, transforms it and trains on its share of each batch; the first one
measures and writes. A run under `accelerate launch` or `torchrun` is the same thing, started by hand.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eff import errors
from eff.errors import EffError, InterruptedRunError, RunError
from eff.log import Log, TerminalLog

if TYPE_CHECKING:
    from eff.schemas import Recipe, Report


def processes() -> int:
    """Return how many processes share this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this process measures and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def launch(recipe: Recipe, out: Path, force: bool, resumed: bool, log: Log) -> Report:
    """Do a run in `recipe.devices` processes on this machine and return its report.

    Raises:
        EffError: what the first process raised. RunError: a process died.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from eff.schemas import Report

    # DDP warns of models in which every parameter is used; which ones those are is not known beforehand.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)  # its report of a Ctrl-C is no news
    quiet = log.quiet if isinstance(log, TerminalLog) else None
    try:
        with tempfile.TemporaryDirectory(prefix="eff-") as logs:  # the launcher would leave one behind
            config = LaunchConfig(
                min_nodes=1, max_nodes=1, nproc_per_node=recipe.devices, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
                local_addr="127.0.0.1", run_id="eff", max_restarts=0, start_method="spawn", monitor_interval=0.1,
                logs_specs=DefaultLogsSpecs(log_dir=logs),
            )  # fmt: skip
            answers = elastic_launch(config, _work)(recipe.model_dump_json(), str(out), force, resumed, quiet)
    except SignalException as error:
        raise InterruptedRunError(f"stopped; go on with --resume {out}") from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == InterruptedRunError.exit_code:
            raise InterruptedRunError(f"stopped; go on with --resume {out}") from error
        raise RunError(
            f"process {rank} of {recipe.devices} failed (exit code {failure.exitcode}); its message stands above"
        ) from error
    answer = answers[0]
    if "error" in answer:
        kind, message = answer["error"]
        raise getattr(errors, kind)(message)
    report = Report.model_validate_json(answer["report"])
    log.warnings += [text for text in report.warnings if text not in log.warnings]
    return report


def _work(recipe: str, out: str, force: bool, resumed: bool, quiet: bool | None) -> dict[str, Any]:
    """Do one process's part; errors that eff knows are returned, because the launcher only passes on a trace."""
    from eff import runner
    from eff.schemas import Recipe

    warnings.filterwarnings("ignore", message="Grad strides do not match")  # layout advice, not an error
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")  # set below
    torch.set_num_threads(max(1, torch.get_num_threads() // processes()))
    log = TerminalLog(quiet) if quiet is not None and is_first() else Log()
    try:
        if resumed:
            report = runner.resume(Path(out), log=log)
        else:
            report = runner.apply(Recipe.model_validate_json(recipe), Path(out), force=force, log=log)
    except InterruptedRunError:
        # A launcher that has been stopped no longer takes answers, and the process would wait for it.
        os._exit(InterruptedRunError.exit_code)
    except EffError as error:
        kind = type(error).__name__ if hasattr(errors, type(error).__name__) else "RunError"
        return {"error": ("RequestError" if kind == "Problems" else kind, str(error))}
    except KeyboardInterrupt:
        return {"error": ("InterruptedRunError", "stopped before training began; start the run again")}
    return {"report": report.model_dump_json()}


@contextmanager
def synced_batch_norm(model: nn.Module, count: int) -> Iterator[None]:
    """Let batch normalisation see the whole batch while `count` processes train on shares of it.

    torch's SyncBatchNorm does the same on GPUs only, and stays in the model.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if count > 1 else []
    for layer in layers:
        layer.forward = functools.partial(_batch_norm, layer, type(layer).forward, count)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _SumOfAll(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is summed in the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _SumOfAll._sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOfAll._sum(gradient)

    @staticmethod
    def _sum(x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total


def _batch_norm(layer: Any, usual: Any, count: int, x: Tensor) -> Tensor:
    """Normalise `x` (N, C, ...) by the mean and variance over all processes; shares have equal size."""
    if not layer.training:
        result: Tensor = usual(layer, x)
        return result
    sum_of_all: Callable[[Tensor], Tensor] = _SumOfAll.apply
    dims = [0, *range(2, x.ndim)]
    shape = (1, -1, *(1,) * (x.ndim - 2))
    number = count * x.numel() // x.shape[1]
    mean = sum_of_all(x.sum(dims)) / number
    centred = x - mean.view(shape)
    variance = sum_of_all(centred.square().sum(dims)) / number
    if layer.track_running_stats and layer.running_mean is not None:
        with torch.no_grad():
            layer.num_batches_tracked += 1
            share = layer.momentum if layer.momentum is not None else 1.0 / float(layer.num_batches_tracked)
            layer.running_mean.lerp_(mean.to(layer.running_mean), share)
            layer.running_var.lerp_(variance.to(layer.running_var) * (number / max(1, number - 1)), share)
    normal: Tensor = centred * torch.rsqrt(variance + layer.eps).view(shape)
    if layer.weight is None:
        return normal
    return torch.addcmul(layer.bias.view(shape), normal, layer.weight.view(shape))
