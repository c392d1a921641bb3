"""What quant_adapt reports: formats, sparsity, the performance model, and a picture of word lengths over the steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from eff.run import Run
from eff.schemas import Metric, Metrics, TableRow
from eff_quant_adapt.cost import Cost, multiply_adds, size_ratio
from eff_quant_adapt.layers import fixed_layers
from eff_quant_adapt.training import Trainer


def of_training(trainer: Trainer) -> dict[str, float]:
    """Return what only the training tells and the checkpoint keeps; empty before the first step."""
    lengths = trainer.word_lengths
    if not lengths:
        return {}
    return {"modelled_training_speedup": trainer.cost.training_speedup(), "mean_wl": sum(lengths) / len(lengths)}


def describe(model: nn.Module, trainer: Trainer | None, trained: Mapping[str, Any], run: Run) -> Metrics:
    """Return what is reported of a fixed-point model; empty without fixed-point layers."""
    layers = fixed_layers(model)
    if not layers:
        return Metrics()
    cost = trainer.cost if trainer else Cost(multiply_adds(model, run))
    weights = sum(layer.layer.weight.numel() for layer in layers.values())  # type: ignore[operator,union-attr,misc]
    bits = sum(layer.lengths[0] * layer.layer.weight.numel() for layer in layers.values())  # type: ignore[operator,union-attr]
    zeros = sum((1 - layer.density()) * layer.layer.weight.numel() for layer in layers.values())  # type: ignore[operator,union-attr]
    values = {
        "mean_weight_bits": Metric(value=float(bits / weights), unit="bits", better="lower"),
        "sparsity": Metric(value=float(100 * zeros / weights), unit="%"),
        "size_ratio": Metric(value=size_ratio(layers), better="lower"),
        "modelled_inference_speedup": Metric(value=cost.inference_speedup(layers), better="higher"),
    }
    rows: list[TableRow] = []
    for name, layer in layers.items():
        wl, fl = layer.lengths
        rows.append({"layer": name, "WL": wl, "FL": fl, "density": layer.density()})
    tables = {"formats": rows}
    if trained:
        speedup, mean = float(trained["modelled_training_speedup"]), float(trained["mean_wl"])
        values["modelled_training_speedup"] = Metric(value=speedup, better="higher")
        values["mean_wl_in_training"] = Metric(value=mean, unit="bits", better="lower")
    if trainer is not None and trainer.word_lengths:
        names = list(layers)
        tables["switches"] = [
            {"step": step, "layer": names[place], "WL": wl, "FL": fl, "lookback": lookback, "bins": bins}
            for step, place, wl, fl, lookback, bins in trainer.history
        ]
        if run.keeps_files:
            with run.output("word_lengths.png", format="png") as path:
                _draw(trainer, names, path)
    return Metrics(values=values, tables=tables)


def _draw(trainer: Trainer, names: list[str], path: Path) -> None:
    """Draw word length (full) and fraction length (dashed) of each layer over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    last = len(trainer.word_lengths)
    for place, name in enumerate(names):
        rows = [row for row in trainer.history if row[1] == place]
        steps = [row[0] for row in rows] + [last]
        colour = f"C{place % 10}"
        for column, style in ((2, "-"), (3, "--")):
            values = [row[column] for row in rows]
            axes.step(
                steps, [*values, values[-1]], style, where="post", color=colour, label=name if column == 2 else None
            )
    axes.set_xlabel("step")
    axes.set_ylabel("bits")
    axes.set_title("Word length (full) and fraction length (dashed) by layer")
    axes.set_ylim(0, 33)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
