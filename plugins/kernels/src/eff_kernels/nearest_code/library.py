"""nearest_code as a torch operator: eff::nearest_code."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.dispatch import Op

OP = Op("nearest_code", without_kernel="cpu")


@torch.library.custom_op("eff::nearest_code", mutates_args=())
def nearest_code_op(x: Tensor, codebook: Tensor, block: int, columns: int) -> Tensor:
    """Indices of the nearest entries."""
    result: Tensor = OP.implementation(x).nearest_code(x, codebook, block, columns)
    return result


@nearest_code_op.register_fake
def _(x: Tensor, codebook: Tensor, block: int, columns: int) -> Tensor:
    return x.new_empty(len(x), dtype=torch.int64)
