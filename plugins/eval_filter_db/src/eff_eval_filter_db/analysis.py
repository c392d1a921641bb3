"""One measurement: from layers to tables, files and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from eff.run import Run
from eff.schemas import Metric, Metrics
from eff_eval_filter_db.basis import Basis, fit_basis
from eff_eval_filter_db.config import PAPER_KERNEL, FilterDBConfig
from eff_eval_filter_db.database import FILE, write_database
from eff_eval_filter_db.drift import Drift, Projector, measure_drift
from eff_eval_filter_db.layers import Layer, layers_of_model, reinitialised
from eff_eval_filter_db.quality import Quality, layer_quality
from eff_eval_filter_db.sources import model_name

REINITIALISED = "re-initialised"
Row = dict[str, Any]


@dataclass(frozen=True)
class Analysis:
    """Everything that was found, for files and figures."""

    config: FilterDBConfig
    layers: list[Layer]
    measured: str
    """Name of the measured model; the rest are others."""
    copies: list[Layer]
    """The measured model's layers, re-initialised."""
    basis: Basis
    """Of all layers together, the copies left out."""
    groups: dict[str, list[Layer]]
    projector: Projector
    drift: Drift | None
    table: list[Row]
    """One row per layer."""


def analyse(model: nn.Module, others: list[Layer], config: FilterDBConfig, run: Run) -> Metrics:
    """Return the metrics of a model, and write files and figures where the run keeps files.

    Raises:
        UnsupportedModelError: the model has no such filters, or weights that are no finite floats.
    """
    name = model_name(config, run)
    own = [replace(layer, tag=config.tag, task=run.task.name) for layer in layers_of_model(model, name, config.kernel)]
    copies = [reinitialised(layer, REINITIALISED, run.generator) for layer in own]
    layers = [*own, *others]
    size = config.kernel**2
    groups = kept_groups(layers, config, run)
    basis = fit_basis(layers, size, config.scale, config.dtype)
    projector = Projector(basis, layers, config.bins, config.scale, config.dtype)
    drift = measure_drift(groups, projector, _rng(run)) if len(groups) > 1 else None
    table = layer_table(own, others, copies, config)
    found = Analysis(config, layers, name, copies, basis, groups, projector, drift, table)
    _warn(model, found, run)
    own_basis = basis if not others else fit_basis(own, size, config.scale, config.dtype)
    again = _drift_from_copies(own, copies, config, run)
    if run.keeps_files:
        _write_files(found, own_basis, run)
    return Metrics(values=_values(found, own_basis, again), tables=_tables(found))


def _rng(run: Run) -> np.random.Generator:
    return np.random.default_rng(run.generator("eval_filter_db/draw").initial_seed())


def group_of(layer: Layer, config: FilterDBConfig) -> str:
    """Return the name of the group that a layer belongs to."""
    if config.group_by == "layer":
        return f"{layer.model}/{layer.name}"
    if config.group_by == "depth":
        place = depth_bin(layer, config)
        return f"depth {place / config.depth_bins:.2g} to {(place + 1) / config.depth_bins:.2g}"
    return layer.tag if config.group_by == "tag" else layer.model


def depth_bin(layer: Layer, config: FilterDBConfig) -> int:
    """Return the number of the part of the depth that a layer lies in."""
    return min(int(layer.depth * config.depth_bins), config.depth_bins - 1)


