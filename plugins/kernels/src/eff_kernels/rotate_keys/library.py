"""The rotation as a torch operator: eff::rotate_keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.dispatch import Op

OP = Op("rotate_keys")


@torch.library.custom_op("eff::rotate_keys", mutates_args=())
def rotate_op(keys: Tensor, cos: Tensor, sin: Tensor, lengths: list[int], interleaved: bool) -> Tensor:
    """Rotate keys by the angles of their segments."""
    result: Tensor = OP.implementation(keys).rotate(keys, cos, sin, lengths, interleaved)
    return result


@rotate_op.register_fake
def _(keys: Tensor, cos: Tensor, sin: Tensor, lengths: list[int], interleaved: bool) -> Tensor:
    return torch.empty_like(keys, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.lengths, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return rotate_op(grad, cos, -sin, ctx.lengths, ctx.interleaved), None, None, None, None


rotate_op.register_autograd(_gradients, setup_context=_setup_context)
