"""The integer programme for bits (paper, sec. 3): what fewer bits cost in each layer alone, and the best sum.

    min sum_{l,k} I_{l,k} dL_{l,k}   s.t.  one k per layer,  sum I_{l,k} dP_{l,k} >= P_base (1 - c 32/8)

dL: the calibration loss with layer l at k bits and all others at the base, less that with all at the base, at least
1e-6; the base itself costs 0. dP: bits of weight saved. The sum over layers is an assumption, so the loss of the
network with the chosen bits is reported beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from eff.errors import RequestError
from eff_quant_kit.allocation import Allocation, Budget, Table, allocate

SMALLEST_RISE = 1e-6
PLUGIN = "quant_adaquant"


def size_budget(weights: Sequence[int], bits: Sequence[Sequence[int]], target_ratio: float) -> Budget:
    """Return the limit on the bits of all weights.

    Args:
        weights: number of weights per layer.
        bits: (layers, candidates).
        target_ratio: c, size against float32.
    """
    use = np.array([[count * bit for bit in row] for count, row in zip(weights, bits, strict=True)], dtype=np.float64)
    total = 32.0 * sum(weights)
    return Budget("target_ratio", use / total, target_ratio)


def check_reachable(budget: Budget) -> None:
    """Raise where no choice of bits is small enough.

    Raises:
        RequestError: names the interval that can be reached.
    """
    low, high = budget.interval((), {})
    if budget.limit < low * (1 - 1e-9):
        raise RequestError(
            f"{PLUGIN}: target_ratio {budget.limit:g} is out of reach; these bits and layers give {low:.4g} to {high:.4g} "
            "of float32's size: raise target_ratio or give smaller bits"
        )


def rises(layers: int, candidates: int, loss_with: Callable[[int, int], float], base: float) -> Table:
    """Return dL (layers, candidates), measured one layer at a time.

    Args:
        layers: how many.
        candidates: how many, the base first.
        loss_with: (layer, candidate) -> loss with this layer alone away from the base.
        base: loss with all layers at the base.
    """
    cost = np.zeros((layers, candidates))
    for layer in range(layers):
        for candidate in range(1, candidates):
            cost[layer, candidate] = max(loss_with(layer, candidate) - base, SMALLEST_RISE)
    return cost


def choose_bits(cost: Table, budget: Budget) -> Allocation:
    """Return the candidate per layer with the least summed rise within the budget.

    Raises:
        RequestError: out of reach, with the interval.
    """
    return allocate(PLUGIN, cost, [budget])
