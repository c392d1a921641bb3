"""How much each layer minds fewer bits, by four measures; what `eff sensitivity` writes and mixed-precision methods read.

| measure | per layer | source |
| --- | --- | --- |
| output_error | mean squared change of the network's output with this layer alone at b bits | AdaQuant, arXiv:2006.10518, sec. 3 |
| kl | mean KL(softmax of float || softmax of quantized), nats; classifiers | |
| hessian | average Hessian trace times squared weight error at b bits | HAWQ-V3, arXiv:2011.10680, eq. 11 |
| fisher | sum of mean squared gradients times squared weight changes at b bits, halved | |

Weights are rounded to nearest, per output channel, symmetric, on their min-max range. Memory holds one batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from eff.errors import RequestError, RunError, UnsupportedModelError, did_you_mean
from eff.files import write_text
from eff.modes import eval_mode, gradients_for
from eff.run import Run
from eff.schemas import Schema
from eff_quant_kit.calibration import CalibrationSet
from eff_quant_kit.layers import execution_order, find_layers
from eff_quant_kit.observers import minmax_symmetric
from eff_quant_kit.quantizer import SMALLEST_SCALE, integer_range

Measure = Literal["output_error", "kl", "hessian", "fisher"]
MEASURES: tuple[Measure, ...] = ("output_error", "kl", "hessian", "fisher")
AXES: dict[Measure, str] = {
    "output_error": "output error: mean squared change of the outputs",
    "kl": "KL divergence of the predictions, nats",
    "hessian": "Hessian trace, average, times squared weight error",
    "fisher": "Fisher information times squared weight error, halved",
}
FILE = "sensitivity.json"


class LayerSensitivity(Schema):
    """One layer. The values of a measure are by bits, as text, because JSON has no other keys."""

    layer: str
    parameters: int
    values: dict[Measure, dict[str, float]]
    hessian_trace: float | None = Field(None, description="Average: the trace divided by the number of weights.")
    trace_draws: int | None = None


class Sensitivity(Schema):
    """What `eff sensitivity` writes."""

    model: str
    data: str
    samples: int
    bits: tuple[int, ...]
    layers: tuple[LayerSensitivity, ...]

    def table(self, measure: Measure, bits: Sequence[int], names: Sequence[str], plugin: str) -> list[list[float]]:
        """Return the costs (layers, bits) of the named layers, for a bit allocation.

        Raises:
            RequestError: the file lacks a layer, a number of bits or the measure.
        """
        rows = []
        for item in self._named(names, plugin):
            values = item.values.get(measure)
            if values is None:
                raise RequestError(f"{plugin}: the sensitivity file has no {measure}; it has {', '.join(item.values)}")
            missing = [item for item in bits if str(item) not in values]
            if missing:
                raise RequestError(
                    f"{plugin}: the sensitivity file has no {missing[0]} bits; it has {', '.join(values)}"
                )
            rows.append([values[str(item)] for item in bits])
        return rows

    def traces(self, names: Sequence[str], plugin: str) -> dict[str, float]:
        """Return the average Hessian trace of the named layers.

        Raises:
            RequestError: the file lacks a layer or its trace.
        """
        found = {}
        for item in self._named(names, plugin):
            if item.hessian_trace is None:
                raise RequestError(
                    f"{plugin}: the sensitivity file has no Hessian traces; run eff sensitivity --metric hessian"
                )
            found[item.layer] = item.hessian_trace
        return found

    def _named(self, names: Sequence[str], plugin: str) -> list[LayerSensitivity]:
        known = {item.layer: item for item in self.layers}
        for name in names:
            if name not in known:
                raise RequestError(f"{plugin}: the sensitivity file has no layer '{name}'{did_you_mean(name, known)}")
        return [known[name] for name in names]


def read_sensitivity(path: Path) -> Sensitivity:
    """Return what `eff sensitivity` wrote.

    Raises:
        RequestError: the file is missing or is something else.
    """
    try:
        return Sensitivity.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"sensitivity file {path}: {error.strerror}; make one with eff sensitivity") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise RequestError(
            f"sensitivity file {path}: {first['msg']} at {first['loc']}; make one with eff sensitivity"
        ) from error


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return a weight rounded to nearest on the symmetric min-max grid of each output channel."""
    q_min, q_max = integer_range(bits, signed=True)
    scale = minmax_symmetric(weight, q_max, axis=0).clamp(min=SMALLEST_SCALE).view(-1, *[1] * (weight.ndim - 1))
    return (weight / scale).round().clamp(q_min, q_max) * scale


