"""Measuring a model: the task's metrics, size and latency."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from eff.data import Data, move_batch, ordered_batches
from eff.modes import eval_mode
from eff.run import Run
from eff.schemas import Measurement, Metrics
from eff.session import DEFAULT
from eff.tasks import NoTask

if TYPE_CHECKING:
    from eff.session import Plugins


def task_metrics(model: nn.Module, data: Data, run: Run) -> Metrics:
    """Return the task's metrics on the test split, in eval mode."""
    split = data.split("test")
    size = max(run.train.batch_size or 64, 64)
    meter = run.task.meter()
    batches = run.log.track(ordered_batches(split, size), "evaluate", total=-(-len(split) // size))
    with eval_mode(model), torch.inference_mode():
        for batch in batches:
            moved = move_batch(batch, run.device)
            meter.update(run.forward(model, moved), moved)
    return meter.compute()


def measure(model: nn.Module, run: Run, plugins: Plugins, file_bytes: int | None = None) -> Measurement:
    """Return quality (all `evaluate` hooks), size and latency of a model.

    Without data the hooks of the methods get None; without a task there is no latency.
    """
    left_out = [plugins.manager.get_plugin(DEFAULT)] if run.data is None else []
    evaluate = plugins.manager.subset_hook_caller("evaluate", left_out)
    reporters = [item.plugin_name for item in evaluate.get_hookimpls() if not (item.wrapper or item.hookwrapper)]
    found = evaluate(model=model, data=run.data, run=run)[::-1]  # pluggy asks the last one registered first
    if len(found) != len(reporters):  # one had nothing to say, or a wrapper added or took away
        reporters = ["a method"] * len(found)
    parts = list(zip(reporters, found, strict=True))
    latency = time_forward(model, run) if run.task.name != NoTask.name else None
    return Measurement(
        metrics=Metrics.merge(parts),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=file_bytes if file_bytes is not None else state_bytes(model),
        latency_ms=latency.median if latency else None,
        latency_p90_ms=latency.p90 if latency else None,
    )


def state_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers that a file would hold."""
    return sum(
        value.numel() * value.element_size() for value in model.state_dict().values() if isinstance(value, torch.Tensor)
    )


class Latency:
    """Times of repeated calls, in milliseconds."""

    def __init__(self, milliseconds: list[float]):
        ordered = sorted(milliseconds)
        self.median = statistics.median(ordered)
        self.p90 = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
        self.count = len(ordered)


def time_forward(model: nn.Module, run: Run, samples: int = 1, budget_s: float = 0.3) -> Latency:
    """Time the forward pass on `samples` inputs after warm-up, for about `budget_s` seconds."""
    inputs = tuple(value.to(run.device) for value in run.task.example_inputs(samples))
    with eval_mode(model), torch.inference_mode():
        result = time_calls(lambda: model(*inputs), run.device, budget_s)
    return result


def time_calls(call: Callable[[], object], device: torch.device, budget_s: float) -> Latency:
    """Time `call` after warm-up: at least 5 times, at most 200, for about `budget_s` seconds."""
    for _ in range(3):
        call()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(1000.0 * (time.perf_counter() - start))
    return Latency(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of the peak; does nothing where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak resident size
        except OSError:
            return


def memory_in_use(device: torch.device) -> int | None:
    """Return the bytes in use: of this process on the CPU, of the tensors on a GPU; None where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _status("VmRSS")


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes in use since `reset_peak_memory`; None where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM")


def _status(field: str) -> int | None:
    if sys.platform != "linux":
        return None
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return None
