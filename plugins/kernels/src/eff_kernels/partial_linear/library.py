"""partial_linear as torch operators: eff::partial_linear and eff::partial_linear_backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_kernels.dispatch import Op, requested

OP = Op("partial_linear")


def select_columns(x: Tensor, index: Tensor) -> Tensor:
    """Return x[..., index]; a dtype without a kernel takes the reference."""
    chosen: Tensor = OP.implementation(x).select_columns(x, index)
    return chosen


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b in the dtype of x."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@torch.library.custom_op("eff::partial_linear", mutates_args=())
def partial_linear_op(
    x: Tensor, weight: Tensor, p: Tensor, index: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output and the columns of x that the backward pass needs."""
    return product(x, weight, bias), select_columns(x, index)


@partial_linear_op.register_fake
def _(x: Tensor, weight: Tensor, p: Tensor, index: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], len(weight)), x.new_empty(*x.shape[:-1], len(index))


def gradient_of_p(dy: Tensor, x_index: Tensor, like: Tensor, scale: float) -> Tensor:
    """Return s dy^T x[..., index], (out, r), in the dtype of p."""
    rows = dy.reshape(-1, dy.shape[-1])
    return (rows.t() @ x_index.reshape(-1, x_index.shape[-1]).to(dy.dtype)).to(like.dtype) * scale


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, weight, p, _, bias, ctx.scale = inputs
    ctx.save_for_backward(output[1], weight, p)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x_index, weight, p = ctx.saved_tensors
    dx = dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
    dp = gradient_of_p(dy, x_index, p, ctx.scale) if ctx.needs_input_grad[2] else None
    db = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
    return dx, None, dp, None, db, None


partial_linear_op.register_autograd(_gradients, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operator without its dispatch, and without keeping a weight that can be made again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, p: Tensor, index: Tensor, bias: Tensor | None, scale: float,
        again: Callable[[], Tensor] | None,
    ) -> Tensor:  # fmt: skip
        ctx.scale, ctx.again = scale, again
        ctx.p_like = torch.empty(0, dtype=p.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        keeps_weight = again is None and ctx.needs_input_grad[0]
        x_index = select_columns(x, index) if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(x_index, weight if keeps_weight else None)
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_index, weight = ctx.saved_tensors
        dx = dp = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ (ctx.again() if weight is None else weight).to(dy.dtype)
        if ctx.needs_input_grad[2]:
            dp = gradient_of_p(dy, x_index, ctx.p_like, ctx.scale)
        if ctx.needs_input_grad[4]:
            db = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype)
        return dx, None, dp, None, db, None, None


def run(
    x: Tensor, weight: Tensor, p: Tensor, index: Tensor, bias: Tensor | None, scale: float,
    again: Callable[[], Tensor] | None,
) -> Tensor:  # fmt: skip
    """Run the operator: directly on plain tensors, through torch.library for tracers and tensor subclasses."""
    traced = torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)
    if traced:
        output: Tensor = partial_linear_op(x, weight, p, index, bias, scale)[0]
    else:
        requested()  # a pass that keeps nothing asks for no implementation
        output = _Eager.apply(x, weight, p, index, bias, scale, again)
    return output
