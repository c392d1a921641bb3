"""How good a supernet is: what it costs in memory, how it ranks networks, how alike representations are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object]) -> int:
    """Return the bytes of the tensors that autograd keeps for the backward pass, each storage once.

    Depends on shapes alone, so it is the same in every run. Parameters count when an operation keeps them.
    """
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # alive until the end, or an address could be used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storages.values())


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Kendall's tau-b of two lists of scores; 0 where one of them is constant."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (a, b))
    upper = torch.triu_indices(len(x), len(x), offset=1)
    dx, dy = ((v[upper[0]] - v[upper[1]]).sign() for v in (x, y))
    pairs = float(dx.abs().sum() * dy.abs().sum()) ** 0.5
    return float((dx * dy).sum()) / pairs if pairs else 0.0


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Return the centred kernel alignment of two representations (Kornblith et al., ICML 2019), in [0, 1].

    Args:
        a, b: (samples, features) of the same samples.
    """
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    scale = float((a.T @ a).norm() * (b.T @ b).norm())
    return float((a.T @ b).norm() ** 2) / scale if scale else 0.0