def kept_groups(layers: Sequence[Layer], config: FilterDBConfig, run: Run) -> dict[str, list[Layer]]:
    """Return the groups that are large enough for a drift, by name; the others are named in a warning."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(group_of(layer, config), []).append(layer)
    counts = {name: sum(layer.count for layer in members) for name, members in groups.items()}
    small = [f"{name} ({count})" for name, count in counts.items() if count < config.min_filters]
    if small and len(groups) > 1:
        named = ", ".join(small[:5]) + (f" and {len(small) - 5} more" if len(small) > 5 else "")
        run.warn(f"eval_filter_db: fewer than min_filters={config.min_filters} filters, left out of the drift: {named}")
    return {name: members for name, members in groups.items() if counts[name] >= config.min_filters}


def layer_table(
    own: Sequence[Layer], others: Sequence[Layer], copies: Sequence[Layer], config: FilterDBConfig
) -> list[Row]:
    """Return a row per layer; those of the measured model stand beside their re-initialised copies."""
    rows = [
        {
            **_row(layer, layer_quality(layer, config), config),
            **{f"{key}_reinitialised": value for key, value in _scores(layer_quality(copy, config)).items()},
        }
        for layer, copy in zip(own, copies, strict=True)
    ]
    absent = dict.fromkeys(set(rows[0]) - set(_row(own[0], layer_quality(own[0], config), config)))
    return rows + [{**_row(layer, layer_quality(layer, config), config), **absent} for layer in others]


def _row(layer: Layer, quality: Quality, config: FilterDBConfig) -> Row:
    return {
        "model": layer.model,
        "layer": layer.name,
        "tag": layer.tag,
        "conv": layer.index,
        "depth": layer.depth,
        "out_channels": layer.shape[0],
        "groups": layer.groups,
        "filters": layer.count,
        **_scores(quality),
        "threshold": quality.threshold,
        "normalised_entropy": quality.normalised_entropy,
        "clean_filters": quality.clean_filters,
        "clean_entropy": quality.clean_entropy,
        "clean_threshold": quality.clean_threshold,
        "orthogonality_bound": quality.orthogonality_bound,
        "flags": ", ".join(quality.flags(config)),
    }


def _scores(quality: Quality) -> Row:
    return {"sparsity": quality.sparsity, "entropy": quality.entropy, "orthogonality": quality.orthogonality}


_AVERAGED = ("sparsity", "entropy", "normalised_entropy", "clean_entropy", "orthogonality")


def depth_profile(table: Sequence[Row], config: FilterDBConfig) -> list[Row]:
    """Return the mean scores of each model's layers in each part of the depth."""
    parts: dict[tuple[str, int], list[Row]] = {}
    for row in table:
        place = min(int(row["depth"] * config.depth_bins), config.depth_bins - 1)
        parts.setdefault((row["model"], place), []).append(row)
    return [
        {
            "model": model,
            "depth_from": place / config.depth_bins,
            "layers": len(rows),
            "filters": sum(row["filters"] for row in rows),
            **{key: mean_of(rows, key) for key in _AVERAGED},
        }
        for (model, place), rows in parts.items()
    ]


