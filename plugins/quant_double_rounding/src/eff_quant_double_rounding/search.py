"""Widths by layer: Hessian traces, the integer programme, and its neighbours.

    min sum_l (t_l / n_l) err_l(b_l),  err_l(b) = ||W_b - W||^2,  mean width at most the target
The paper prints b_l in the place of err_l (objective=paper), which taken alone rewards few bits for sensitive layers; with
it the mean width is held at the target from below as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eff.errors import RequestError
from eff.modes import eval_mode
from eff.run import Run
from eff_quant_double_rounding.config import DoubleRoundingConfig
from eff_quant_double_rounding.layers import PLUGIN, switch, switch_layers
from eff_quant_double_rounding.rounding import value
from eff_quant_kit.allocation import Budget, allocate
from eff_quant_kit.sensitivity import hessian_traces, read_sensitivity

BATCH = 64


def traces(model: nn.Module, names: list[str], config: DoubleRoundingConfig, run: Run) -> dict[str, float]:
    """Return the Hessian trace of each layer of the float model; noisy negative ones count as 0, with a warning.

    Raises:
        RequestError: `config.sensitivity` is missing or lacks a layer's trace.
    """
    if config.sensitivity is not None:
        averages = read_sensitivity(config.sensitivity).traces(names, PLUGIN)
        return {
            name: max(0.0, average) * model.get_submodule(name).weight.numel() for name, average in averages.items()
        }
    weights = {name: model.get_submodule(name).weight for name in names}

    def losses() -> Iterable[tuple[Tensor, float]]:
        batches = list(run.batches("train", config.hessian_samples, BATCH))
        sizes = [len(next(iter(batch.values()))) for batch in batches]
        for batch, size in zip(batches, sizes, strict=True):
            yield run.task.loss(run.forward(model, batch), batch), size / sum(sizes)

    with eval_mode(model):
        found = hessian_traces(model, weights, losses, run.generator(f"{PLUGIN}/traces"), draws=20)  # type: ignore[arg-type]
    negative = [name for name, (trace, _) in found.items() if trace < 0]
    if negative:
        run.warn(f"{PLUGIN}: the Hessian trace of {negative[0]} is negative (a noisy estimate); it counts as 0")
    return {name: max(0.0, trace) for name, (trace, _) in found.items()}


def subnets(model: nn.Module, config: DoubleRoundingConfig, structure: dict[str, Any]) -> list[dict[str, int]]:
    """Return the best widths by layer at the target, then those with one layer's width changed and fixed; no doubles."""
    layers, widths = switch_layers(model), config.widths
    names = list(layers)
    cost = np.zeros((len(names), len(widths)))
    for row, (name, layer) in enumerate(layers.items()):
        weight: Tensor = layer.layer.weight.detach()  # type: ignore[operator]
        for column, width in enumerate(widths):
            with torch.no_grad():
                rounded = value(layer.stored(), layer.scale, layer.high, width, config.rounding)
            error = float((rounded - weight).double().square().sum()) if config.objective == "hawq" else width
            cost[row, column] = structure["traces"][name] / weight.numel() * error
    use = np.tile(np.array(widths, dtype=float) / len(names), (len(names), 1))
    budgets = [Budget("mean width", use, config.target_avg_bits, "bits")]
    if config.objective == "paper":
        reachable = min(config.target_avg_bits, float(max(widths)))
        budgets.append(Budget("mean width, from below", -use, -(reachable - 1.0 / len(names)), "bits"))
    first = allocate(PLUGIN, cost, budgets)
    found = [first.choices]
    for row in range(len(names)):
        for column in range(len(widths)):
            if column == first.choices[row]:
                continue
            try:
                found.append(allocate(PLUGIN, cost, budgets, fixed={row: column}).choices)
            except RequestError:  # a width that leaves no solution at this mean
                continue
    return [dict(zip(names, (widths[c] for c in choices), strict=True)) for choices in dict.fromkeys(found)]


def evaluate_subnets(
    model: nn.Module, structure: dict[str, Any], nets: list[dict[str, int]], run: Run, samples: int = 512
) -> list[float]:
    """Return each subnet's loss on training samples, without retraining."""
    found = []
    with eval_mode(model), torch.no_grad():
        for net in nets:
            switch(model, structure, net)
            rows = [
                (float(run.task.loss(run.forward(model, batch), batch)), len(next(iter(batch.values()))))
                for batch in run.batches("train", samples, BATCH)
            ]
            found.append(sum(loss * size for loss, size in rows) / sum(size for _, size in rows))
    return found
