"""What quant_biadapter reports: bytes of a task, and how the accuracy bears noise on the adapters."""

from __future__ import annotations

import torch
from torch import nn

from eff.data import Data
from eff.measure import task_metrics
from eff.run import Run
from eff.schemas import Metric, Metrics, TableRow
from eff_quant_biadapter.config import BiAdapterConfig
from eff_quant_biadapter.insert import adapter_layers
from eff_quant_biadapter.storage import head_tensors, payload_bytes

RATIOS = (0.1, 0.2, 0.5, 1.0, 2.0)


def describe(model: nn.Module, data: Data | None, run: Run, head: str, config: BiAdapterConfig) -> Metrics:
    """Return bytes and, where asked for, the noise curve; empty without adapters."""
    layers = adapter_layers(model)
    if not layers:
        return Metrics()
    floats = sum(4 * value.numel() for value in head_tensors(model, head).values())
    whole = payload_bytes(model, head)
    values = {
        "task_bytes": Metric(value=whole, unit="B", better="lower"),
        "adapter_bytes": Metric(value=whole - floats, unit="B", better="lower"),
        "trained_parameters": Metric(value=sum(p.numel() for p in model.parameters() if p.requires_grad)),
    }
    tables: dict[str, list[TableRow]] = {}
    if config.noise_curve and data is not None and run.keeps_files:
        tables["noise"] = noise_curve(model, [layer.weight for layer in layers.values()], data, run)
    return Metrics(values=values, tables=tables)


def noise_curve(model: nn.Module, weights: list[nn.Parameter], data: Data, run: Run) -> list[TableRow]:
    """Return the task's first metric with noise of `ratio` times each weight's deviation added."""
    rows: list[TableRow] = []
    for ratio in (0.0, *RATIOS):
        kept = [weight.detach().clone() for weight in weights]
        generator = run.generator(f"noise/{ratio}")
        with torch.no_grad():
            for weight in weights:
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(noise * (ratio * weight.std()))
            name, metric = next(iter(task_metrics(model, data, run).values.items()))
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)
        rows.append({"noise": ratio, name: metric.value})
    return rows
