"""mutual_distances as a torch operator: eff::mutual_distances."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.dispatch import Op
from eff_kernels.mutual_score.reference import wide_dtype

OP = Op("mutual_score")


@torch.library.custom_op("eff::mutual_distances", mutates_args=())
def mutual_distances_op(z: Tensor) -> Tensor:
    """Distances to the nearest patches."""
    result: Tensor = OP.implementation(z).mutual_distances(z)
    return result


@mutual_distances_op.register_fake
def _(z: Tensor) -> Tensor:
    return z.new_empty(len(z), len(z), z.shape[1], dtype=wide_dtype(z))