def mean_of(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the mean over the rows that have a value; None where none has."""
    values = [row[key] for row in rows if row[key] is not None]
    return float(np.mean(values)) if values else None


def _drift_from_copies(own: list[Layer], copies: list[Layer], config: FilterDBConfig, run: Run) -> Drift:
    """Compare the model with its copy on a basis of just these two."""
    both = [*own, *copies]
    basis = fit_basis(both, config.kernel**2, config.scale, config.dtype)
    projector = Projector(basis, both, config.bins, config.scale, config.dtype)
    return measure_drift({"model": own, REINITIALISED: copies}, projector, _rng(run))


def _values(found: Analysis, own_basis: Basis, again: Drift) -> dict[str, Metric]:
    rows = [row for row in found.table if row["model"] == found.measured]
    means = {key: mean_of(rows, key) for key in _AVERAGED}
    flagged = {
        flag: sum(flag in row["flags"].split(", ") for row in rows) for flag in ("sparse", "random", "low diversity")
    }
    values: dict[str, float | None] = {
        "filters": sum(row["filters"] for row in rows),
        "filter_layers": len(rows),
        "filter_first_component": 100 * float(own_basis.ratios[0]),
        "filter_sparsity": 100 * (means["sparsity"] or 0.0),
        "filter_variance_entropy": means["entropy"],
        "filter_entropy_over_threshold": means["normalised_entropy"],
        "filter_clean_entropy": means["clean_entropy"],
        "filter_orthogonality": means["orthogonality"],
        **{f"filter_layers_{flag.replace(' ', '_')}": float(count) for flag, count in flagged.items()},
        "filter_drift_from_reinitialised": float(again.matched[0, 1]),
        "filter_drift_from_reinitialised_floor": again.floor,
    }
    if found.drift is not None:
        values |= {"filter_drift_mean": float(found.drift.upper().mean()), "filter_drift_floor": found.drift.floor}
    percent = ("filter_first_component", "filter_sparsity")
    better: dict[str, Any] = {"filter_sparsity": "lower", "filter_orthogonality": "higher"}
    return {
        name: Metric(value=value, unit="%" if name in percent else "", better=better.get(name, "neither"))
        for name, value in values.items()
        if value is not None
    }


def _tables(found: Analysis) -> dict[str, list[Row]]:
    tables = {"filter_quality": found.table, "filter_depth_profile": depth_profile(found.table, found.config)}
    if found.drift is not None:
        tables["filter_drift_pairs"] = found.drift.rows()
    return tables


def _warn(model: nn.Module, found: Analysis, run: Run) -> None:
    own = [row for row in found.table if row["model"] == found.measured]
    zero = [row["layer"] for row in own if "all zero" in row["flags"].split(", ")]
    if zero:
        run.warn(f"eval_filter_db: all weights are zero in {', '.join(zero)}")
    bare = list(dict.fromkeys(layer.model for layer in found.layers[len(own) :] if layer.groups is None))
    if bare:
        run.warn(
            f"eval_filter_db: {', '.join(bare)} are bare weights, so groups and orthogonality of their layers are not "
            "known; name the architecture: others=FILE?arch=ARCH"
        )
    alone = [row["layer"] for row in own if row["orthogonality"] is None and row["out_channels"] == row["groups"]]
    if alone:
        run.log.info(
            f"eval_filter_db: {len(alone)} of {len(own)} layers have one output channel per group (depthwise); their "
            "orthogonality is not defined"
        )
    if found.config.kernel != PAPER_KERNEL:
        run.warn("eval_filter_db: the threshold T(n) is known for 3x3 filters only; no layer is flagged 'random'")
    if not any("norm" in type(module).__name__.lower() for module in model.modules()):
        run.warn(
            "eval_filter_db: the model has no normalisation layers; where they were folded into the convolutions, "
            "their scale is part of sparsity and variance entropy (not of the peak-scaled shapes)"
        )


def basis_rows(name: str, basis: Basis) -> list[Row]:
    """Return a row per eigen-filter, and one (component 0) for the mean."""
    vectors = [(0, None, basis.mean)]
    vectors += [(i + 1, float(basis.ratios[i]), row) for i, row in enumerate(basis.components)]
    return [
        {
            "basis": name,
            "filters": basis.count,
            "component": component,
            "explained": explained,
            **{f"f{place}": float(value) for place, value in enumerate(vector)},
        }
        for component, explained, vector in vectors
    ]


def _write_files(found: Analysis, own_basis: Basis, run: Run) -> None:
    import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
    import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

    with run.output(FILE, "parquet", filters=sum(layer.count for layer in found.layers)) as path:
        write_database(path, found.layers, found.config.kernel)
    tables = {
        "layers.parquet": found.table,
        "basis.parquet": basis_rows("common", found.basis) + basis_rows(found.measured, own_basis),
        "depth_profile.parquet": depth_profile(found.table, found.config),
    }
    if found.drift is not None:
        tables["drift.parquet"] = found.drift.rows()
    for name, rows in tables.items():
        with run.output(name, "parquet", rows=len(rows)) as path:
            pq.write_table(pa.Table.from_pylist(rows), path)
    if found.config.figures:
        from eff_eval_filter_db.figures import draw_all

        draw_all(found, run)
