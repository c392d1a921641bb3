"""weight_only_matmul as torch operators: the product, its gradient for x, and the weight itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.dispatch import Op

OP = Op("weight_only_matmul")


@torch.library.custom_op("eff::weight_only_matmul", mutates_args=())
def weight_only_matmul_op(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """x (M, K) times the transposed weight."""
    result: Tensor = OP.implementation(x).forward(x, packed, scale, zero_point, bits)
    return result


@weight_only_matmul_op.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


@torch.library.custom_op("eff::weight_only_matmul_backward", mutates_args=())
def weight_only_matmul_backward_op(
    grad: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> Tensor:
    """Gradient of x."""
    result: Tensor = OP.implementation(grad).backward(grad.contiguous(), packed, scale, zero_point, bits)
    return result


@weight_only_matmul_backward_op.register_fake
def _(grad: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    return grad.new_empty((grad.shape[0], packed.shape[1] * 8 // bits))


@torch.library.custom_op("eff::weight_only_dequantize", mutates_args=())
def dequantize_op(packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """The weight (N, K)."""
    deciding = packed.new_empty((), dtype=dtype)
    result: Tensor = OP.implementation(deciding).dequantize(packed, scale, zero_point, bits, dtype)
    return result


@dequantize_op.register_fake
def _(packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((packed.shape[0], packed.shape[1] * 8 // bits), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scale, zero_point, ctx.bits = inputs
    ctx.save_for_backward(packed, scale, zero_point)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return weight_only_matmul_backward_op(grad, *ctx.saved_tensors, ctx.bits), None, None, None, None


weight_only_matmul_op.register_autograd(_gradients, setup_context=_setup_context)


def run(x: Tensor, *rest: Any) -> Tensor:
    """Run the operator: directly where nothing is recorded, through torch.library for gradients and tracers."""
    recorded = torch.compiler.is_compiling() or type(x) is not Tensor or (torch.is_grad_enabled() and x.requires_grad)
    result: Tensor = weight_only_matmul_op(x, *rest) if recorded else OP.implementation(x).forward(x, *rest)
    return result
