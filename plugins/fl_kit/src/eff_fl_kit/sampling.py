"""Which clients take part in a round."""

from __future__ import annotations

import torch
from torch import Tensor

_DRAWS = 10_000


def draw_clients(able: Tensor, ratio: float, fixed: bool, generator: torch.Generator) -> list[int]:
    """Return the numbers of the clients of one round, ascending; never none.

    Args:
        able: (n_clients,) bool: has data and can be reached.
        ratio: in (0, 1].
        fixed: exactly round(ratio n) of those able (one at least); else each independently with probability
            `ratio`, drawn again until there is one.
        generator: source of randomness.

    Raises:
        ValueError: nobody is able.
    """
    if not bool(able.any()):
        raise ValueError("no client is able to take part")
    if fixed:
        count = max(1, min(round(ratio * len(able)), int(able.sum())))
        order = torch.randperm(len(able), generator=generator)
        return sorted(order[able[order]][:count].tolist())
    for _ in range(_DRAWS):
        drawn = (torch.rand(len(able), generator=generator) < ratio) & able
        if bool(drawn.any()):
            return drawn.nonzero().flatten().tolist()
    return able.nonzero().flatten()[:1].tolist()
