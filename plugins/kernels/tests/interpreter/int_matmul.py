"""The kernel of int_matmul against the reference, bit for bit, in the interpreter or on a GPU; run by
test_kernels_triton.py in a process of its own, because TRITON_INTERPRET must be set before triton is imported."""

import pytest
import torch

from eff_kernels.int_matmul import dyadic, reference, triton_kernel
from eff_kernels.testing import device

DEVICE = device()
RANGES = {"int8": (-128, 127), "uint8": (0, 255), "signed 4 bit": (-8, 7), "unsigned 4 bit": (0, 15)}


def compare(m, n, k, *, dtype=torch.int8, ratio=1e-3, q="int8", half_even=False, with_bias=True):
    generator = torch.Generator().manual_seed(m + n + k)
    low, high = (-128, 128) if dtype == torch.int8 else (0, 256)
    x = torch.randint(low, high, (m, k), dtype=dtype, generator=generator)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    bias = torch.randint(-(2**31), 2**31 - 1, (n,), generator=generator).int() if with_bias else None
    multiplier, shift = dyadic(ratio * (0.1 + torch.rand(n, generator=generator, dtype=torch.float64)))
    tensors = [t if t is None else t.to(DEVICE) for t in (x, weight, multiplier, shift, bias)]
    found = triton_kernel.forward(*tensors, *RANGES[q], half_even)
    expected = reference.forward(*tensors, *RANGES[q], half_even)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("m", [0, 1, 15, 16, 17, 33, 65, 129])
def test_rows_around_block_borders(m):
    compare(m, 33, 40, ratio=1e-7)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 129])
def test_columns_around_block_borders(n):
    compare(3, n, 20, ratio=1e-7)


@pytest.mark.parametrize("k", [1, 31, 255, 256, 257, 513])
def test_sums_around_block_borders(k):
    compare(2, 5, k, with_bias=False)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("q", RANGES)
@pytest.mark.parametrize("half_even", [False, True])
def test_types_ranges_and_roundings(dtype, q, half_even):
    compare(4, 6, 50, dtype=dtype, q=q, half_even=half_even, with_bias=False, ratio=1e-4)


@pytest.mark.parametrize("ratio", [1e3, 1.0, 1e-5, 1e-9, 1e-17])
def test_scales_from_large_to_tiny(ratio):
    compare(4, 6, 50, ratio=ratio, half_even=True)


def test_uint8_rows_of_many_blocks():
    compare(129, 130, 300, dtype=torch.uint8, q="uint8", ratio=1e-4, with_bias=False)


@pytest.mark.parametrize("half_even", [False, True])
def test_ties(half_even):
    x = torch.arange(-7, 8, dtype=torch.int8, device=DEVICE)[:, None]
    one = torch.ones(1, 1, dtype=torch.int8, device=DEVICE)
    half = [t.to(DEVICE) for t in dyadic(torch.tensor([0.5]))]
    arguments = (x, one, *half, None, -128, 127, half_even)
    assert torch.equal(triton_kernel.forward(*arguments), reference.forward(*arguments))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 8), (1, 33, 257), (17, 31, 40), (129, 130, 300)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_sums_scaled_to_float(dtype, m, n, k, with_bias):
    generator = torch.Generator().manual_seed(m + n + k)
    low, high = (-128, 128) if dtype == torch.int8 else (0, 256)
    x = torch.randint(low, high, (m, k), dtype=dtype, generator=generator).to(DEVICE)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator).to(DEVICE)
    scale, bias = (torch.rand(2, n, generator=generator) / 100).to(DEVICE)
    arguments = (x, weight, scale, bias if with_bias else None)
    torch.testing.assert_close(triton_kernel.scaled(*arguments), reference.scaled(*arguments), rtol=1e-6, atol=1e-5)
