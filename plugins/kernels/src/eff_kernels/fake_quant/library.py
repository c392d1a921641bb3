"""fake_quant as torch operators: eff::fake_quant and eff::fake_quant_backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eff_kernels.dispatch import Op

OP = Op("fake_quant")
implementation = OP.implementation


@torch.library.custom_op("eff::fake_quant", mutates_args=())
def fake_quant_op(
    x: Tensor, scale: Tensor, offset: Tensor | None, q_min: int, q_max: int, dim: int, grad_scale: float
) -> Tensor:
    """Forward; `dim` -1 is one scale for the tensor."""
    result: Tensor = implementation(x).forward(x, scale, offset, q_min, q_max, dim)
    return result


@fake_quant_op.register_fake
def _(x: Tensor, scale: Tensor, offset: Tensor | None, q_min: int, q_max: int, dim: int, grad_scale: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("eff::fake_quant_backward", mutates_args=())
def fake_quant_backward_op(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, q_min: int, q_max: int, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and offset; the last two before `grad_scale`."""
    d_x, d_scale, d_offset = implementation(x).backward(grad, x, scale, offset, q_min, q_max, dim)
    return d_x, d_scale, d_offset


@fake_quant_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, q_min: int, q_max: int, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, offset, ctx.q_min, ctx.q_max, ctx.dim, ctx.grad_scale = inputs
    ctx.save_for_backward(x, scale, offset)


def _gradients(ctx: Any, grad: Tensor, run: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor | None, ...]:
    x, scale, offset = ctx.saved_tensors
    d_x, d_scale, d_offset = run(grad, x, scale, offset, ctx.q_min, ctx.q_max, ctx.dim)
    g = ctx.grad_scale
    return d_x, d_scale * g, (None if offset is None else d_offset * g), None, None, None, None


fake_quant_op.register_autograd(
    lambda ctx, grad: _gradients(ctx, grad, fake_quant_backward_op), setup_context=_setup_context
)


class _Eager(torch.autograd.Function):
    """The operator without its dispatch, which on small tensors costs more than the work."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, scale, offset, q_min, q_max, dim, _ = inputs
        _setup_context(ctx, inputs, x)
        result: Tensor = implementation(x).forward(x, scale, offset, q_min, q_max, dim)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad, implementation(grad).backward)


def run(x: Tensor, *rest: Any) -> Tensor:
    """Run the operator: directly on plain tensors, through torch.library for tracers and tensor subclasses."""
    traced = torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)
    result: Tensor = fake_quant_op(x, *rest) if traced else _Eager.apply(x, *rest)
    return result
