"""One step of AdamP (Heo et al., ICLR 2021, arXiv:2006.08217): Adam whose update loses its part along the weight.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    u = m / (sqrt(v) / sqrt(1 - b2^t) + eps)                    Nesterov: b1 m + (1 - b1) g instead of m
    (u, r) = projection of u (see projection.py); r = wd_ratio where it applied, else 1
    w <- w (1 - lr weight_decay r) - lr / (1 - b1^t) u

Memory bound. The sums over w and g decide on the projection before w can change. A pass for them and one for the step
move 36 bytes per float32 weight where <n, u> of a row is known before the row is written (CPU); with the moments in the
first pass (Triton, any row length) it is 40, Nesterov 44. Weights of one dimension are never projected: 28.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eff_kernels.adamp_step import library
from eff_kernels.checks import (
    FLOATS,
    INTEGERS,
    check_device,
    check_dtype,
    check_flag,
    check_number,
    check_range,
    check_readable,
    check_shape,
    check_writable,
)

__all__ = ["adamp_step_"]


def adamp_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    counts: Sequence[Any],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Tensor = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
) -> None:
    """Change `params`, `exp_avgs` (m) and `exp_avg_sqs` (v) by one step, in place. No backward.

    Computed in the tensors' dtype, half precision in float32. NaN and infinity in a gradient go into the weights, as in
    torch's optimizers: look before.

    Args:
        params: weights of one device and dtype (float16, bfloat16, float32, float64); rows are dimension 0.
        grads, exp_avgs, exp_avg_sqs: like `params`.
        counts: t of each weight, this step included, >= 1.
        lr: learning rate, >= 0; under torch.compile better a tensor, else one that is read (which waits for a GPU).
        betas, eps, weight_decay, delta, wd_ratio, nesterov: as in the equations.

    Raises:
        TypeError: a dtype is not floating point, or not that of its weight; an option is no number.
        ValueError: lists of different lengths, a shape or device that is not that of its weight, an option out of range,
            a tensor that cannot be changed in place.
    """
    if not torch.compiler.is_compiling():
        _check([params, grads, exp_avgs, exp_avg_sqs], counts)
        lr, weight_decay = _rate("lr", lr), _rate("weight_decay", weight_decay)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"adamp_step: betas is {betas!r}, expected two numbers")
        for index, beta in enumerate(betas):
            check_number("adamp_step", f"betas[{index}]", beta)
            if not 0 <= beta < 1:
                raise ValueError(f"adamp_step: betas[{index}] is {beta}, expected at least 0 and below 1")
        for name, value in (("eps", eps), ("delta", delta)):
            check_number("adamp_step", name, value)
            if not value > 0:
                raise ValueError(f"adamp_step: {name} is {value}, expected above 0")
        eps, delta = float(eps), float(delta)
        check_range("adamp_step", "wd_ratio", wd_ratio, 0, 1)
        check_flag("adamp_step", "nesterov", nesterov)
    lists = [params, grads, exp_avgs, exp_avg_sqs, counts]
    used = [index for index, weight in enumerate(params) if weight.numel()]
    if used:
        library.run(
            *([list_[index] for index in used] for list_ in lists),
            lr, betas, eps, weight_decay, delta, wd_ratio, nesterov,
        )  # fmt: skip


def _rate(name: str, value: float | Tensor) -> float:
    """Return a rate as a number; a tensor's is read."""
    if isinstance(value, Tensor):
        check_dtype("adamp_step", name, value, (*FLOATS, *INTEGERS))
        if value.numel() != 1:
            raise ValueError(f"adamp_step: {name} has shape {tuple(value.shape)}, expected one number")
        check_readable("adamp_step", name, value)
        value = value.item()
    check_range("adamp_step", name, value, 0, math.inf)
    return float(value)


def _check(lists: Sequence[Sequence[Tensor]], counts: Sequence[Any]) -> None:
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    for name, tensors in (*zip(names, lists, strict=True), ("counts", counts)):
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"adamp_step: {name} is {type(tensors).__name__}, expected a list or tuple")
        if len(tensors) != len(lists[0]):
            raise ValueError(f"adamp_step: {name} has {len(tensors)} entries, expected {len(lists[0])} as params")
    for index, count in enumerate(counts):
        if not isinstance(count, Tensor):
            check_number("adamp_step", f"counts[{index}]", count)
        if not count >= 1:
            raise ValueError(f"adamp_step: counts[{index}] is {count}, expected at least 1: this step is counted")
    first = lists[0][0] if lists[0] else None
    for index, weight in enumerate(lists[0]):
        if all(_is_alike(tensors[index], first, weight) for tensors in lists) and weight.dtype in FLOATS:
            continue  # wording is not needed, and every step of a training comes by here
        check_dtype("adamp_step", f"params[{index}]", weight, FLOATS)
        check_device("adamp_step", f"params[{index}]", weight, "params[0]", lists[0][0])
        check_dtype("adamp_step", f"params[{index}]", weight, [lists[0][0].dtype])
        for name, tensors in zip(names[1:], lists[1:], strict=True):
            other = tensors[index]
            check_dtype("adamp_step", f"{name}[{index}]", other, [weight.dtype])
            check_device("adamp_step", f"{name}[{index}]", other, f"params[{index}]", weight)
            check_shape("adamp_step", f"{name}[{index}]", other, tuple(weight.shape))
        for name in ("params", "exp_avgs", "exp_avg_sqs"):
            check_writable("adamp_step", f"{name}[{index}]", lists[names.index(name)][index])


def _is_alike(x: Any, first: Any, weight: Any) -> bool:
    """Whether `x` is a contiguous tensor like the first weight, of the shape of its own, which can be written to."""
    return (
        isinstance(x, Tensor)
        and x.dtype == first.dtype
        and x.layout is torch.strided
        and x.device == first.device
        and x.shape == weight.shape
        and x.is_contiguous()
        and not (x.requires_grad and torch.is_grad_enabled())
    )
