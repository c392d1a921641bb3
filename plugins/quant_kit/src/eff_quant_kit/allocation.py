"""Bits per layer as an integer programme, solved exactly.

    min  sum_{l,k} I_{l,k} cost_{l,k}
    s.t. sum_k I_{l,k} = 1,   sum_{l,k} I_{l,k} use_{l,k} <= limit  (for every budget),   I binary

HAWQ-V3 (arXiv:2011.10680) and AdaQuant (arXiv:2006.10518, sec. 3) both choose bits so; the solver is HiGHS through
`scipy.optimize.milp`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eff.errors import RequestError

Table = NDArray[np.float64]


@dataclass(frozen=True)
class Budget:
    """At most `limit` of something, in `unit`, that layer l uses `use[l, k]` of with its choice k."""

    name: str
    use: Table
    limit: float
    unit: str = ""

    def interval(self, groups: Sequence[Sequence[int]], fixed: Mapping[int, int]) -> tuple[float, float]:
        """Return the least and the most that can be used."""
        use = self.use.copy()
        for layer, choice in fixed.items():
            use[layer] = use[layer, choice]
        grouped = {layer for group in groups for layer in group}
        sums = [use[list(group)].sum(0) for group in groups]
        rows = np.stack([*sums, *(use[layer] for layer in range(len(use)) if layer not in grouped)])
        return float(rows.min(1).sum()), float(rows.max(1).sum())


@dataclass(frozen=True)
class Allocation:
    """The chosen index per layer, the summed cost, and what each budget has been used for."""

    choices: tuple[int, ...]
    cost: float
    used: dict[str, float]


def allocate(
    plugin: str,
    cost: Table,
    budgets: Sequence[Budget],
    groups: Sequence[Sequence[int]] = (),
    fixed: Mapping[int, int] | None = None,
) -> Allocation:
    """Return the choices of least summed cost within all budgets.

    Args:
        plugin: for messages.
        cost: (layers, candidates), finite.
        budgets: what must not be exceeded.
        groups: layers that must choose alike.
        fixed: layer -> choice, decided before.

    Raises:
        RequestError: no choice meets the budgets; says what can be reached.
        ValueError: shapes differ, or a cost is not finite.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_array

    fixed = fixed or {}
    layers, candidates = cost.shape
    if not np.isfinite(cost).all():
        raise ValueError("costs must be finite")
    for budget in budgets:
        if budget.use.shape != cost.shape:
            raise ValueError(f"budget '{budget.name}' has shape {budget.use.shape}, the costs {cost.shape}")
        low, high = budget.interval(groups, fixed)
        if budget.limit < low * (1 - 1e-9):
            raise RequestError(
                f"{plugin}: {budget.name} of {budget.limit:.6g}{budget.unit} is out of reach; "
                f"attainable are {low:.6g} to {high:.6g}{budget.unit}"
            )
    one_each = lil_array((layers, layers * candidates))
    for layer in range(layers):
        one_each[layer, layer * candidates : (layer + 1) * candidates] = 1
    constraints = [LinearConstraint(one_each.tocsr(), 1, 1)]
    for budget in budgets:
        scale = max(1e-300, float(np.abs(budget.use).max()))  # the solver's tolerances are absolute
        constraints.append(LinearConstraint(budget.use.reshape(1, -1) / scale, -np.inf, budget.limit / scale))
    for group in groups:
        for other in group[1:]:
            alike = lil_array((candidates, layers * candidates))
            for choice in range(candidates):
                alike[choice, group[0] * candidates + choice] = 1
                alike[choice, other * candidates + choice] = -1
            constraints.append(LinearConstraint(alike.tocsr(), 0, 0))
    lower, upper = np.zeros(layers * candidates), np.ones(layers * candidates)
    for layer, choice in fixed.items():
        lower[layer * candidates + choice] = 1
    scale = max(1e-300, float(np.abs(cost).max()))
    solved = milp(
        cost.ravel() / scale,
        constraints=constraints,
        integrality=np.ones(layers * candidates),
        bounds=Bounds(lower, upper),
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        limits = ", ".join(f"{item.name} {item.limit:.6g}{item.unit}" for item in budgets)
        raise RequestError(f"{plugin}: no choice of bits meets {limits} together ({solved.message}); relax one of them")
    choices = solved.x.reshape(layers, candidates).argmax(1)
    rows = np.arange(layers)
    return Allocation(
        tuple(int(choice) for choice in choices),
        float(cost[rows, choices].sum()),
        {budget.name: float(budget.use[rows, choices].sum()) for budget in budgets},
    )
