"""adamp_step_ in few passes: small weights together, large ones in pieces of rows that stay in the cache.

Together every operation goes over all weights and nothing is decided on the host, which is also what torch.compile traces
and the way on devices without a kernel. In pieces temporaries are two buffers that all pieces share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eff_kernels.adamp_step.projection import project_and_decay_, subtract_

_HALF = (torch.float16, torch.bfloat16)
PIECE = 1 << 16
"""Elements of a piece; with states and buffers 1.5 MB in float32."""
PORTION = 1 << 16
"""Elements of small weights that one round of operations covers on the CPU; with states and temporaries about 2 MB."""


def adamp_step_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], counts: list[Any],
    lr: Any, betas: tuple[float, float], eps: float, weight_decay: Any, delta: float, wd_ratio: float, nesterov: bool,
) -> None:  # fmt: skip
    """Do one step in place; half precision is computed in float32."""
    if params[0].dtype in _HALF:
        narrow = params, exp_avgs, exp_avg_sqs
        wide = [[tensor.float() for tensor in tensors] for tensors in narrow]
        wide_grads = [grad.float() for grad in grads]
        adamp_step_(
            wide[0], wide_grads, wide[1], wide[2], counts, lr, betas, eps, weight_decay, delta, wd_ratio, nesterov
        )
        for old, new in zip(narrow, wide, strict=True):
            torch._foreach_copy_(old, new)
        return
    lists = [params, grads, exp_avgs, exp_avg_sqs, counts]
    options = (lr, betas, eps, weight_decay, delta, wd_ratio, nesterov)
    together, buffers = [], None
    for index, weight in enumerate(params):
        if _goes_in_pieces(weight, grads[index], exp_avgs[index], exp_avg_sqs[index]):
            buffers = _step_in_pieces(*(list_[index] for list_ in lists), *options, buffers)
        else:
            together.append(index)
    for portion in portions([params[index] for index in together]):
        _step_together(*([list_[together[place]] for place in portion] for list_ in lists), *options)


def portions(params: Sequence[Tensor]) -> list[list[int]]:
    """Return the places of weights to handle together, in order: on the CPU of not more than `PORTION` elements.

    Each operation goes over all weights of a portion, so what does not fit the cache is read from memory again and
    again; an accelerator wants few launches instead, and a compiled graph is fused.
    """
    found: list[list[int]] = []
    room = 0
    for place, weight in enumerate(params):
        is_full = weight.device.type == "cpu" and weight.numel() > room and not torch.compiler.is_compiling()
        if not found or is_full:
            found.append([])
            room = PORTION
        found[-1].append(place)
        room -= weight.numel()
    return found


def _step_together(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], counts: list[Any],
    lr: Any, betas: tuple[float, float], eps: float, weight_decay: Any, delta: float, wd_ratio: float, nesterov: bool,
) -> None:  # fmt: skip
    beta1, beta2 = betas
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denominators = list(torch._foreach_sqrt(exp_avg_sqs))
    torch._foreach_div_(denominators, [(1 - beta2**count) ** 0.5 for count in counts])
    torch._foreach_add_(denominators, eps)
    moments = torch._foreach_lerp(exp_avgs, grads, 1 - beta1) if nesterov else exp_avgs
    updates = list(torch._foreach_div(moments, denominators))
    project_and_decay_(updates, params, grads, lr * weight_decay, delta, wd_ratio, eps)
    subtract_(params, updates, [lr / (1 - beta1**count) for count in counts])


def _goes_in_pieces(w: Tensor, *others: Tensor) -> bool:
    """Whether a weight is large, its rows lie one behind the other, and nothing traces."""
    return (
        not torch.compiler.is_compiling()
        and w.device.type == "cpu"
        and w.ndim > 1
        and w.numel() > PIECE
        and w.is_contiguous()
        and all(other.is_contiguous() for other in others)
    )


class _Piece(NamedTuple):
    """Views of some rows, (rows, length) and (rows,), and of two buffers of that size that all pieces share."""

    w: Tensor
    g: Tensor
    m: Tensor
    v: Tensor
    w_norm: Tensor
    g_norm: Tensor
    gw: Tensor
    one: Tensor
    other: Tensor


def _step_in_pieces(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, count: float, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float, delta: float, wd_ratio: float, nesterov: bool, buffers: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Do one step on one weight; return the buffers for the next one.

    A first pass decides on the projection. The second does the whole step, because a piece holds whole rows; only a
    projection as a whole needs the moments, and its sum over all rows, before a weight is written.
    """
    beta1, beta2 = betas
    root, size = (1 - beta2**count) ** 0.5, lr / (1 - beta1**count)
    rows, length = len(w), w.numel() // len(w)
    many = min(rows, max(1, PIECE // length))
    if buffers is None or buffers[0].numel() < many * length:
        buffers = torch.empty(many * length, dtype=w.dtype), torch.empty(many * length, dtype=w.dtype)
    w_norm, g_norm, gw = w.new_empty(3, rows)
    pieces = _pieces(
        [tensor.detach().view(rows, length) for tensor in (w, g, m, v)], (w_norm, g_norm, gw), many, buffers
    )

    def advance(piece: _Piece) -> None:
        piece.m.lerp_(piece.g, 1 - beta1)
        piece.v.mul_(beta2).addcmul_(piece.g, piece.g, value=1 - beta2)

    def update(piece: _Piece) -> Tensor:
        """Return u / root in the first buffer: a division less than u."""
        u = torch.sqrt(piece.v, out=piece.one).add_(eps * root)
        moment = torch.lerp(piece.m, piece.g, 1 - beta1, out=piece.other) if nesterov else piece.m
        return torch.div(moment, u, out=u)

    for piece in pieces:
        torch.linalg.vector_norm(piece.w, dim=1, out=piece.w_norm)
        torch.linalg.vector_norm(piece.g, dim=1, out=piece.g_norm)
        torch.sum(torch.mul(piece.g, piece.w, out=piece.other), 1, out=piece.gw)
    scope = _scope(w_norm, g_norm, gw, length, delta, eps)
    kept = 1 - lr * weight_decay * (wd_ratio if scope else 1.0)
    size *= root
    factor: Any = 0.0
    if scope == "layer":
        uw = w.new_zeros(())
        for piece in pieces:
            advance(piece)
            uw += torch.mul(update(piece), piece.w, out=piece.other).sum()
        factor = uw / (w_norm.norm() + eps).square()
    for piece in pieces:
        if scope != "layer":
            advance(piece)
        u = update(piece)
        if scope == "row":
            uw = torch.mul(u, piece.w, out=piece.other).sum(1)
            factor = (uw / (piece.w_norm + eps).square())[:, None]
        piece.w.mul_(kept + size * factor).add_(u, alpha=-size)  # w (1 - decay) - size (u - factor w)
    return buffers


def _pieces(
    matrices: Sequence[Tensor], vectors: Sequence[Tensor], many: int, buffers: Sequence[Tensor]
) -> list[_Piece]:  # fmt: skip
    """Cut into pieces of `many` rows; a split is a fraction of the time of as many slices."""
    parts = zip(*(tensor.split(many) for tensor in (*matrices, *vectors)), strict=True)
    full = [buffer[: many * matrices[0].shape[1]].view(many, -1) for buffer in buffers]
    return [_Piece(*part, *(work[: len(part[0])] if len(part[0]) < many else work for work in full)) for part in parts]


def _scope(w_norm: Tensor, g_norm: Tensor, gw: Tensor, length: int, delta: float, eps: float) -> str:
    """Return what of the weight is scale invariant: each "row", the "layer" as a whole, or "" for neither."""
    whole = (w_norm.norm()[None], g_norm.norm()[None], gw.sum()[None])
    for scope, (w_, g_, gw_) in (("row", (w_norm, g_norm, gw)), ("layer", whole)):
        cosine = gw_.abs() / (w_.clamp(min=eps) * g_.clamp(min=eps))
        columns = length * (len(gw) // len(gw_))
        if bool(cosine.max() < delta / columns**0.5):
            return scope
    return ""
