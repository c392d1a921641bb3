"""What quant_double_rounding reports: every width, nestedness, scale gradients, subnets."""

from __future__ import annotations

from typing import Any

from torch import nn

from eff.data import Data
from eff.measure import task_metrics
from eff.run import Run
from eff.schemas import Metric, Metrics, TableRow
from eff_quant_double_rounding.config import DoubleRoundingConfig
from eff_quant_double_rounding.layers import SwitchNorm, switch, switch_layers
from eff_quant_kit.packed import pack_state, sizes


def describe(
    model: nn.Module, data: Data | None, run: Run, config: DoubleRoundingConfig, structure: dict[str, Any], width: int
) -> Metrics:
    """Return the metrics; empty for a model without switchable layers. Leaves the model at `width`."""
    layers = switch_layers(model)
    if not layers:
        return Metrics()
    size = sizes(model)
    weights = [layer.layer.weight.numel() for layer in layers.values()]  # type: ignore[union-attr,operator]
    bits = sum(layer.width * count for layer, count in zip(layers.values(), weights, strict=True))
    values = {
        "width": Metric(value=width, unit="bits"),
        "mean_weight_bits": Metric(value=bits / sum(weights), unit="bits", better="lower"),
        "packed_bytes": Metric(value=sum(size.values()), unit="B", better="lower"),
        "code_bytes": Metric(value=size["code_bytes"], unit="B", better="lower"),
        "norm_bytes": Metric(value=_norm_bytes(model), unit="B", better="lower"),
        "nested_layers": Metric(value=100 * sum(layer.nested() for layer in layers.values()) / len(layers), unit="%"),
    }
    tables: dict[str, list[TableRow]] = {}
    if data is not None:
        rows: list[TableRow] = []
        for b in config.widths:
            switch(model, structure, b)
            name, metric = next(iter(task_metrics(model, data, run).values.items()))
            row: TableRow = {"bits": b, name: metric.value}
            if b in (found := {int(k): v for k, v in structure.get("scale_gradients", {}).items()}):
                row["scale_gradient"] = found[b]
            rows.append(row)
            values[f"{name}_{b}_bits"] = metric
        tables["widths"] = rows
        if nets := structure.get("subnets"):
            subs: list[TableRow] = []
            for net, loss in zip(nets, structure["subnet_losses"], strict=True):
                switch(model, structure, net)
                name, metric = next(iter(task_metrics(model, data, run).values.items()))
                mean = sum(net.values()) / len(net)
                subs.append(
                    {
                        "mean_bits": mean,
                        "train_loss": loss,
                        name: metric.value,
                        "bits": "-".join(map(str, net.values())),
                    }
                )
            tables["subnets"] = subs
    switch(model, structure, width)
    return Metrics(values=values, tables=tables)


def _norm_bytes(model: nn.Module) -> int:
    """Return the bytes of the switchable norms in the file."""
    norms = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, SwitchNorm))
    return sum(value.nbytes for key, value in pack_state(model)[0].items() if norms and key.startswith(norms))
