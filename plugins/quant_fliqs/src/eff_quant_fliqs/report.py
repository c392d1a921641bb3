"""What quant_fliqs reports: the formats found, their probabilities, what a flip costs, and the Pareto plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eff.modes import eval_mode
from eff.run import Run
from eff.schemas import Metric, Metrics, TableRow
from eff_quant_fliqs.config import FLIQSConfig
from eff_quant_fliqs.layers import cost, format_layers, set_choices
from eff_quant_kit.packed import sizes

SAMPLES = 256
DRAWS = 24
MARKERS = "soD^vP"


def describe(model: nn.Module, config: FLIQSConfig, structure: Mapping[str, Any]) -> Metrics:
    """Return the metrics of a finished model; empty without switchable layers or before the search."""
    layers = format_layers(model)
    if not layers:
        return Metrics()
    weights = sum(structure["weights"].values())
    bits = sum(structure["weights"][name] * layer.format.bits for name, layer in layers.items())
    values = {
        "mean_weight_bits": Metric(value=bits / weights, unit="bits", better="lower"),
        "packed_bytes": Metric(value=sum(sizes(model).values()), unit="B", better="lower"),
    }
    tables: dict[str, list[TableRow]] = {}
    if "chosen" in structure:
        values["relative_cost"] = Metric(value=cost(structure, config, list(structure["chosen"])), better="lower")
        values["policy_entropy"] = Metric(value=structure["entropy"], unit="nats")
        tables["formats"] = structure["table"]
    return Metrics(values=values, tables=tables)


def search_table(
    model: nn.Module, config: FLIQSConfig, structure: Mapping[str, Any], probabilities: torch.Tensor, run: Run
) -> list[dict[str, Any]]:
    """Return by decision its format, probabilities, and the loss that each other format would add."""
    chosen = list(structure["chosen"])
    base = training_loss(model, run)
    rows = []
    for place, group in enumerate(structure["decisions"]):
        row: dict[str, Any] = {"layers": ", ".join(group), "format": config.formats[chosen[place]]}
        for index, name in enumerate(config.formats):
            row[f"p({name})"] = float(probabilities[place, index])
            if index != chosen[place]:
                set_choices(model, structure, [*chosen[:place], index, *chosen[place + 1 :]])
                row[f"loss if {name}"] = training_loss(model, run) - base
        rows.append(row)
    set_choices(model, structure, chosen)
    return rows


def training_loss(model: nn.Module, run: Run) -> float:
    """Return the loss on some training samples, in eval mode."""
    with eval_mode(model), torch.no_grad():
        batch = next(run.batches("train", SAMPLES, SAMPLES))
        return float(run.task.loss(run.forward(model, batch), batch))


def pareto_points(
    model: nn.Module, config: FLIQSConfig, structure: Mapping[str, Any], run: Run
) -> list[tuple[str, float, float]]:
    """Return (kind, cost, training loss) of the found formats, uniform ones and random ones, with the same weights."""
    count, chosen = len(structure["decisions"]), list(structure["chosen"])
    generator = run.generator("quant_fliqs/pareto")
    draws = torch.randint(len(config.formats), (DRAWS, count), generator=generator).tolist()
    settings = [("found", chosen), *((name, [index] * count) for index, name in enumerate(config.formats))]
    settings += [("random", draw) for draw in draws]
    points = []
    for kind, choices in settings:
        set_choices(model, structure, choices)
        points.append((kind, cost(structure, config, choices), training_loss(model, run)))
    set_choices(model, structure, chosen)
    return points


def draw(points: list[tuple[str, float, float]], target: float, path: Path) -> None:
    """Draw loss over cost with the lower left front."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    random = [point for point in points if point[0] == "random"]
    axes.scatter([p[1] for p in random], [p[2] for p in random], s=18, color="0.7", label="random formats")
    uniform = [point for point in points if point[0] not in ("random", "found")]
    # Formats of equal cost lie close: the legend names them, not the plot.
    for index, (kind, x, y) in enumerate(uniform):
        marker, colour = MARKERS[index % len(MARKERS)], f"C{index % 10}"
        axes.scatter([x], [y], s=45, marker=marker, facecolors="none", edgecolors=colour, linewidths=1.8, label=kind)
    front, least = [], float("inf")
    for _, x, y in sorted(points, key=lambda point: (point[1], point[2])):
        if y < least:
            least = y
            front.append((x, y))
    axes.plot([x for x, _ in front], [y for _, y in front], color="0.5", linewidth=1, label="front")
    _, x, y = points[0]
    axes.scatter([x], [y], s=110, marker="*", color="black", label="found by the policy", zorder=4)
    axes.axvline(target, color="black", linestyle=":", linewidth=1, label="target")
    axes.set_xlabel("cost relative to 8 bits everywhere")
    axes.set_ylabel("loss on training samples")
    axes.set_title("Formats with the same shared weights")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
