"""depthwise_conv as torch operators: eff::depthwise_conv and eff::depthwise_conv_weight_gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.dispatch import Op

OP = Op("depthwise_conv")


def memory_format(x: Tensor) -> torch.memory_format:
    """Return channels_last where `x` is that and nothing else, else contiguous."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def dense(x: Tensor) -> Tensor:
    """Return `x` contiguous in one of the two formats."""
    return x.contiguous(memory_format=memory_format(x))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Return (N, C, H, W) in the format of `x`, by the implementation for its device."""
    x = dense(x)
    if not len(x):
        return torch.empty_like(x)
    y: Tensor = OP.implementation(x).forward(x, weight.contiguous(), bias, dilation)
    return y.contiguous(memory_format=memory_format(x))


def weight_gradient(dy: Tensor, x: Tensor, kernel: int, dilation: int) -> Tensor:
    """Return (C, 1, k, k), contiguous, by the implementation for the device."""
    if not len(x):
        return x.new_zeros(x.shape[1], 1, kernel, kernel)
    dw: Tensor = OP.implementation(x).weight_gradient(dense(dy), dense(x), kernel, dilation)
    return dw.contiguous()


@torch.library.custom_op("eff::depthwise_conv", mutates_args=())
def depthwise_conv_op(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Depthwise convolution of stride 1."""
    return forward(x, weight, bias, dilation)


@depthwise_conv_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


@torch.library.custom_op("eff::depthwise_conv_weight_gradient", mutates_args=())
def depthwise_conv_weight_gradient_op(dy: Tensor, x: Tensor, kernel: int, dilation: int) -> Tensor:
    """Gradient of the weight."""
    return weight_gradient(dy, x, kernel, dilation)


@depthwise_conv_weight_gradient_op.register_fake
def _(dy: Tensor, x: Tensor, kernel: int, dilation: int) -> Tensor:
    return x.new_empty(x.shape[1], 1, kernel, kernel)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.dilation = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.kernel = weight.shape[-1]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)


def _gradients(ctx: Any, dy: Tensor, conv: Any, of_weight: Any) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    # Every pair (value, tap) the other way round: the same convolution with the kernel flipped.
    dx = conv(dy, weight.flip(2, 3), None, ctx.dilation) if ctx.needs_input_grad[0] else None
    dw = of_weight(dy, x, ctx.kernel, ctx.dilation) if ctx.needs_input_grad[1] else None
    db = dy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
    return dx, dw, db, None


depthwise_conv_op.register_autograd(
    lambda ctx, dy: _gradients(ctx, dy, depthwise_conv_op, depthwise_conv_weight_gradient_op),
    setup_context=_setup_context,
)


class _Eager(torch.autograd.Function):
    """The operator without its dispatch, which on small maps costs more than the work."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _setup_context(ctx, inputs, inputs[0])
        return forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, forward, weight_gradient)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Run the operator: directly on plain tensors, through torch.library for tracers and tensor subclasses."""
    traced = torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)
    y: Tensor = (depthwise_conv_op if traced else _Eager.apply)(x, weight, bias, dilation)
    return y
