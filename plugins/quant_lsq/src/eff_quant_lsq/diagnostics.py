"""What eff reports of a model with learned steps: bits, size, clipping, error, and the ratio R.

    R = (|dL/ds| / s) / (||dL/dw|| / ||w||)        LSQ sec. 2.2

compares the relative size of a step's update with that of its weights; the gradient scale is meant
to bring it near 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eff.data import Batch
from eff.errors import DataError
from eff.modes import eval_mode
from eff.run import Run
from eff.schemas import Metric, Metrics, TableRow
from eff_quant_kit.layers import QuantLayer, quant_layers
from eff_quant_kit.packed import size_metrics

SAMPLES = 64


def diagnose(model: nn.Module, run: Run, lifted: int) -> Metrics:
    """Return the measurements; empty for a model without quantizers.

    Raises:
        RunError: a quantizer has not been initialised.
    """
    layers = quant_layers(model)
    if not layers:
        return Metrics()
    batch = _one_batch(run)
    inputs = _inputs(model, layers, run, batch)
    ratios = step_ratios(model, layers, lambda: run.task.loss(run.forward(model, batch), batch))
    rows = [_row(name, layer, inputs.get(name), ratios.get(name)) for name, layer in layers.items()]
    clips = [row["clip_fraction"] for row in rows if isinstance(row["clip_fraction"], float)]
    values = {
        **size_metrics(model),
        "steps_lifted": Metric(value=lifted),
    }
    if clips:
        values["clip_fraction"] = Metric(value=100 * sum(clips) / len(clips), unit="%")
    return Metrics(values=values, tables={"layers": rows})


def _one_batch(run: Run) -> Batch:
    try:
        return next(run.batches("train", SAMPLES, SAMPLES))
    except (DataError, StopIteration):
        return next(run.batches("test", SAMPLES, SAMPLES))


def _inputs(model: nn.Module, layers: dict[str, QuantLayer], run: Run, batch: Batch) -> dict[str, Tensor]:
    """Return what each layer is fed with."""
    seen: dict[str, Tensor] = {}
    handles = [layer.register_forward_pre_hook(_remember(seen, name)) for name, layer in layers.items()]
    try:
        with eval_mode(model), torch.no_grad():
            run.forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _remember(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.setdefault(name, arguments[0].detach())

    return hook


def step_ratios(
    model: nn.Module, layers: dict[str, QuantLayer], loss: Callable[[], Tensor]
) -> dict[str, tuple[float, float]]:
    """Return R with and without the gradient scale, by layer; gradients of the model are left alone."""
    chosen = {
        name: (layer.weight_quantizer, layer.layer.weight)
        for name, layer in layers.items()
        if layer.weight_quantizer is not None and layer.weight_quantizer.scale.requires_grad
    }
    if not chosen:
        return {}
    with eval_mode(model), torch.enable_grad():
        wanted = [tensor for quantizer, weight in chosen.values() for tensor in (quantizer.scale, weight)]
        gradients = torch.autograd.grad(loss(), wanted, allow_unused=True)  # type: ignore[arg-type]
    ratios = {}
    for index, (name, (quantizer, weight)) in enumerate(chosen.items()):
        d_scale, d_weight = gradients[2 * index], gradients[2 * index + 1]
        if d_scale is None or d_weight is None or not bool(d_weight.norm() > 0):
            continue
        step = float((d_scale.abs() / quantizer.scale.detach()).mean())
        relative_weight = float(d_weight.norm() / weight.detach().norm())  # type: ignore[operator,union-attr]
        ratio = step / relative_weight
        ratios[name] = (ratio, ratio / quantizer.grad_scale)
    return ratios


def _row(name: str, layer: QuantLayer, x: Tensor | None, ratio: tuple[float, float] | None) -> TableRow:
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    weight: Tensor = layer.layer.weight.detach()  # type: ignore[union-attr,operator,assignment]
    row: TableRow = {
        "layer": name,
        "weight_bits": weights.bits if weights else None,
        "input_bits": inputs.bits if inputs else None,
    }
    with torch.no_grad():
        row["step"] = float(weights.scale.mean()) if weights else None
        row["weight_mse"] = float((weights(weight) - weight).square().mean()) if weights else None
        seen = inputs is not None and x is not None
        row["input_step"] = float(inputs.scale) if inputs is not None else None
        row["input_mse"] = float((inputs(x) - x).square().mean()) if seen else None  # type: ignore[misc,operator]
        row["clip_fraction"] = inputs.clip_fraction(x) if seen else None  # type: ignore[union-attr,arg-type]
    row["R"], row["R_without_scale"] = ratio if ratio else (None, None)
    return row
