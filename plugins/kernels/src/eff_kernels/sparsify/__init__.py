"""Deep gradient compression: the largest entries of an accumulated gradient, by a threshold from a sample.

    u <- m u + g,  v <- v + u          Nesterov: u <- m (u + g),  v <- v + u + g      momentum correction
    send (i, v_i) where |v_i| >= threshold,  v_i <- 0,  u_i <- 0                      error feedback, factor masking

(Lin et al., ICLR 2018, arXiv:1712.01887, alg. 1 and sec. 3; threshold and its adaptation as in the code of the paper.)
Memory bound: two reads of v for the sparsification, and 24 bytes per float32 entry for the momentum correction, 4 of
them to see that the gradient is finite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.checks import (
    FLOATS,
    check_contiguous,
    check_count,
    check_device,
    check_dtype,
    check_flag,
    check_not_empty,
    check_number,
    check_range,
    check_readable,
    check_shape,
    check_writable,
)
from eff_kernels.sparsify import library
from eff_kernels.sparsify.plan import make_plan

__all__ = ["densify", "dgc_step", "dgc_step_", "sparsify"]


def sparsify(
    v: Tensor,
    ratio: float,
    *,
    sample_ratio: float = 0.01,
    upper: float = 1.3,
    lower: float = 0.8,
    max_iterations: int = 10,
    resample: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return about ceil(n ratio) entries of largest magnitude as (values, indices); never more. No backward.

    A small tensor, or one of which the sample would be all, gives exactly the largest. Otherwise the threshold comes from
    a strided sample and is adapted until between `lower` and `upper` times as many entries pass; a surplus is cut off
    in the order of the indices.

    Args:
        v: what to choose from, any shape; float16, bfloat16, float32 or float64.
        ratio: share to keep, in (0, 1].
        sample_ratio: share that is sampled, in [0.01, 1].
        upper, lower: bounds of the adaptation.
        max_iterations: adaptations at most, >= 0.
        resample: above `upper`, take the exact largest of those that passed, in the place of a higher threshold.
        generator: draws where the sample starts; None: at the first entry.

    Returns:
        values (k,) in the dtype of `v`, indices (k,) int64 into the flattened `v`, ascending except after `resample`.

    Raises:
        TypeError, ValueError: a dtype or option is out of range, `v` is empty or holds NaN.
    """
    _check("sparsify", v, ratio, sample_ratio, upper, lower, max_iterations, resample, generator)
    plan = make_plan(v.numel(), ratio, sample_ratio, generator)
    values, indices = library.sparsify_op(
        v, plan.keep, plan.stride, plan.start, plan.share, upper, lower, max_iterations, resample
    )
    return values, indices


