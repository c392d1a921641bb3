"""The kernels of adamp_step against the reference, in the interpreter or on a GPU; see test_kernels_triton.py."""

import pytest
import torch

from eff_kernels.adamp_step import reference, triton_kernel
from eff_kernels.testing import device

DEVICE = device()
# Sums of up to 5000 terms in another order; half dtypes round what is stored (the interpreter truncates to bfloat16).
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
OPTIONS = {
    "lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "delta": 0.1, "wd_ratio": 0.1, "nesterov": False,
}  # fmt: skip


def compare(shape, dtype=torch.float32, orthogonal=False, strides=None, **change):
    generator = torch.Generator().manual_seed(0)
    w, g, m = (torch.randn(shape, generator=generator) for _ in range(3))
    v = torch.rand(shape, generator=generator)
    if orthogonal:
        flat_w, flat_g = w.view(len(w), -1), g.view(len(w), -1)
        flat_g -= flat_w * ((flat_g * flat_w).sum(1) / flat_w.square().sum(1))[:, None]
    tensors = [tensor.to(DEVICE, dtype) for tensor in (w, g, m, v)]
    if strides:
        tensors = [strides(tensor) for tensor in tensors]
    own, other = ([[tensor.clone()] for tensor in tensors] + [[4.0]] for _ in range(2))
    options = {**OPTIONS, **change}.values()
    triton_kernel.adamp_step_(*own, *options)
    reference.adamp_step_(*other, *options)
    for index in (0, 2, 3):
        torch.testing.assert_close(own[index], other[index], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("orthogonal", [False, True])
def test_matrices(dtype, orthogonal):
    compare((5, 70), dtype, orthogonal)


@pytest.mark.parametrize("shape", [(1,), (1023,), (1024,), (1025,), (0,), (0, 3)])
def test_weights_of_one_dimension_and_none(shape):
    compare(shape)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1023), (3, 1024), (3, 1025), (65, 2), (64, 1), (2, 5000), (4, 3, 3, 3)])
def test_sizes_around_the_blocks(shape):
    compare(shape, orthogonal=True)


def test_nesterov():
    compare((4, 30), orthogonal=True, nesterov=True)
    compare((30,), nesterov=True)


def test_channels_last_rows_and_what_is_laid_out_otherwise():
    compare((4, 3, 3, 3), orthogonal=True, strides=lambda x: x.to(memory_format=torch.channels_last))
    compare((6, 8), strides=lambda x: x.t().contiguous().t())


def test_a_whole_layer_is_projected_where_its_rows_are_not():
    w = torch.ones(2, 40, device=DEVICE)
    g = torch.cat([w[:1], -w[1:]])
    own, other = ([[w.clone()], [g.clone()], [0 * w], [0 * w], [1.0]] for _ in range(2))
    triton_kernel.adamp_step_(*own, *OPTIONS.values())
    reference.adamp_step_(*other, *OPTIONS.values())
    torch.testing.assert_close(own[0], other[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_projects_nothing(value):
    w, g = (torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)).to(DEVICE) for seed in (0, 1))
    g -= w * ((g * w).sum(1) / w.square().sum(1))[:, None]
    g[1, 2] = value
    own, other = ([[w.clone()], [g.clone()], [0 * w], [0 * w], [1.0]] for _ in range(2))
    triton_kernel.adamp_step_(*own, *OPTIONS.values())
    reference.adamp_step_(*other, *OPTIONS.values())
    torch.testing.assert_close(own[0], other[0], equal_nan=True)


def test_the_result_repeats_bit_for_bit():
    w, g = (torch.randn(3, 5000, generator=torch.Generator().manual_seed(seed)).to(DEVICE) for seed in (0, 1))
    found = []
    for _ in range(2):
        lists = [[w.clone()], [g], [0 * w], [0 * w], [1.0]]
        triton_kernel.adamp_step_(*lists, *OPTIONS.values())
        found.append(lists[0][0])
    assert torch.equal(*found)
