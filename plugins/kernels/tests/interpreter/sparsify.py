"""The kernels of sparsify against the reference, in the interpreter or on a GPU; see test_kernels_triton.py."""

import pytest
import torch

from eff_kernels.sparsify import reference, triton_kernel
from eff_kernels.sparsify.plan import make_plan
from eff_kernels.testing import device

DEVICE = device()
# The interpreter truncates to bfloat16 where torch rounds; a sum of two products in half precision.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random(size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def compare(size, dtype=torch.float32, ratio=0.05, resample=True):
    v = random(size).to(DEVICE, dtype)
    plan = make_plan(size, ratio, 0.01)
    arguments = (plan.keep, plan.stride, plan.start, plan.share, 1.3, 0.8, 10, resample)
    found, expected = triton_kernel.sparsify(v, *arguments), reference.sparsify(v, *arguments)
    assert all(torch.equal(own, other) for own, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("size", [1023, 1024, 1025, 5000])
def test_sizes_around_the_blocks(size, dtype):
    compare(size, dtype)
    compare(size, dtype, resample=False)


@pytest.mark.parametrize("size", [1, 7, 40])
def test_small_tensors(size):
    compare(size)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_correction(dtype, nesterov):
    g, u, v = (random(1500, seed).to(DEVICE, dtype) for seed in range(3))
    own, other = (u.clone(), v.clone()), (u.clone(), v.clone())
    triton_kernel.accumulate_(g, *own, 0.9, nesterov)
    reference.accumulate_(g, *other, 0.9, nesterov)
    torch.testing.assert_close(own, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    g, u, v = (random(1500, seed).to(DEVICE) for seed in range(3))
    g[7] = value
    kept = u.clone(), v.clone()
    with pytest.raises(ValueError, match="gradient holds NaN or infinity"):
        triton_kernel.accumulate_(g, u, v, 0.9, False)
    assert torch.equal(u, kept[0]) and torch.equal(v, kept[1])


def test_nan_is_refused():
    v = random(3000).to(DEVICE)
    v[17] = torch.nan
    with pytest.raises(ValueError, match="v holds NaN"):
        triton_kernel.sparsify(v, 10, 3, 0, 0.01, 1.3, 0.8, 10, True)
