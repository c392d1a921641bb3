"""int_matmul as torch operators: eff::int_matmul, eff::scaled_int_matmul."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.dispatch import Op
from eff_kernels.int_matmul.reference import output_dtype

OP = Op("int_matmul", dtypes=(torch.int8, torch.uint8))


@torch.library.custom_op("eff::int_matmul", mutates_args=())
def int_matmul_op(
    x: Tensor, weight: Tensor, multiplier: Tensor, shift: Tensor, bias: Tensor | None,
    q_min: int, q_max: int, half_even: bool,
) -> Tensor:  # fmt: skip
    """Product of x (M, K) and weight (N, K), requantized per row of the weight."""
    result: Tensor = OP.implementation(x).forward(x, weight, multiplier, shift, bias, q_min, q_max, half_even)
    return result


@int_matmul_op.register_fake
def _(
    x: Tensor, weight: Tensor, multiplier: Tensor, shift: Tensor, bias: Tensor | None,
    q_min: int, q_max: int, half_even: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=output_dtype(q_max))


def run(x: Tensor, *rest: Any) -> Tensor:
    """Run the operator: directly on plain tensors, through torch.library for tracers and tensor subclasses."""
    traced = torch.compiler.is_compiling() or type(x) is not Tensor
    result: Tensor = int_matmul_op(x, *rest) if traced else OP.implementation(x).forward(x, *rest)
    return result


@torch.library.custom_op("eff::scaled_int_matmul", mutates_args=())
def scaled_op(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Product of x (M, K) and weight (N, K) in float32, scaled per row of the weight."""
    result: Tensor = OP.implementation(x).scaled(x, weight, scale, bias)
    return result


@scaled_op.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


def run_scaled(x: Tensor, *rest: Any) -> Tensor:
    """Run the scaled operator, as `run` does."""
    traced = torch.compiler.is_compiling() or type(x) is not Tensor
    result: Tensor = scaled_op(x, *rest) if traced else OP.implementation(x).scaled(x, *rest)
    return result
