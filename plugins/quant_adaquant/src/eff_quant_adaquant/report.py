"""What eff reports of a model that AdaQuant quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from eff.schemas import Metric, Metrics, TableRow
from eff_quant_kit.layers import quant_layers
from eff_quant_kit.packed import size_metrics


def describe(model: nn.Module, structure: Mapping[str, Any]) -> Metrics:
    """Return bits, size and the programme's prediction beside the truth; empty for a model without quantizers."""
    if not quant_layers(model) or "bits" not in structure:
        return Metrics()
    values = size_metrics(model)
    values["ratio_to_float32"] = Metric(value=values["mean_weight_bits"].value / 32, better="lower")
    if programme := structure.get("programme"):
        values["predicted_loss"] = Metric(value=programme["predicted_loss"], better="lower")
        values["true_loss"] = Metric(value=programme["true_loss"], better="lower")
    final = {name: pair for name, pair in structure["bits"].items()}
    measured = {(row["layer"], row["bits"]): row for row in structure.get("layers", ())}
    rows: list[TableRow] = []
    for name, (weight_bits, act_bits) in final.items():
        row = measured.get((name, weight_bits), {})
        rows.append(
            {
                "layer": name,
                "weight_bits": weight_bits,
                "input_bits": act_bits,
                "held_out_error_before": row.get("error_before"),
                "held_out_error_after": row.get("error_after"),
            }
        )
    return Metrics(values=values, tables={"layers": rows})
