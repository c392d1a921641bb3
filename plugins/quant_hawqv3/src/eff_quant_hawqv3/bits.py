"""Which layers get 4 bits: an integer programme on Hessian sensitivities (arXiv:2011.10680, sec. 3.4).

    Omega_l(b) = Tr(H_l) / n_l  ||Q_b(W_l) - W_l||_2^2
    min sum_l Omega_l(b_l),  b_l in {4, 8},   s.t.  size, bit operations or latency <= low + f (high - low)

Layers that read one value have the same bits (a shortcut and the first convolution of its block); the first and the last
layer stay at 8 and are no part of the programme.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eff.errors import ConfigError, RequestError, did_you_mean
from eff.modes import eval_mode
from eff.run import Run
from eff_quant_hawqv3.config import HAWQV3Config
from eff_quant_hawqv3.network import Network
from eff_quant_hawqv3.plan import PLUGIN, Plan
from eff_quant_kit.allocation import Allocation, Budget, Table, allocate
from eff_quant_kit.calibration import CalibrationSet
from eff_quant_kit.sensitivity import hessian_traces, read_sensitivity, task_losses

BITS = (4, 8)
KEPT = 1
"""Index of 8 bits."""


@dataclass(frozen=True)
class Programme:
    """The layers to decide on and what limits them."""

    layers: tuple[str, ...]
    budget: Budget
    groups: tuple[tuple[int, ...], ...]
    fixed: dict[int, int]

    def solve(self, cost: Table) -> Allocation:
        """Return the choice of least cost, an index into BITS per layer."""
        return allocate(PLUGIN, cost, [self.budget], self.groups, self.fixed)


def needs_eight(plan: Plan, exclude: Sequence[str]) -> dict[str, str]:
    """Return the layers between the edges that cannot or shall not have 4 bits, with the value or option to blame.

    Raises:
        ConfigError: `exclude` names no layer.
    """
    for name in exclude:
        if name not in plan.layers:
            raise ConfigError(f"{PLUGIN}: exclude names '{name}', which is no layer{did_you_mean(name, plan.layers)}")
    found: dict[str, str] = {}
    for node in plan.nodes:
        inside = node.op == "layer" and node.layer not in plan.edges and node.layer not in exclude
        if inside and node.inputs[0] not in plan.nonnegative:
            found[node.layer] = node.inputs[0]
    return found


def uniform(plan: Plan, config: HAWQV3Config) -> dict[str, int]:
    """Return 8 bits, or 4 between the edges.

    Raises:
        ConfigError: a layer would read values below 0 at 4 bits.
    """
    kept = {*plan.edges, *config.exclude}
    signed = needs_eight(plan, config.exclude)
    if config.bits == 4 and signed:
        layer, value = next(iter(signed.items()))
        names = ",".join(signed)
        raise ConfigError(
            f"{PLUGIN}: {layer} reads '{value}', which can be negative, and 4-bit inputs are unsigned; use exclude={names}"
        )
    return {name: 4 if config.bits == 4 and name not in kept else 8 for name in plan.layers}


def programme(plan: Plan, net: Network, config: HAWQV3Config, run: Run) -> Programme:
    """Return the programme of a model.

    Raises:
        RequestError: no layer lies between the edges, or the latency table lacks one.
    """
    layers = tuple(name for name in plan.layers if name not in plan.edges)
    if not layers:
        raise RequestError(f"{PLUGIN}: bits=mixed has nothing to choose: all layers are first or last; use bits=8")
    rows = {name: row for row, name in enumerate(layers)}
    signed = needs_eight(plan, config.exclude)
    if signed:
        run.warn(f"{PLUGIN}: {', '.join(signed)} read values that can be negative and stay at 8 bits")
    fixed = {rows[name]: KEPT for name in (*signed, *config.exclude) if name in rows}
    groups = []
    for group in plan.groups:
        inside = tuple(rows[name] for name in group if name in rows)
        if len(inside) < len(group) or any(row in fixed for row in inside):
            fixed.update(dict.fromkeys(inside, KEPT))
        elif len(inside) > 1:
            groups.append(inside)
    use, unit = _use(layers, plan, net, config)
    free = Budget(config.constraint, use, np.inf, unit)
    low, high = free.interval(groups, fixed)
    limit = low + config.budget * (high - low)
    return Programme(layers, Budget(config.constraint, use, limit, unit), tuple(groups), fixed)


def _use(layers: Sequence[str], plan: Plan, net: Network, config: HAWQV3Config) -> tuple[Table, str]:
    if config.constraint == "size":
        counts = [net.layer(name).weight.numel() for name in layers]
        return np.array([[count * b / 8 for b in BITS] for count in counts]), " bytes"
    if config.constraint == "bops":
        return np.array([[float(plan.macs[name]) * b * b for b in BITS] for name in layers]), " bit operations"
    table = read_latencies(config)
    rows = []
    for name in layers:
        missing = [b for b in BITS if not isinstance(table.get(name, {}).get(str(b)), (int, float))]
        if missing:
            raise RequestError(f"{PLUGIN}: {config.latency_table} has no time of {name} at {missing[0]} bits")
        rows.append([float(table[name][str(b)]) for b in BITS])
    return np.array(rows), " ms"


def read_latencies(config: HAWQV3Config) -> Mapping[str, Mapping[str, Any]]:
    """Return the table {layer: {"4": ms, "8": ms}}.

    Raises:
        RequestError: the file is missing or holds something else.
    """
    assert config.latency_table is not None
    try:
        table = json.loads(config.latency_table.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{PLUGIN}: latency_table {config.latency_table}: {error.strerror}") from error
    except ValueError as error:
        raise RequestError(f"{PLUGIN}: latency_table {config.latency_table} is no JSON ({error})") from error
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise RequestError(
            f'{PLUGIN}: latency_table {config.latency_table}: expected {{"layer": {{"4": ms, "8": ms}}}}'
        )
    return table


def sensitivities(layers: Sequence[str], net: Network, config: HAWQV3Config, run: Run) -> Table:
    """Return Omega (layers, BITS), measured, or from a file of `eff sensitivity`."""
    if config.sensitivity is not None:
        return np.array(read_sensitivity(config.sensitivity).table("hessian", BITS, layers, PLUGIN))
    weights = {name: net.layer(name).weight for name in layers}
    before, net.path = net.path, "float"
    try:
        with eval_mode(net), CalibrationSet(run, config.trace_samples, plugin=PLUGIN) as samples:
            losses = task_losses(net, samples, run)
            generator = run.generator(f"{PLUGIN}/trace")
            traces = hessian_traces(net, weights, losses, generator, config.trace_draws, config.trace_tol)  # type: ignore[arg-type]
    finally:
        net.path = before
    return np.array([
        [
            traces[name][0] / weight.numel() * float((net.layer(name).quantized(weight, b) - weight).detach().square().sum())
            for b in BITS
        ]
        for name, weight in weights.items()
    ])  # fmt: skip
