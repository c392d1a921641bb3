"""Figures that a person would rather look at: eigen-filters, coefficients, drift, quality by depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from eff.errors import MissingDependencyError
from eff.run import Run
from eff.use import load_pyplot
from eff_eval_filter_db.drift import Drift, density_curves

if TYPE_CHECKING:
    from eff_eval_filter_db.analysis import Analysis

# Okabe and Ito's colours, told apart with every kind of colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#888888"
_MOST_GROUPS = 14
_MOST_ANNOTATED = 12
_LONGEST_NAME = 34


def draw_all(found: Analysis, run: Run) -> None:
    """Write all figures; a warning where matplotlib is missing."""
    try:
        pyplot = load_pyplot()
    except MissingDependencyError:
        run.warn("eval_filter_db: figures are left out, matplotlib is not installed; pip install 'eff-core[plots]'")
        return
    figures: dict[str, Callable[[Any, Analysis], Any]] = {
        "eigen_filters.png": eigen_filters,
        "coefficients.png": coefficients,
        "layer_quality.png": layer_quality,
    }
    if found.drift is not None:
        figures["drift.png"] = lambda plt, analysis: drift_matrix(plt, analysis.drift)
    for name, make in figures.items():
        figure = make(pyplot, found)
        with run.output(name, "png") as path:
            figure.savefig(path, format="png", dpi=150)
        pyplot.close(figure)


def short(name: str) -> str:
    """Return a name that fits a figure."""
    half = (_LONGEST_NAME - 3) // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}...{name[-half:]}"


def eigen_filters(pyplot: Any, found: Analysis) -> Any:
    """Return the eigen-filters in order, with the share of variance each explains."""
    basis, side = found.basis, found.config.kernel
    shown = min(len(basis.ratios), 9)
    figure, axes = pyplot.subplots(1, shown, figsize=(1.25 * shown + 1.2, 2.5), layout="constrained")
    largest = float(np.abs(basis.components[:shown]).max())
    for index, axis in enumerate(axes):
        image = axis.imshow(
            basis.components[index].reshape(side, side), cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="equal"
        )
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{index + 1}\n{100 * basis.ratios[index]:.1f} %", fontsize=10)
    figure.colorbar(image, ax=axes, fraction=0.02, label="weight")
    models = len({layer.model for layer in found.layers})
    of = found.measured if models == 1 else f"{models} models"
    rest = "" if shown == len(basis.ratios) else f", the first {shown} of {len(basis.ratios)}"
    figure.suptitle(f"Eigen-filters of {basis.count:,} {side}x{side} filters of {of}, and variance explained{rest}")
    return figure


def coefficients(pyplot: Any, found: Analysis) -> Any:
    """Return the density of each coefficient, a row per group and a column per eigen-filter."""
    names = _most_different(found)
    rows = [(name, found.groups[name], _COLOURS[0]) for name in names]
    rows.append(("re-initialised", found.copies, _GREY))
    curves = [density_curves(layers, found.projector) for _, layers, _ in rows]
    columns = min(len(found.basis.ratios), 9)
    figure, axes = pyplot.subplots(
        1, columns, figsize=(1.35 * columns + 2.2, 1.6 + 0.5 * len(rows)), sharey=True, layout="constrained"
    )
    shown = [np.stack([curve[axis] for _, curve in curves]) for axis in range(columns)]
    for axis, ax in enumerate(axes):
        for place, (_, _, colour) in enumerate(rows):
            base = len(rows) - 1 - place
            height = shown[axis][place] / shown[axis][place].max() * 0.9
            ax.fill_between(curves[place][0], base, base + height, color=colour, alpha=0.55, linewidth=0)
            ax.plot(curves[place][0], base + height, color=colour, linewidth=0.8)
        ax.axvline(0, color="black", linewidth=0.5, alpha=0.5)
        ax.set_title(f"{axis + 1} ({100 * found.basis.ratios[axis]:.0f} %)", fontsize=10)
        ax.set_xlim(found.projector.range)
        ax.tick_params(labelsize=8)
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks([len(rows) - 1 - place for place in range(len(rows))], [short(name) for name, _, _ in rows])
    left_out = len(found.groups) - len(names)
    more = f"; the {len(names)} most different of {len(found.groups)} groups" if left_out else ""
    figure.suptitle(f"Coefficients on each eigen-filter, every curve scaled to its peak{more}", fontsize=11)
    figure.supxlabel("coefficient", fontsize=10)
    return figure


def _most_different(found: Analysis) -> list[str]:
    names = list(found.groups)
    if found.drift is None or len(names) <= _MOST_GROUPS:
        return names
    kept = set(found.drift.names[-_MOST_GROUPS:])
    return [name for name in names if name in kept]


def drift_matrix(pyplot: Any, drift: Drift) -> Any:
    """Return the matrix of distances, sorted by their means, and the box plot of all pairs."""
    count = len(drift.names)
    side = min(max(3.2, 0.62 * count), 13)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(side + 5.6, side + 1.6), width_ratios=(side, 1.6), layout="constrained"
    )
    image = left.imshow(drift.matched, cmap="viridis", vmin=0)
    names = [short(name) for name in drift.names]
    size = 9 if count <= 24 else 6
    left.set_xticks(range(count), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
    left.set_yticks(range(count), names, fontsize=size)
    if count <= _MOST_ANNOTATED:
        middle = drift.matched.max() / 2
        for (row, column), value in np.ndenumerate(drift.matched):
            colour = "black" if value > middle else "white"
            left.text(column, row, f"{value:.2g}", ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(image, ax=left, label="D (nats)", shrink=0.8)
    left.set_title("sorted by mean D", fontsize=10)
    right.boxplot(drift.upper(), widths=0.5)
    right.axhline(drift.floor, color=_COLOURS[1], linestyle="--", label="two draws\nfrom one pool")
    right.set_ylim(bottom=0)
    right.set_xticks([1], ["all pairs"])
    right.set_ylabel("D (nats)")
    right.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06), frameon=False)
    figure.suptitle(f"Shift between groups, {drift.drawn:,} filters drawn from each", fontsize=12)
    return figure


def layer_quality(pyplot: Any, found: Analysis) -> Any:
    """Return sparsity, variance entropy and orthogonality over the depth, one panel each."""
    figure, axes = pyplot.subplots(3, 1, figsize=(9.5, 9), sharex=True, layout="constrained")
    models = list(dict.fromkeys(row["model"] for row in found.table))
    shown = models[: len(_COLOURS)]
    for model, colour in zip(shown, _COLOURS, strict=False):
        rows = [row for row in found.table if row["model"] == model]
        strong = (
            {"linewidth": 1.8, "markersize": 5} if model == found.measured else {"linewidth": 1.1, "markersize": 3.5}
        )
        for axis, key in zip(axes, ("sparsity", "entropy", "orthogonality"), strict=True):
            points = [(row["depth"], row[key]) for row in rows if row[key] is not None]
            label = short(model) if axis is axes[0] else None
            axis.plot(*_columns(points), "-o", color=colour, label=label, **strong)
    own = [row for row in found.table if row["model"] == found.measured]
    for axis, key in zip(axes, ("sparsity", "entropy", "orthogonality"), strict=True):
        points = [(row["depth"], row[f"{key}_reinitialised"]) for row in own if row[f"{key}_reinitialised"] is not None]
        label = f"{short(found.measured)}, re-initialised" if axis is axes[0] else None
        axis.plot(*_columns(points), "--", color=_GREY, label=label, linewidth=1.4)
        axis.grid(alpha=0.25)
    thresholds = [(row["depth"], row["threshold"]) for row in own if row["threshold"] is not None]
    axes[1].plot(*_columns(thresholds), ":", color="black", label="T(n): as random as noise")
    axes[1].axhline(found.config.low_entropy, color="black", linewidth=0.8, label="low diversity below")
    axes[0].set(ylabel="sparse filters, share", ylim=(-0.03, 1.03))
    axes[1].set(ylabel="variance entropy", ylim=(-0.03, max(1.0, np.log10(found.config.kernel**2) * 1.05)))
    axes[2].set(ylabel="orthogonality", ylim=(-0.03, 1.03), xlabel="normalised depth", xlim=(-0.02, 1.02))
    axes[0].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    if not any(row["orthogonality"] is not None for row in found.table):
        bare = all(layer.groups is None for layer in found.layers)
        why = "not known: bare weights without an architecture" if bare else "not defined: one output channel per group"
        axes[2].text(0.5, 0.5, why, ha="center", va="center", color=_GREY)
    left_out = len(models) - len(shown)
    figure.suptitle("Quality of each layer" + (f" ({left_out} models left out)" if left_out else ""), fontsize=12)
    return figure


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
