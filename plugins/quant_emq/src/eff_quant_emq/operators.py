"""Operators of the expressions. None writes to its arguments: all candidates share the cached inputs.

Dong, Li, Wei, Niu, Tian, Pan: EMQ, ICCV 2023, arXiv:2307.10554; definitions as in the first author's sibling code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TINY = 1e-9


def _log(x: Tensor) -> Tensor:
    return x.sign() * (x.abs() + TINY).log()


def _abslog(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.ones_like(x), x).abs().log()


def _normalize(x: Tensor) -> Tensor:
    return ((x - x.mean()) / x.std()).nan_to_num(nan=0.0) if x.numel() > 1 else torch.zeros_like(x)


def _flat(x: Tensor) -> Tensor:
    return x if x.ndim else x.view(1)


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "log": _log,
    "abslog": _abslog,
    "abs": torch.abs,
    "exp": torch.exp,
    "normalize": _normalize,
    "tanh": torch.tanh,
    "square": torch.square,
    "relu": torch.relu,
    "invert": lambda x: 1 / (x + TINY),
    "frobenius_norm": lambda x: x.norm(),
    "normalized_sum": lambda x: x.sum() / x.numel(),
    "l1_norm": lambda x: x.abs().sum() / x.numel(),
    "softmax": lambda x: _flat(x).softmax(0),
    "logsoftmax": lambda x: _flat(x).log_softmax(0),
    "sigmoid": torch.sigmoid,
    "sqrt": lambda x: x.clamp(min=0).sqrt(),
    "revert": torch.neg,
    "no_op": lambda x: x,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "difference": torch.sub,
    "product": torch.mul,
    "matrix_product": torch.mul,  # operands are numbers by then
}
UNARY_SHARES = {name: 0.2 if name == "no_op" else 0.1 for name in UNARY}
BINARY_SHARES = dict(zip(BINARY, (0.6, 0.3, 0.05, 0.05), strict=True))