def dgc_step_(
    gradient: Tensor,
    u: Tensor,
    v: Tensor,
    ratio: float,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    masking: bool = True,
    sample_ratio: float = 0.01,
    upper: float = 1.3,
    lower: float = 0.8,
    max_iterations: int = 10,
    resample: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a gradient to momentum `u` and residual `v`, in place, and take out of them what is sent.

    Before and after: v + u (as corrected) = densify(values, indices) + v, bit for bit.

    Args:
        gradient: g, any shape.
        u, v: like `gradient`, contiguous; changed in place.
        ratio: share to send.
        momentum: m, in [0, 1).
        nesterov: the form of the momentum.
        masking: set the momentum of sent entries to 0.
        sample_ratio, upper, lower, max_iterations, resample, generator: as for `sparsify`.

    Returns:
        values and indices, as `sparsify` does.

    Raises:
        TypeError, ValueError: as `sparsify`, or shapes, dtypes or devices differ, or the gradient holds NaN or infinity;
            `u` and `v` are as before, except where NaN is in them, which is found after the addition.
    """
    op = "dgc_step_"
    _check(op, v, ratio, sample_ratio, upper, lower, max_iterations, resample, generator)
    for name, flag in (("nesterov", nesterov), ("masking", masking)):
        check_flag(op, name, flag)
    check_number(op, "momentum", momentum)
    if not 0 <= momentum < 1:
        raise ValueError(f"{op}: momentum is {momentum}, expected at least 0 and below 1")
    for name, other in (("gradient", gradient), ("u", u)):
        check_dtype(op, name, other, (v.dtype,))
        check_shape(op, name, other, tuple(v.shape))
        check_device(op, name, other, "v", v)
    for name, other in (("u", u), ("v", v)):
        check_contiguous(op, name, other)
        check_writable(op, name, other)
    library.accumulate_op(gradient, u, v, momentum, nesterov)
    values, indices = sparsify(
        v, ratio, sample_ratio=sample_ratio, upper=upper, lower=lower, max_iterations=max_iterations, resample=resample,
        generator=generator,
    )  # fmt: skip
    v.view(-1).index_fill_(0, indices, 0)
    if masking:
        u.view(-1).index_fill_(0, indices, 0)
    return values, indices


def dgc_step(
    gradient: Tensor, u: Tensor, v: Tensor, ratio: float, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values, indices and the new `u` and `v`, as `dgc_step_` with the same options, but change nothing.

    Costs a copy of `u` and `v` more.
    """
    for name, tensor in (("u", u), ("v", v)):
        check_dtype("dgc_step", name, tensor, FLOATS)
    u, v = (tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in (u, v))
    values, indices = dgc_step_(gradient, u, v, ratio, **options)
    return values, indices, u, v


def densify(values: Tensor, indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of this shape that is the sum of (index, value) pairs, 0 elsewhere; the same bits every time.

    Workers that decode the same pairs in the same order therefore have the same weights.

    Args:
        values: (k,), any floating dtype.
        indices: (k,) int64; an index may come more than once (several workers).
        shape: of the result.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device.
        IndexError: an index is negative or beyond the shape (on the CPU; on a GPU torch's own assertion stops the process
            at those beyond it, and negative ones count from the end).
    """
    check_dtype("densify", "values", values, FLOATS)
    check_dtype("densify", "indices", indices, (torch.int64,))
    check_shape("densify", "values", values, ("k",))
    check_shape("densify", "indices", indices, (len(values),))
    check_device("densify", "indices", indices, "values", values)
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"densify: shape is {shape!r}, expected a tuple of sizes")
    for index, size in enumerate(shape):
        check_count("densify", f"shape[{index}]", size, 0)
    flat = values.new_zeros(torch.Size(shape).numel())
    if values.device.type == "cpu":
        try:
            return flat.index_add_(0, indices, values).view(shape)
        except IndexError as error:
            low, high = int(indices.min()), int(indices.max())
            raise IndexError(
                f"densify: indices has values from {low} to {high}, expected 0 to {flat.numel() - 1}"
            ) from error
    # A GPU sorts the indices for index_put_, where index_add_ would add with atomics, in any order.
    return flat.index_put_((indices,), values, accumulate=True).view(shape)


def _check(
    op: str, v: Tensor, ratio: float, sample_ratio: float, upper: float, lower: float, max_iterations: int,
    resample: bool, generator: torch.Generator | None,
) -> None:  # fmt: skip
    check_dtype(op, "v", v, FLOATS)
    check_not_empty(op, "v", v)
    check_readable(op, "v", v)
    for name, value in (("ratio", ratio), ("upper", upper), ("lower", lower)):
        check_number(op, name, value)
    check_count(op, "max_iterations", max_iterations, 0, 2**31)
    check_flag(op, "resample", resample)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator is {type(generator).__name__}, expected a torch.Generator")
    if not 0 < ratio <= 1:
        raise ValueError(f"{op}: ratio is {ratio}, expected above 0 and at most 1")
    check_range(op, "sample_ratio", sample_ratio, 0.01, 1)
    if not 0 <= lower <= 1 <= upper:
        raise ValueError(f"{op}: lower and upper are {lower} and {upper}, expected 0 <= lower <= 1 <= upper")
