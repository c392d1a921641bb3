"""What quant_dfp reports: exponents and flush rates while training, errors of products afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eff.data import Data
from eff.measure import task_metrics
from eff.modes import eval_mode
from eff.run import Run
from eff.schemas import Metric, Metrics, TableRow
from eff_quant_dfp.config import DFPConfig
from eff_quant_dfp.layers import DFPLayer, dfp_layers

ROLES = ("x", "w", "dy")


def seed_layers(model: nn.Module, config: DFPConfig, index: int) -> None:
    """Give the layers the random numbers of a step: a resumed run draws the same."""
    if config.rounding != "stochastic":
        return
    for place, layer in enumerate(dfp_layers(model).values()):
        device = layer.layer.weight.device
        seed = (config.seed * 1_000_003 + index) * 1009 + place
        layer.generator = torch.Generator(device).manual_seed(seed)  # type: ignore[arg-type]


def note(model: nn.Module, exponents: dict[str, dict[str, list[int]]]) -> tuple[float, int]:
    """Widen the ranges of exponents by the last step; return the mean flush rate and the new overflows."""
    flushed, overflows = [], 0
    for name, layer in dfp_layers(model).items():
        overflows += layer.overflows
        layer.overflows = 0
        ranges = exponents.setdefault(name, {})
        for role, seen in layer.seen.items():
            low, high = ranges.get(role, [seen.exponent, seen.exponent])
            ranges[role] = [min(low, seen.exponent), max(high, seen.exponent)]
            flushed.append(seen.flushed)
    return sum(flushed) / max(1, len(flushed)), overflows


def describe(
    model: nn.Module, data: Data | None, run: Run, exponents: dict[str, dict[str, list[int]]], overflows: int
) -> Metrics:
    """Return what is reported of a model with DFP layers; empty without any."""
    layers = dfp_layers(model)
    if not layers or data is None:
        return Metrics()
    bits = next(iter(layers.values())).config.bits
    values = {"mean_weight_bits": Metric(value=bits, unit="bits", better="lower")}
    for layer in layers.values():
        layer.integers = False
    floats = task_metrics(model, data, run)
    for layer in layers.values():
        layer.integers = True
    headline = next(iter(floats.values), None)
    if headline is not None:
        values[f"{headline}_in_float32"] = floats.values[headline]
    errors = product_errors(model, run)
    values["product_error"] = Metric(value=max(errors.values(), default=0.0), better="lower")
    values["overflows"] = Metric(value=overflows)
    rows: list[TableRow] = []
    for name, layer in layers.items():
        row: TableRow = {"layer": name, "product_error": errors.get(name)}
        for role in ROLES:
            low, high = exponents.get(name, {}).get(role, (None, None))
            row |= {f"{role}_lowest_exponent": low, f"{role}_highest_exponent": high}
            row[f"{role}_flushed"] = layer.seen[role].flushed if role in layer.seen else None
        rows.append(row)
    if exponents and run.keeps_files:
        with run.output("exponents.png", format="png") as path:
            _draw(exponents, path)
    return Metrics(values=values, tables={"exponents": rows})


def product_errors(model: nn.Module, run: Run, samples: int = 32) -> dict[str, float]:
    """Return by layer the largest error of its output against float64 over its largest output, on test samples."""
    found: dict[str, float] = {}

    def compare(layer: DFPLayer, arguments: tuple[Any, ...], output: Tensor) -> None:
        wide = _in_float64(layer.layer, arguments[0].double())
        largest = float(wide.abs().max())
        if layer.name not in found and largest > 0:
            found[layer.name] = float((output.double() - wide).abs().max()) / largest

    handles = [layer.register_forward_hook(compare) for layer in dfp_layers(model).values()]
    try:
        with eval_mode(model), torch.no_grad():
            run.forward(model, next(run.batches("test", samples, samples)))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _in_float64(layer: nn.Module, x: Tensor) -> Tensor:
    weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, bias)  # type: ignore[arg-type]
    output: Tensor = layer._conv_forward(x, weight, bias)  # type: ignore[operator]
    return output


def _draw(exponents: dict[str, dict[str, list[int]]], path: Any) -> None:
    """Draw the range of exponents of each layer's x, w and dy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(exponents)
    figure, axes = pyplot.subplots(figsize=(7.5, 1.2 + 0.45 * len(names)), layout="constrained")
    for offset, role, colour in zip((-0.25, 0.0, 0.25), ROLES, ("#1f77b4", "#2ca02c", "#d62728"), strict=True):
        spans = [(index + offset, exponents[name][role]) for index, name in enumerate(names) if role in exponents[name]]
        axes.barh(
            [place for place, _ in spans],
            [high - low + 0.6 for _, (low, high) in spans],
            left=[low - 0.3 for _, (low, _) in spans],
            height=0.2,
            color=colour,
            label=role,
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("shared exponent E over the training (a tensor is i 2^E)")
    axes.set_title("Dynamic fixed point: exponents of inputs (x), weights (w) and gradients (dy)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