@sdpa_kernel(SDPBackend.MATH)  # fused attention has no second derivative
def hessian_traces(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    losses: Callable[[], Iterable[tuple[Tensor, float]]],
    generator: torch.Generator,
    draws: int = 100,
    tolerance: float = 1e-3,
) -> dict[str, tuple[float, int]]:
    """Return the trace of each weight's Hessian block and the draws it took (Hutchinson, as PyHessian, MIT, stops).

    E[v^T H v] over v with entries +-1. One product H v serves all weights: what one weight's v meets of another's is 0
    on average. Ends when no running mean changes by more than `tolerance`, relatively, or after `draws`.

    Args:
        model: in eval mode.
        weights: parameters by name.
        losses: yields (mean loss with graph, share of the samples) batch by batch; called once per draw.
        generator: of the random signs, on the CPU.
        draws: at most this many.
        tolerance: relative change that ends the estimate.

    Raises:
        RunError: the loss cannot be differentiated twice, or a trace is not finite.
    """
    names, tensors = list(weights), list(weights.values())
    sums = torch.zeros(len(names), dtype=torch.float64)
    mean = torch.zeros(len(names), dtype=torch.float64)
    count = 0
    for count in range(1, draws + 1):
        signs = [
            (torch.randint(2, tensor.shape, generator=generator) * 2 - 1).to(tensor.dtype).to(tensor.device)
            for tensor in tensors
        ]
        products = torch.zeros(len(names), dtype=torch.float64)
        for loss, share in losses():
            try:
                gradients = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
                used = [index for index, gradient in enumerate(gradients) if gradient is not None]
                along = sum((gradients[index] * signs[index]).sum() for index in used)
                second = torch.autograd.grad(along, [tensors[index] for index in used], allow_unused=True)  # type: ignore[arg-type]
            except RuntimeError as error:
                raise RunError(f"the loss cannot be differentiated twice ({str(error).splitlines()[0]})") from error
            for index, product in zip(used, second, strict=True):
                if product is not None:
                    products[index] += share * float((product * signs[index]).sum())
        sums += products
        before, mean = mean, sums / count
        if not bool(torch.isfinite(mean).all()):
            raise RunError(f"the Hessian trace of {names[int((~torch.isfinite(mean)).nonzero()[0])]} is not finite")
        if count > 1 and bool(((mean - before).abs() <= tolerance * (before.abs() + 1e-6)).all()):
            break
    return {name: (float(value), count) for name, value in zip(names, mean, strict=True)}


def task_losses(
    model: nn.Module, calibration: CalibrationSet, run: Run
) -> Callable[[], Iterator[tuple[Tensor, float]]]:
    """Return what yields the task's loss with its graph, batch by batch, as `hessian_traces` wants it."""

    def losses() -> Iterator[tuple[Tensor, float]]:
        for size, batch in zip(calibration.sizes, calibration, strict=True):
            with torch.enable_grad():
                yield run.task.loss(run.forward(model, batch), batch), size / len(calibration)

    return losses


def fisher_diagonals(
    model: nn.Module, weights: Mapping[str, Tensor], calibration: CalibrationSet, run: Run
) -> dict[str, Tensor]:
    """Return the mean over samples of each weight's squared gradient (the empirical Fisher's diagonal)."""
    totals = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    for batch in calibration:
        size = len(next(value for value in batch.values() if isinstance(value, Tensor)))
        for row in range(size):
            one = {key: value[row : row + 1] if isinstance(value, Tensor) else value for key, value in batch.items()}
            with torch.enable_grad():
                loss = run.task.loss(run.forward(model, one), one)
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    totals[name] += gradient.square()
    return {name: total / len(calibration) for name, total in totals.items()}


def measure_sensitivity(
    model: nn.Module,
    run: Run,
    calibration: CalibrationSet,
    measures: Sequence[Measure] = MEASURES,
    bits: Sequence[int] = (8, 4, 3, 2),
    source: str = "",
    draws: int = 100,
    tolerance: float = 1e-3,
) -> Sensitivity:
    """Return the measures of every convolution and linear layer, in the order of execution.

    Raises:
        UnsupportedModelError: there are none. RequestError: `kl` on a model that is no classifier.
        RunError: a measure is not finite.
    """
    layers = find_layers(model)
    if not layers:
        raise UnsupportedModelError(f"found no Linear or Conv in {type(model).__name__}; there is nothing to measure")
    if "kl" in measures and not hasattr(run.task.options, "classes"):
        raise RequestError(f"kl compares classes; this model's task is {run.task.name}: leave out --metric kl")
    first = next(iter(calibration))
    order = execution_order(model, layers, lambda: run.forward(model, first))
    weights: dict[str, Tensor] = {name: layers[name].weight for name in order}  # type: ignore[misc]
    values: dict[str, dict[Measure, dict[str, float]]] = {name: {} for name in order}
    traces: dict[str, tuple[float, int]] = {}
    if "output_error" in measures or "kl" in measures:
        _measure_outputs(model, run, calibration, measures, bits, weights, values)
    with eval_mode(model), gradients_for(model, model.parameters()):
        if "hessian" in measures:
            generator = run.generator("hessian")
            traces = hessian_traces(model, weights, task_losses(model, calibration, run), generator, draws, tolerance)
            for name, weight in weights.items():
                average = traces[name][0] / weight.numel()
                values[name]["hessian"] = {str(b): average * _weight_error(weight, b) for b in bits}
        if "fisher" in measures:
            diagonals = fisher_diagonals(model, weights, calibration, run)
            for name, weight in weights.items():
                changes = {b: (rounded(weight.detach(), b) - weight.detach()).square() for b in bits}
                values[name]["fisher"] = {str(b): 0.5 * float((diagonals[name] * changes[b]).sum()) for b in bits}
    return Sensitivity(
        model=source or type(model).__name__,
        data=str(run.data.spec) if run.data else "",
        samples=len(calibration),
        bits=tuple(bits),
        layers=tuple(
            LayerSensitivity(
                layer=name,
                parameters=weights[name].numel(),
                values=values[name],
                hessian_trace=traces[name][0] / weights[name].numel() if traces else None,
                trace_draws=traces[name][1] if traces else None,
            )
            for name in order
        ),
    )


