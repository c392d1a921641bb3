"""What eff reports of a model with learned rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from eff.schemas import Metric, Metrics
from eff_quant_kit.layers import quant_layers
from eff_quant_kit.packed import size_metrics


def describe(model: nn.Module, structure: Mapping[str, Any]) -> Metrics:
    """Return bits, size, and per unit the error of nearest and of learned rounding; empty for other models."""
    layers = quant_layers(model)
    if not layers or "layers" not in structure:
        return Metrics()
    values = {
        **size_metrics(model),
        "clipped_weights": Metric(value=100 * structure["clipped_share"], unit="%"),
    }
    rows = [dict(row) for row in structure.get("units", ())]
    if rows:
        values["rounding_flips"] = Metric(value=100 * sum(row["flips"] for row in rows) / len(rows), unit="%")
        values["least_decided"] = Metric(value=min(row["decided_before_rounding"] for row in rows))
    table = [{"layer": name, "mean_bits": layer.weight_bits} for name, layer in layers.items()]
    return Metrics(values=values, tables={"units": rows, "bits": table} if rows else {"bits": table})
