"""The kernels of depthwise_conv against the reference, in the interpreter or on a GPU; see test_kernels_triton.py."""

import pytest
import torch

from eff_kernels.depthwise_conv import reference, triton_kernel
from eff_kernels.testing import device

DEVICE = device()
# Sums of up to 81 products in another order; half dtypes are rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def compare(shape, kernel, dilation=1, dtype=torch.float32, bias=True, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    x, dy = (random(*shape).contiguous(memory_format=memory_format) for _ in range(2))
    weight, b = random(shape[1], 1, kernel, kernel) / kernel, random(shape[1]) if bias else None
    found = triton_kernel.convolve(x, weight, b, dilation)
    assert found.stride() == x.stride()
    expected = reference.forward(x.float(), weight.float(), None if b is None else b.float(), dilation)
    torch.testing.assert_close(found.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    found = triton_kernel.sum_products(dy, x, kernel, dilation)
    expected = reference.weight_gradient(dy.float(), x.float(), kernel, dilation)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dtypes_and_formats(dtype, memory_format):
    compare((2, 2, 4, 5), 5, 1, dtype, memory_format=memory_format)


@pytest.mark.parametrize("side", [(1, 1), (15, 17), (16, 16), (1, 257)])
def test_pixels_around_the_block(side):
    compare((1, 1, *side), 3)


@pytest.mark.parametrize("channels", [31, 32, 33])
def test_channels_around_the_block(channels):
    compare((2, channels, 2, 3), 3, memory_format=torch.channels_last)


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 7), (5, 2), (9, 1)])
def test_kernels_and_dilations_larger_than_the_map(kernel, dilation):
    compare((1, 1, 8, 7), kernel, dilation, bias=False)


def test_small_kernels_are_torchs_and_large_ones_are_not():
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for kernel in (5, 7):
        weight = torch.ones(1, 1, kernel, kernel, device=DEVICE)
        found = triton_kernel.forward(x, weight, None, 1)
        torch.testing.assert_close(found, reference.forward(x, weight, None, 1), rtol=1e-5, atol=1e-5)
        found = triton_kernel.weight_gradient(x, x, kernel, 1)
        torch.testing.assert_close(found, reference.weight_gradient(x, x, kernel, 1), rtol=1e-5, atol=1e-5)


def test_nan_reaches_what_it_touches_and_nothing_else():
    x = torch.zeros(1, 1, 9, 9, device=DEVICE)
    x[0, 0, 0, 0] = torch.nan
    found = triton_kernel.convolve(x, torch.ones(1, 1, 3, 3, device=DEVICE), None, 1)
    assert found.isnan().nonzero().tolist() == [[0, 0, a, b] for a in (0, 1) for b in (0, 1)]


def test_the_weight_gradient_is_the_same_in_every_run():
    x = torch.randn(2, 1, 9, 9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(triton_kernel.sum_products(x, x, 3, 1), triton_kernel.sum_products(x, x, 3, 1))
