"""adamp_step_ in few passes: small weights together, large ones in pieces of rows that stay in the cache.

Together every operation goes over all weights and nothing is decided on the host, which is also what torch.compile traces
and the way on devices without a kernel. In pieces temporaries are two buffers that all pieces share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.adamp_step.projection import project_and_decay_, subtract_

_HALF = (torch.float16, torch.bfloat16)
PIECE = 1 << 16
"""Elements of a piece; with states and buffers 1.5 MB in float32."""


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
    in_pieces = [
        index for index, weight in enumerate(params) if _goes_in_pieces(*(list_[index] for list_ in lists[:4]))
    ]
    if in_pieces:
        buffers: tuple[Tensor, Tensor] | None = None
        for index in in_pieces:
            buffers = _step_in_pieces(*(list_[index] for list_ in lists), *options, buffers)
        rest = [index for index in range(len(params)) if index not in set(in_pieces)]
        lists = [[list_[index] for index in rest] for list_ in lists]
    if lists[0]:
        _step_together(*lists, *options)


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


def _step_in_pieces(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, count: float, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float, delta: float, wd_ratio: float, nesterov: bool, buffers: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Do one step on one weight; return the buffers for the next one."""
    beta1, beta2 = betas
    root, size = (1 - beta2**count) ** 0.5, lr / (1 - beta1**count)
    rows, length = len(w), w.numel() // len(w)
    many = max(1, PIECE // length)
    if buffers is None or buffers[0].numel() < many * length:
        buffers = torch.empty(many * length, dtype=w.dtype), torch.empty(many * length, dtype=w.dtype)
    w, g, m, v = (tensor.detach().view(rows, length) for tensor in (w, g, m, v))
    w_norm, g_norm, gw, uw = w.new_empty(4, rows)
    pieces = [(slice(start, start + many), min(many, rows - start) * length) for start in range(0, rows, many)]

    def update(here: slice, work: Tensor) -> Tensor:
        """Return u / root of some rows, in the first buffer: a division less than u."""
        u = torch.sqrt(v[here], out=buffers[0][: work.numel()].view_as(work)).add_(eps * root)
        return torch.div(torch.lerp(m[here], g[here], 1 - beta1, out=work) if nesterov else m[here], u, out=u)

    for here, elements in pieces:
        work = buffers[1][:elements].view(-1, length)
        m[here].lerp_(g[here], 1 - beta1)
        v[here].mul_(beta2).addcmul_(g[here], g[here], value=1 - beta2)
        u = update(here, work)
        torch.linalg.vector_norm(w[here], dim=1, out=w_norm[here])
        torch.linalg.vector_norm(g[here], dim=1, out=g_norm[here])
        torch.sum(torch.mul(g[here], w[here], out=work), 1, out=gw[here])
        torch.sum(torch.mul(u, w[here], out=work), 1, out=uw[here])
    factor = _factor(w_norm, g_norm, gw, uw, length, delta, eps)
    size *= root
    kept = 1 - lr * weight_decay * (1.0 if factor is None else wd_ratio)
    for here, elements in pieces:
        u = update(here, buffers[1][:elements].view(-1, length))
        # w (1 - decay) - size (u - factor w)
        w[here].mul_(kept if factor is None else (kept + size * factor[here])[:, None]).add_(u, alpha=-size)
    return buffers


def _factor(
    w_norm: Tensor, g_norm: Tensor, gw: Tensor, uw: Tensor, length: int, delta: float, eps: float
) -> Tensor | None:  # fmt: skip
    """Return <u, w> / |w|^2 of each row, or of all; None where the weight is not scale invariant."""
    whole = (w_norm.norm()[None], g_norm.norm()[None], gw.sum()[None], uw.sum()[None])
    for w_, g_, gw_, uw_ in ((w_norm, g_norm, gw, uw), whole):
        cosine = gw_.abs() / (w_.clamp(min=eps) * g_.clamp(min=eps))
        columns = length * (len(gw) // len(gw_))
        if bool(cosine.max() < delta / columns**0.5):
            return (uw_ / (w_ + eps).square()).expand(len(gw))
    return None
