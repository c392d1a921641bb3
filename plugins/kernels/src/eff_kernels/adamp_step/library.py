"""adamp_step_ as a torch operator: eff::adamp_step_, which changes its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.adamp_step import cpu
from eff_kernels.dispatch import Op

# Without a kernel all weights go together: the plain loop would wait for the device at every weight.
OP = Op("adamp_step", without_kernel="cpu")


@torch.library.custom_op("eff::adamp_step_", mutates_args=("params", "exp_avgs", "exp_avg_sqs"))
def adamp_step_op(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], counts: list[float],
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, delta: float, wd_ratio: float, nesterov: bool,
) -> None:  # fmt: skip
    """One step in place."""
    OP.implementation(params[0]).adamp_step_(
        params, grads, exp_avgs, exp_avg_sqs, counts, lr, (beta1, beta2), eps, weight_decay, delta, wd_ratio, nesterov
    )


@adamp_step_op.register_fake
def _(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], counts: list[float],
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, delta: float, wd_ratio: float, nesterov: bool,
) -> None:  # fmt: skip
    return None


def run(*arguments: Any) -> None:
    """Run the step: compiled, the operations themselves, which torch.compile fuses and which take rates as tensors."""
    implementation = cpu if torch.compiler.is_compiling() else OP.implementation(arguments[0][0])
    implementation.adamp_step_(*arguments)
