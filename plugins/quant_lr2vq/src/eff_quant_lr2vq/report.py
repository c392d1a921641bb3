"""What eff reports of a model compressed by LR2VQ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from eff.schemas import Metric, Metrics, TableRow
from eff_quant_kit.codebooks import index_bits
from eff_quant_kit.packed import sizes

HALF = 16
"""Bits of an entry of a codebook or projection."""


def layer_bits(plan: Mapping[str, Any]) -> int:
    """Return N ceil(log2 k) + 16 (k d + d m); without a projection (d = m) its part is not there."""
    k, d, m = plan["k"], plan["d"], plan["m"]
    return int(plan["sub_vectors"] * index_bits(k) + HALF * (k * d + (d * m if d < m else 0)))


def describe(model: nn.Module, structure: Mapping[str, Any]) -> Metrics:
    """Return errors, dimensions and size; empty before the model has been changed."""
    if not structure.get("hard"):
        return Metrics()
    rows: list[TableRow] = []
    weights = bits = 0
    for name, plan in structure["layers"].items():
        weights, bits = weights + plan["weights"], bits + layer_bits(plan)
        rows.append(
            {
                "layer": name,
                "m": plan["m"],
                "d": plan["d"],
                "k": plan["k"],
                "approximation": plan["approximation"] / plan["power"] if plan["power"] else 0.0,
                "clustering": plan["clustering"] / plan["power"] if plan["power"] else 0.0,
                "predicted": plan["predicted"][plan["d"] - 1] / plan["power"] if plan["power"] else 0.0,
                "bits_per_weight": layer_bits(plan) / plan["weights"],
            }
        )
    size = sum(sizes(model).values())
    values = {
        "packed_bytes": Metric(value=size, unit="B", better="lower"),
        "compression": Metric(value=structure["float_bytes"] / size, unit="x", better="higher"),
        "layer_compression": Metric(value=32 * weights / bits, unit="x", better="higher"),
        "mean_weight_bits": Metric(value=bits / weights, unit="bits", better="lower"),
    }
    return Metrics(values=values, tables={"layers": rows})


def draw_errors(structure: Mapping[str, Any], path: Path) -> None:
    """Draw the predicted error over d for every layer, with the chosen d and what came out after training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for name, plan in structure["layers"].items():
        if not plan["power"]:
            continue
        shares = [error / plan["power"] for error in plan["predicted"]]
        (line,) = axes.plot(range(1, len(shares) + 1), shares, label=name)
        axes.plot(plan["d"], shares[plan["d"] - 1], "o", color=line.get_color())
    axes.set_xlabel("clustering dimension d")
    axes.set_ylabel("predicted error / weight power")
    axes.set_ylim(bottom=0)
    axes.set_title("Low-rank plus clustering error; the dot is the d that was used", fontsize=10)
    axes.grid(alpha=0.3)
    if len(structure["layers"]) <= 12:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
