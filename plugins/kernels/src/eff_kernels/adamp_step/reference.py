"""What adamp_step_ means, in plain torch, one weight after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def adamp_step_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], counts: list[Any],
    lr: Any, betas: tuple[float, float], eps: float, weight_decay: Any, delta: float, wd_ratio: float, nesterov: bool,
) -> None:  # fmt: skip
    """Do one step in place; half precision is computed in float32."""
    beta1, beta2 = betas
    for weight, gradient, first, second, t in zip(params, grads, exp_avgs, exp_avg_sqs, counts, strict=True):
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        w, g, m, v = (tensor.to(wide) for tensor in (weight, gradient, first, second))
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        u = (beta1 * m + (1 - beta1) * g) if nesterov else m
        u = u / (v.sqrt() / (1 - beta2**t) ** 0.5 + eps)
        u, was_projected = project(u, w, g, delta, eps)
        w = w * (1 - lr * weight_decay * (wd_ratio if was_projected else 1.0)) - lr / (1 - beta1**t) * u
        for old, new in ((weight, w), (first, m), (second, v)):
            old.copy_(new)


def project(u: Tensor, w: Tensor, g: Tensor, delta: float, eps: float) -> tuple[Tensor, bool]:
    """Return the update without its part along the weight, and whether the weight is scale invariant."""
    for rows in (len(w), 1) if w.ndim > 1 and w.numel() else ():
        w_rows, g_rows, u_rows = (tensor.reshape(rows, -1) for tensor in (w, g, u))
        norms = w_rows.norm(dim=1).clamp(min=eps) * g_rows.norm(dim=1).clamp(min=eps)
        cosine = (w_rows * g_rows).sum(1).abs() / norms
        if bool(cosine.max() < delta / w_rows.shape[1] ** 0.5):
            n = w_rows / (w_rows.norm(dim=1, keepdim=True) + eps)
            return (u_rows - n * (n * u_rows).sum(1, keepdim=True)).reshape(u.shape), True
    return u, False
