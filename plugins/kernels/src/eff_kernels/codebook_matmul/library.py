"""codebook_matmul as torch operators: the product, its two gradients, and the weight itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.dispatch import Op

OP = Op("codebook_matmul")


@torch.library.custom_op("eff::codebook_matmul", mutates_args=())
def codebook_matmul_op(x: Tensor, packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """x (M, K) times the transposed weight."""
    result: Tensor = OP.implementation(x).forward(x, packed, codebook, bits)
    return result


@codebook_matmul_op.register_fake
def _(x: Tensor, packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


@torch.library.custom_op("eff::codebook_matmul_backward_x", mutates_args=())
def backward_x_op(grad: Tensor, packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Gradient of x."""
    result: Tensor = OP.implementation(grad).backward_x(grad.contiguous(), packed, codebook, bits)
    return result


@backward_x_op.register_fake
def _(grad: Tensor, packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    return grad.new_empty((grad.shape[0], packed.shape[1] * 8 // bits * codebook.shape[1]))


@torch.library.custom_op("eff::codebook_matmul_backward_codebook", mutates_args=())
def backward_codebook_op(grad: Tensor, x: Tensor, packed: Tensor, entries: int, bits: int) -> Tensor:
    """Gradient of the codebook."""
    result: Tensor = OP.implementation(grad).backward_codebook(grad.contiguous(), x.contiguous(), packed, entries, bits)
    return result


@backward_codebook_op.register_fake
def _(grad: Tensor, x: Tensor, packed: Tensor, entries: int, bits: int) -> Tensor:
    return grad.new_empty((entries, x.shape[1] * bits // (packed.shape[1] * 8)))


@torch.library.custom_op("eff::codebook_decode", mutates_args=())
def decode_op(packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """The weight (N, K)."""
    result: Tensor = OP.implementation(codebook).decode(packed, codebook, bits)
    return result


@decode_op.register_fake
def _(packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    return codebook.new_empty((packed.shape[0], packed.shape[1] * 8 // bits * codebook.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, codebook, ctx.bits = inputs
    ctx.save_for_backward(x, packed, codebook)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, codebook = ctx.saved_tensors
    for_x, _, for_codebook, _ = ctx.needs_input_grad
    d_x = backward_x_op(grad, packed, codebook, ctx.bits) if for_x else None
    d_codebook = backward_codebook_op(grad, x, packed, codebook.shape[0], ctx.bits) if for_codebook else None
    return d_x, None, d_codebook, None


codebook_matmul_op.register_autograd(_gradients, setup_context=_setup_context)


def run(x: Tensor, packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Run the operator: directly where nothing is recorded, through torch.library for gradients and tracers."""
    plain = type(x) is Tensor and type(codebook) in (Tensor, torch.nn.Parameter)
    trains = torch.is_grad_enabled() and (x.requires_grad or codebook.requires_grad)
    if torch.compiler.is_compiling() or trains or not plain:
        found: Tensor = codebook_matmul_op(x, packed, codebook, bits)
        return found
    result: Tensor = OP.implementation(x).forward(x, packed, codebook, bits)
    return result
