"""sparsify as torch operators: eff::dgc_accumulate_ and eff::sparsify, whose results have a size that depends on the data."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.dispatch import Op

OP = Op("sparsify")


@torch.library.custom_op("eff::dgc_accumulate_", mutates_args=("u", "v"))
def accumulate_op(gradient: Tensor, u: Tensor, v: Tensor, momentum: float, nesterov: bool) -> None:
    """Momentum correction, in place."""
    OP.implementation(v).accumulate_(gradient, u, v, momentum, nesterov)


@accumulate_op.register_fake
def _(gradient: Tensor, u: Tensor, v: Tensor, momentum: float, nesterov: bool) -> None:
    return None


@torch.library.custom_op("eff::sparsify", mutates_args=())
def sparsify_op(
    v: Tensor, keep: int, stride: int, start: int, share: float, upper: float, lower: float, max_iterations: int,
    resample: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Values and indices of the largest entries."""
    values, indices = OP.implementation(v).sparsify(
        v, keep, stride, start, share, upper, lower, max_iterations, resample
    )
    return values, indices


@sparsify_op.register_fake
def _(
    v: Tensor, keep: int, stride: int, start: int, share: float, upper: float, lower: float, max_iterations: int,
    resample: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    count = torch.library.get_ctx().new_dynamic_size(min=0)
    return v.new_empty(count), v.new_empty(count, dtype=torch.int64)
