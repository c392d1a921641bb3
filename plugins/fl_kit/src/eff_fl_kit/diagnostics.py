"""What a federated run reports: training loss, sharpness, and the rounds as table and picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eff.data import batch_size_of, move_batch, ordered_batches
from eff.modes import eval_mode
from eff.run import Run
from eff.schemas import Metric, Metrics
from eff_fl_kit.flat import flat_weights, flattened, frozen_statistics

if TYPE_CHECKING:
    from eff_fl_kit.method import FederatedMethod

_SAMPLES = 10_000
_BATCH = 256
_RADII = (0.25, 0.5, 0.75, 1.0)


def diagnose(method: FederatedMethod[Any], model: nn.Module, run: Run) -> Metrics:
    """Return the loss on the clients' data together, and the rounds of the training just done as a table."""
    if run.data is None or run.data.train is None:
        return Metrics()
    values = {"train_loss": Metric(value=train_loss(model, run), better="lower")}
    if method.history and run.keeps_files:
        draw_rounds(method.history, run)
    tables = {"rounds": method.history, "totals": [totals(method.history)]} if method.history else {}
    return Metrics(values=values, tables=tables)


def totals(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums over the rounds."""
    return {
        name: sum(row[name] for row in history) for name in ("drawn", "answered", "up", "down", "steps", "gradients")
    }


def _batches(run: Run, samples: int) -> Any:
    split = run.split("train")
    taken = 0
    for batch in ordered_batches(split, _BATCH):
        if taken >= samples:
            return
        taken += batch_size_of(batch)
        yield move_batch(batch, run.device)


def train_loss(model: nn.Module, run: Run, samples: int = _SAMPLES) -> float:
    """Return the mean loss over (the first 10,000 of) the training samples, in eval mode."""
    total, count = 0.0, 0
    with eval_mode(model), torch.inference_mode():
        for batch in _batches(run, samples):
            size = batch_size_of(batch)
            total += size * float(run.task.loss(run.forward(model, batch), batch))
            count += size
    return total / max(1, count)


def sharpness(model: nn.Module, run: Run, radius: float, samples: int = 1024) -> float:
    """Return the largest rise of the training loss along its gradient, up to `radius` away (in eval mode)."""
    start: Tensor = flat_weights(model)
    with eval_mode(model), flattened(model) as flat, frozen_statistics(model):
        base = 0.0
        count = 0
        for batch in _batches(run, samples):
            size = batch_size_of(batch)
            loss = run.task.loss(run.forward(model, batch), batch) * size
            loss.backward()  # type: ignore[no-untyped-call]
            base += float(loss.detach())
            count += size
        direction = flat.gradient / (torch.linalg.vector_norm(flat.gradient) + 1e-12)
        rises = []
        for share in _RADII:
            flat.weights.copy_(start).add_(direction, alpha=share * radius)
            rises.append(train_loss(model, run, samples) - base / max(1, count))
        flat.weights.copy_(start)
    return max(rises)


def draw_rounds(history: list[dict[str, Any]], run: Run) -> None:
    """Write rounds.png: the clients' loss, and accuracy where it was measured, over rounds; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    rounds = [row["round"] for row in history]
    axes.plot(rounds, [row["loss"] for row in history], color="tab:blue", label="clients' training loss")
    axes.set(xlabel="round", ylabel="clients' training loss", ylim=(0, None))
    axes.yaxis.label.set_color("tab:blue")
    sent = (sum(row["up"] + row["down"] for row in history)) / 1e6
    name = run.task.headline
    measured = [row for row in history if name in row]
    if measured:
        right = axes.twinx()
        right.plot([row["round"] for row in measured], [row[name] for row in measured], color="tab:red", marker=".")
        right.set_ylabel(f"{name}, test data")
        right.yaxis.label.set_color("tab:red")
    axes.set_title(f"{len(history)} rounds, {sent:.2f} MB sent and received")
    with run.output("rounds.png", format="png") as path:
        figure.savefig(path, format="png", dpi=120)