def _weight_error(weight: Tensor, bits: int) -> float:
    return float((rounded(weight.detach(), bits) - weight.detach()).square().sum())


@torch.no_grad()
def _measure_outputs(
    model: nn.Module,
    run: Run,
    calibration: CalibrationSet,
    measures: Sequence[Measure],
    bits: Sequence[int],
    weights: Mapping[str, Tensor],
    values: dict[str, dict[Measure, dict[str, float]]],
) -> None:
    """Quantize each layer alone and compare the network's outputs with those before, batch by batch."""
    outputs = [run.forward(model, batch).cpu() for batch in calibration]  # small beside the batches
    for name, weight in run.log.track(weights.items(), "sensitivity"):
        original = weight.detach().clone()
        for b in bits:
            weight.copy_(rounded(original, b))
            error = divergence = 0.0
            for float_output, size, batch in zip(outputs, calibration.sizes, calibration, strict=True):
                output, reference = run.forward(model, batch), float_output.to(run.device)
                error += size * float((output - reference).square().mean())
                if "kl" in measures:
                    divergence += float(
                        F.kl_div(output.log_softmax(1), reference.log_softmax(1), reduction="sum", log_target=True)
                    )
            weight.copy_(original)
            if "output_error" in measures:
                values[name].setdefault("output_error", {})[str(b)] = error / len(calibration)
            if "kl" in measures:
                values[name].setdefault("kl", {})[str(b)] = divergence / len(calibration)


def write_sensitivity(found: Sensitivity, folder: Path) -> list[Path]:
    """Write sensitivity.json and one bar chart per measure; returns the paths."""
    path = folder / FILE
    write_text(path, found.model_dump_json(indent=2))
    return [path, *(_chart(found, measure, folder) for measure in found.layers[0].values)]


def _chart(found: Sensitivity, measure: Measure, folder: Path) -> Path:
    """Draw one measure: a group of bars per layer, darker with fewer bits, on a logarithmic scale."""
    from eff.use import load_pyplot, save_figure

    pyplot = load_pyplot()
    names = [item.layer for item in found.layers]
    figure, axes = pyplot.subplots(figsize=(8, 1.6 + 0.28 * len(names)), layout="constrained")
    height = 0.8 / len(found.bits)
    for index, b in enumerate(found.bits):
        places = [row + height * index for row in range(len(names))]
        costs = [item.values[measure][str(b)] for item in found.layers]
        shade = pyplot.get_cmap("Blues")(1.0 - 0.7 * sum(other < b for other in found.bits) / len(found.bits))
        axes.barh(places, costs, height=height, color=shade, label=f"{b} bits")
        for place, cost in zip(places, costs, strict=True):
            if cost <= 0:  # has no place on the scale
                where = axes.get_yaxis_transform()
                axes.text(0.005, place, "0 or less", transform=where, fontsize=5, va="center")
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names, fontsize=8)
    axes.set_ylim(len(names) - height / 2, -height)
    axes.set_xscale("log")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel(AXES[measure])
    axes.set_title(f"{found.model}: what each layer alone costs", fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(found.bits), fontsize=8, frameon=False)
    path = folder / f"sensitivity_{measure}.png"
    save_figure(figure, path)
    pyplot.close(figure)
    return path


def parse_measures(text: str) -> tuple[Measure, ...]:
    """Return the measures that a user named with commas; "all" for every one.

    Raises:
        RequestError: an unknown name.
    """
    if text == "all":
        return MEASURES
    names: list[Any] = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in MEASURES:
            raise RequestError(
                f"there is no measure '{name}'{did_you_mean(name, MEASURES)}; known: {', '.join(MEASURES)}, all"
            )
    return tuple(names)
