"""The integer programme against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eff.errors import RequestError
from eff_quant_kit.allocation import Budget, allocate


def brute_force(cost, budgets, groups, fixed):
    best = None
    for choices in itertools.product(range(cost.shape[1]), repeat=len(cost)):
        if any(choices[layer] != choice for layer, choice in fixed.items()):
            continue
        if any(len({choices[layer] for layer in group}) > 1 for group in groups):
            continue
        rows = range(len(cost))
        if any(sum(b.use[row, choices[row]] for row in rows) > b.limit * (1 + 1e-9) for b in budgets):
            continue
        total = sum(cost[row, choices[row]] for row in rows)
        best = total if best is None else min(best, total)
    return best


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 7), st.integers(2, 3), st.floats(0.0, 1.0))
def test_the_programme_equals_brute_force(seed, layers, candidates, tightness):
    draws = np.random.default_rng(seed)
    cost = draws.random((layers, candidates))
    uses = [draws.integers(1, 100, (layers, candidates)).astype(float) for _ in range(2)]
    groups = [[0, layers - 1]] if layers > 3 else []
    fixed = {1: 0} if seed % 2 else {}
    budgets = []
    for index, use in enumerate(uses):
        low, high = Budget(str(index), use, 0).interval(groups, fixed)
        budgets.append(Budget(str(index), use, low + tightness * (high - low)))
    expected = brute_force(cost, budgets, groups, fixed)
    if expected is None:  # each budget can be met, both together cannot
        with pytest.raises(RequestError, match="together"):
            allocate("quant_x", cost, budgets, groups, fixed)
        return
    found = allocate("quant_x", cost, budgets, groups, fixed)
    assert found.cost == pytest.approx(expected, rel=1e-6)
    assert all(found.used[b.name] <= b.limit * (1 + 1e-9) for b in budgets)
    assert all(len({found.choices[layer] for layer in group}) == 1 for group in groups)


def test_a_budget_out_of_reach_is_named_with_what_can_be_reached():
    use = np.array([[8.0, 4.0], [80.0, 40.0]])
    with pytest.raises(RequestError, match=r"quant_x: size of 40 B is out of reach; attainable are 44 to 88 B"):
        allocate("quant_x", np.ones((2, 2)), [Budget("size", use, 40, " B")])
