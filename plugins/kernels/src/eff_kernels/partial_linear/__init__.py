"""A linear layer of which some input columns are trained (PaCA; Woo et al., ICLR 2025, arXiv:2503.01905).

    y = x W^T + b,  W[:, index] = s p         p (out, r) is trained, W is not
    dL/dp = s dy^T x[..., index],  dL/dx = dy W

Of the input only r of its channels are kept for the backward pass, T r values in the place of T in; the gradient of p
costs 2 T r out operations. The products are torch's; the kernel gathers the columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eff_kernels.checks import (
    FLOATS,
    check_device,
    check_distinct,
    check_dtype,
    check_number,
    check_shape,
    check_values,
)
from eff_kernels.partial_linear import library

__all__ = ["partial_linear"]


def partial_linear(
    x: Tensor,
    weight: Tensor,
    p: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Return x W^T + b, with gradients for x, p and the bias.

    Args:
        x: inputs (..., in); float16, bfloat16, float32 or float64.
        weight: W (out, in), which already holds `scale * p` in the columns `index`; gets no gradient. Of another dtype
            (under autocast) it is converted for the product and kept as it is.
        p: what is trained (out, r), any floating dtype; its gradient has it too.
        index: the columns, (r,) int64, each in [0, in), none twice (a column has one p). Looked at on the CPU only (on a
            GPU those out of range give NaN gradients); under torch.compile one that is out of range is torch's error.
        bias: (out,), any floating dtype.
        scale: s, finite.
        again: returns W anew in the backward pass, where it is too large to be kept (a quantized base).

    Returns:
        (..., out).

    Raises:
        TypeError: a wrong dtype, `scale` no number, `again` no function.
        ValueError: a shape, device or index does not fit, or `scale` is not finite.
    """
    op = "partial_linear"
    check_dtype(op, "x", x, FLOATS)
    check_dtype(op, "weight", weight, FLOATS)
    check_dtype(op, "p", p, FLOATS)
    check_dtype(op, "index", index, (torch.int64,))
    if x.ndim < 1 or not index.numel():
        raise ValueError(
            f"{op}: x has {x.ndim} dimensions and index {index.numel()} entries, expected at least one of each"
        )
    check_shape(op, "weight", weight, ("out", x.shape[-1]))
    check_shape(op, "index", index, ("r",))
    check_shape(op, "p", p, (len(weight), len(index)))
    if bias is not None:
        check_dtype(op, "bias", bias, FLOATS)
        check_shape(op, "bias", bias, (len(weight),))
        check_device(op, "bias", bias, "x", x)
    for name, other in (("weight", weight), ("p", p), ("index", index)):
        check_device(op, name, other, "x", x)
    last = x.shape[-1] - 1
    check_values(op, "index", index, 0, last, f"0 to {last}")
    check_distinct(op, "index", index)
    check_number(op, "scale", scale)
    if again is not None and not callable(again):
        raise TypeError(f"{op}: again is {type(again).__name__}, expected a function that returns the weight")
    return library.run(x, weight, p, index, bias, scale, again)
