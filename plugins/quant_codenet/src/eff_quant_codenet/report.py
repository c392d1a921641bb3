"""What quant_codenet reports: multiply-accumulates, sizes, and where the deformable convolutions look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eff.data import Data
from eff.modes import eval_mode
from eff.run import Run
from eff.schemas import Metric, Metrics, TableRow
from eff_quant_codenet.deform import DeformConv2d
from eff_quant_codenet.quantizers import QuantConv, RunningRange
from eff_quant_kit.layers import QuantLayer
from eff_quant_kit.packed import sizes

OFFSET_SAMPLES = 64
BILINEAR_MACS = 4


def describe(model: nn.Module, data: Data | None, run: Run) -> Metrics:
    """Return the metrics of a detector, quantized or not."""
    layers = count_macs(model, run)
    values = {"macs": Metric(value=sum(row["macs"] for row in layers), better="lower")}
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, (QuantLayer, QuantConv))}
    if quantized:
        for row in layers:
            quantizer = getattr(quantized.get(row["layer"]), "weight_quantizer", None)
            row["bits"] = 32 if quantizer is None else quantizer.bits
        bits = sum(row["bits"] * row["weights"] for row in layers)
        values["mean_weight_bits"] = Metric(value=bits / sum(row["weights"] for row in layers), unit="bits")
        size = sizes(model)
        values["weight_bytes"] = Metric(value=size["code_bytes"], unit="B", better="lower")
        values["model_bytes"] = Metric(value=sum(size.values()), unit="B", better="lower")
    tables: dict[str, list[TableRow]] = {"layers": layers}
    if ranges := [(name, module) for name, module in model.named_modules() if isinstance(module, RunningRange)]:
        tables["activations"] = [
            {"tensor": name, "bits": module.bits, "scale": float(module.scale), "zero_point": module.zero_point}
            for name, module in ranges
        ]
    if data is not None and (offsets := offset_histogram(model, data, run)):
        tables["offsets"] = offsets
    return Metrics(values=values, tables=tables)


def count_macs(model: nn.Module, run: Run) -> list[TableRow]:
    """Return the multiply-accumulates of each convolution for one image; `sampling` is the interpolation, 0 when gathering."""
    rows: dict[str, TableRow] = {}
    wrapped = (QuantLayer, QuantConv)
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, wrapped))

    def watch(name: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, DeformConv2d):
                sampled = 0 if module.offset is None or module.rounds else BILINEAR_MACS
                macs = sampled * inputs[0].shape[1] * module.kernel**2 * output.shape[-2] * output.shape[-1]
                if macs:
                    rows[f"{name} (sampling)"] = {"layer": f"{name} (sampling)", "weights": 0, "macs": macs}
                return
            conv = module.layer if isinstance(module, wrapped) else module
            weights: Tensor = conv.weight  # type: ignore[union-attr, assignment]
            each = output.shape[-2] * output.shape[-1] * weights.numel()
            rows[name] = {"layer": name, "weights": weights.numel(), "macs": each}

        return count

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, (DeformConv2d, *wrapped))
        or (isinstance(module, nn.Conv2d) and not name.startswith(inside))
    ]
    try:
        with eval_mode(model), torch.inference_mode():
            model(*(value.to(run.device) for value in run.task.example_inputs(1)))
    finally:
        for handle in handles:
            handle.remove()
    return list(rows.values())


def offset_histogram(model: nn.Module, data: Data, run: Run) -> list[TableRow]:
    """Return how often each rounded value of s (`square`) or of an offset occurs, in % by layer, on test images."""
    counts: dict[str, Counter[int]] = {}

    def watch(name: str) -> Callable[..., None]:
        def count(module: Any, inputs: tuple[Tensor, ...]) -> None:
            found, times = module.offset_map(inputs[0]).round().long().unique(return_counts=True)
            counts.setdefault(name, Counter()).update(dict(zip(found.tolist(), times.tolist(), strict=True)))

        return count

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, DeformConv2d) and module.offset is not None
    ]
    if not handles:
        return []
    try:
        with eval_mode(model), torch.inference_mode():
            for batch in run.batches("test", OFFSET_SAMPLES):
                run.forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    values = sorted({value for counter in counts.values() for value in counter})
    return [
        {"offset": value, **{name: 100 * counter[value] / counter.total() for name, counter in counts.items()}}
        for value in values
    ]
