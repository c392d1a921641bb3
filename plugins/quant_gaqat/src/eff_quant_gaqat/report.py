"""What quant_gaqat reports: accuracy by domain, sharpness, and how the scales' gradients behaved; two pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eff.data import Data
from eff.measure import task_metrics
from eff.modes import eval_mode
from eff.run import Run
from eff.schemas import Metric, Metrics, TableRow
from eff_quant_gaqat.config import GAQATConfig
from eff_quant_gaqat.disorder import Tracker
from eff_quant_gaqat.domains import DomainData
from eff_quant_kit.layers import quant_layers
from eff_quant_kit.packed import size_metrics


def describe(model: nn.Module, data: Data | None, run: Run, config: GAQATConfig, found: dict[str, Any]) -> Metrics:
    """Return what is reported; empty for a model without quantizers. `found` is `summary` of the training."""
    if not quant_layers(model):
        return Metrics()
    values = size_metrics(model)
    tables: dict[str, list[TableRow]] = {}
    if isinstance(data, DomainData):
        rows = domain_accuracy(model, data, run)
        worst = min(float(row["accuracy"]) for row in rows)  # type: ignore[arg-type]
        values["worst_domain_accuracy"] = Metric(value=worst, unit="%", better="higher")
        tables["domains"] = rows
    if data is not None:
        values["sharpness"] = Metric(value=sharpness(model, run, config.rho), better="lower")
    if found:
        values["conflict_rate"] = Metric(value=100 * found["conflict_rate"], unit="%")
        values["frozen_share"] = Metric(value=100 * found["frozen_share"], unit="%")
        values["skipped_steps"] = Metric(value=found["skipped"])
        tables["scales"] = found["scales"]
    return Metrics(values=values, tables=tables)


def summary(tracker: Tracker) -> dict[str, Any]:
    """Return the whole training's figures and those of each scale, for checkpoint and report."""
    steps = max(1, tracker.steps)
    rows = [
        {
            "scale": name,
            "disorder": None if torch.isnan(tracker.latest[place]) else float(tracker.latest[place]),
            "conflict": float(tracker.conflicts[place]) / steps,
            "frozen": float(tracker.frozen_steps[place]) / steps,
        }
        for place, name in enumerate(tracker.names)
    ]
    return {
        "conflict_rate": tracker.conflict_rate(),
        "frozen_share": tracker.frozen_share(),
        "skipped": tracker.skipped,
        "scales": rows,
    }


def domain_accuracy(model: nn.Module, data: DomainData, run: Run) -> list[TableRow]:
    """Return the accuracy on the target and on the held-out part of each source."""
    rows: list[TableRow] = []
    for name, split in {data.target: data.test, **data.validation}.items():
        accuracy = task_metrics(model, dataclasses.replace(data, test=split), run).values["accuracy"].value
        rows.append({"domain": name, "role": "target" if name == data.target else "source", "accuracy": accuracy})
    return rows


def sharpness(model: nn.Module, run: Run, rho: float, samples: int = 256) -> float:
    """Return L(theta + rho g / ||g||) - L(theta) on test samples, in eval mode; the model is left as it was."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with eval_mode(model):
        batch = next(run.batches("test", samples, samples))
        with torch.enable_grad():
            loss = run.task.loss(run.forward(model, batch), batch)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        used = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        norm = torch.stack([g.norm() for _, g in used]).norm()
        kept = [p.detach().clone() for p, _ in used]
        with torch.no_grad():
            for p, g in used:
                p.add_(g * (rho / (norm + 1e-12)))
            moved = run.task.loss(run.forward(model, batch), batch)
            for (p, _), value in zip(used, kept, strict=True):
                p.copy_(value)
    return float(moved) - float(loss.detach())


def draw(tracker: Tracker, path: Path) -> None:
    """Draw by window and scale the disorder of the task gradient; frozen scales are marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name.replace("_quantizer.scale", "") for name in tracker.names]
    figure, axes = pyplot.subplots(
        figsize=(max(6, 2.5 + 0.28 * len(tracker.history)), 1.5 + 0.3 * len(names)), layout="constrained"
    )
    image = axes.imshow(torch.tensor(tracker.history).t(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    places = torch.tensor(tracker.frozen_history).t().nonzero()
    axes.scatter(places[:, 1], places[:, 0], marker="x", color="white", s=28, label="frozen")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel(f"window of {tracker.config.window} steps")
    axes.set_title("Disorder of task gradients (x: frozen next)", fontsize=11)
    figure.colorbar(image, ax=axes, label="share of sign changes")
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
