"""What quant_vq4dit measures: errors of weights, blocks and noise on a fresh path, what had to be forced, sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eff.run import Run
from eff.schemas import Metric, Metrics, TableRow
from eff_quant_kit.codebook_layers import CodebookLinear
from eff_quant_kit.codebooks import index_bits
from eff_quant_kit.diffusion.lookup import blocks
from eff_quant_kit.diffusion.sampling import Trajectories, path_error, predict_noise, trajectories
from eff_quant_kit.packed import sizes
from eff_quant_vq4dit.calibrate import PLUGIN, task_of

SAMPLES, STEPS, HALF = 64, 20, 16


def held_out_path(teacher: nn.Module, run: Run, name: str = "held out") -> Trajectories:
    """Return a path of the teacher from noise that calibration never draws."""
    task = task_of(run)
    generator = run.generator(f"{PLUGIN}/{name}")
    labels = task.labels(SAMPLES, generator)
    steps = task.schedule.respaced(min(STEPS, task.schedule.steps))
    return trajectories(teacher, task.schedule, steps, labels, task.shape, generator)


@torch.no_grad()
def block_errors(teacher: nn.Module, model: nn.Module, path: Trajectories) -> dict[str, float]:
    """Return by block the MSE of its output in the middle of a path."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for one in (teacher, model):
        for name, block in blocks(one).items():
            handles.append(
                block.register_forward_hook(
                    lambda *call, name=name: found.setdefault(name, []).append(
                        call[2][0] if isinstance(call[2], tuple) else call[2]
                    )
                )
            )
    place = len(path.t) // 2
    moments = torch.full((path.x.shape[1],), path.t[place], device=path.x.device)
    for one in (teacher, model):
        predict_noise(one, path.x[place], moments, path.labels)
    for handle in handles:
        handle.remove()
    return {name: float((outputs[0] - outputs[1]).square().mean()) for name, outputs in found.items()}


def measure(
    teacher: nn.Module, model: nn.Module, structure: Mapping[str, Any], forced: float, run: Run
) -> dict[str, Any]:
    """Return figures and tables for the checkpoint."""
    path = held_out_path(teacher, run)
    errors = path_error(model, path)
    layers: list[TableRow] = []
    total = power = 0.0
    for name, plan in structure["layers"].items():
        layer, float_layer = model.get_submodule(name), teacher.get_submodule(name)
        assert isinstance(layer, CodebookLinear) and isinstance(float_layer, nn.Linear)
        error = float((layer.weight() - float_layer.weight).detach().square().mean())
        total, power = total + error, power + float(float_layer.weight.detach().square().mean())
        layers.append({"layer": name, "k": plan["k"], "weight_mse": error, "kmeans_mse": plan["kmeans_mse"]})
    return {
        "measured": {
            "eps_mse": sum(errors) / len(errors),
            "weight_mse": total / max(1, len(layers)),
            "forced_share": 100 * forced,
        },
        "errors": [{"timestep": t, "eps_mse": error} for t, error in zip(path.t, errors, strict=True)],
        "blocks": [{"block": name, "mse": error} for name, error in block_errors(teacher, model, path).items()],
        "vq_layers": layers,
    }


def layer_bits(plan: Mapping[str, Any], d: int) -> float:
    """Return N log2 k + 16 k d."""
    rows = plan["shape"][0] * plan["shape"][1] // d
    return rows * index_bits(plan["k"]) + HALF * plan["k"] * d


def describe(model: nn.Module, structure: Mapping[str, Any], d: int) -> Metrics:
    """Return sizes and what was measured when the float model was at hand; empty before."""
    if "measured" not in structure:
        return Metrics()
    weights = sum(plan["shape"][0] * plan["shape"][1] for plan in structure["layers"].values())
    bits = sum(layer_bits(plan, d) for plan in structure["layers"].values())
    size = sum(sizes(model).values())
    values = {
        "mean_weight_bits": Metric(value=bits / weights, unit="bits", better="lower"),
        "packed_bytes": Metric(value=size, unit="B", better="lower"),
        "compression": Metric(value=structure["float_bytes"] / size, unit="x", better="higher"),
    }
    measured = structure["measured"]
    values |= {name: Metric(value=measured[name], better="lower") for name in ("eps_mse", "weight_mse")}
    values["forced_share"] = Metric(value=measured["forced_share"], unit="%", better="lower")
    return Metrics(values=values, tables={key: structure[key] for key in ("errors", "blocks", "vq_layers")})
