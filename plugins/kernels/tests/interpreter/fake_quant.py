"""The kernels of fake_quant against the reference, in the interpreter or on a GPU; run by test_kernels_triton.py in a
process of its own, because TRITON_INTERPRET must be set before triton is imported."""

import pytest
import torch

from eff_kernels.fake_quant import reference, triton_kernel
from eff_kernels.testing import device

DEVICE = device()

# float32 sums of up to 5000 terms in another order; half dtypes round the stored values.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


# The interpreter truncates to bfloat16 where torch rounds: one unit in the last place.
FORWARD = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 2**-7}


def compare(x, g, scale, offset, dim):
    x, g, scale, offset = (value if value is None else value.to(DEVICE) for value in (x, g, scale, offset))
    arguments = (scale, offset, -8, 7, dim)
    torch.testing.assert_close(
        triton_kernel.forward(x, *arguments), reference.forward(x, *arguments), rtol=FORWARD[x.dtype], atol=1e-6
    )
    own, other = triton_kernel.backward(g, x, *arguments), reference.backward(g, x, *arguments)
    tolerance = TOLERANCE[x.dtype]
    torch.testing.assert_close(own[0], other[0])
    torch.testing.assert_close(own[1], other[1], rtol=tolerance, atol=tolerance)
    if offset is not None:
        torch.testing.assert_close(own[2], other[2], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 5000])
def test_per_tensor(dtype, size):
    generator = torch.Generator().manual_seed(size)
    x, g = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    compare(x, g, torch.tensor(0.2), None, -1)


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize(("shape", "dim"), [((3, 700), 0), ((2, 3, 5), 1), ((4, 7), 1), ((1, 130, 2), 1), ((5,), 0)])
def test_per_channel(shape, dim, with_offset):
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(shape, generator=generator) for _ in range(2))
    scale = 0.1 + torch.rand(shape[dim], generator=generator)
    offset = torch.randn(shape[dim], generator=generator) if with_offset else None
    compare(x, g, scale, offset, dim)


def test_ties_extremes_and_nan():
    x = torch.tensor([0.5, 1.5, -0.5, -1.5, 2.5, 7.0, -8.0, 1e30, -1e30, float("inf"), float("-inf"), float("nan")])
    found = triton_kernel.forward(x.to(DEVICE), torch.tensor(1.0, device=DEVICE), None, -8, 7, -1)
    assert found[:-1].tolist() == [0, 2, 0, -2, 2, 7, -8, 7, -8, 7, -8]
    assert found[-1].isnan()


def test_non_contiguous_input():
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).t()
    compare(x, torch.ones_like(x), torch.full((30,), 0.3), None, 0)


def test_the_reduction_repeats_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(10_000, generator=generator).to(DEVICE) for _ in range(2))
    first, second = (
        triton_kernel.backward(g, x, torch.tensor(0.1, device=DEVICE), None, -8, 7, -1)[1] for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_broken_scale_shows_as_nan(value):
    x, scale = torch.tensor([0.0], device=DEVICE), torch.tensor(value, device=DEVICE)
    assert reference.forward(x, scale, None, -8, 7, -1).isnan()
    assert triton_kernel.forward(x, scale, None, -8, 7, -1).isnan()


@pytest.mark.parametrize("dim", [-1, 0, 1, 3])
def test_channels_last_keeps_its_strides_and_values(dim):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last)
    g = torch.randn(2, 3, 4, 5, generator=generator)
    scale = 0.1 + torch.rand(() if dim < 0 else (x.shape[dim],), generator=generator)
    compare(x, g, scale, None, dim)
    x, g, scale = x.to(DEVICE), g.to(DEVICE), scale.to(DEVICE)
    assert triton_kernel.forward(x, scale, None, -8, 7, dim).stride() == x.stride()
    assert triton_kernel.backward(g, x, scale, None, -8, 7, dim)[0].stride() == x.stride()


@pytest.mark.parametrize("group", [1, 31, 32, 33, 128])
def test_groups_as_rows(group):
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(6, group, generator=generator) for _ in range(2))
    compare(x, g, 0.1 + torch.rand(6, generator=generator), torch.randn(6, generator=generator), 0)
