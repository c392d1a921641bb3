"""The kernels of weight_only_matmul against the reference, in the interpreter or on a GPU; run by test_kernels_triton.py
in a process of its own, because TRITON_INTERPRET must be set before triton is imported."""

import pytest
import torch

from eff_kernels.packing import pack_rows
from eff_kernels.testing import device
from eff_kernels.weight_only_matmul import reference, triton_kernel

DEVICE = device()

# Of the largest result: sums in another order; half dtypes round the weights in one path and the results.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def inputs(m, n, k, groups, bits, dtype, with_zero):
    generator = torch.Generator().manual_seed(m + n + k)
    x = torch.randn(m, k, generator=generator).to(dtype)
    packed = pack_rows(torch.randint(2**bits, (n, k), generator=generator), bits)
    scale = (0.1 + torch.rand(n, groups, generator=generator)).to(dtype)
    zero = (2**bits * torch.rand(n, groups, generator=generator)).to(dtype) if with_zero else None
    return [t if t is None else t.to(DEVICE) for t in (x, packed, scale, zero)]


def compare(m, n, k, groups=1, bits=4, dtype=torch.float32, with_zero=True):
    if dtype == torch.bfloat16 and m > 1 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot; runs on a GPU")
    arguments = inputs(m, n, k, groups, bits, dtype, with_zero)
    found, expected = triton_kernel.forward(*arguments, bits), reference.forward(*arguments, bits)
    assert found.dtype == dtype and found.shape == expected.shape
    if m:
        error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert float(error) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("with_zero", [False, True])
def test_widths_types_and_zero_points(bits, m, dtype, with_zero):
    compare(m, 9, 96, 3, bits, dtype, with_zero)


@pytest.mark.parametrize("m", [0, 1, 15, 16, 17, 33, 65])
def test_rows_around_block_borders(m):
    compare(m, 5, 16, dtype=torch.float16)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 31, 32, 33])
def test_weight_rows_around_block_borders(m, n):
    compare(m, n, 24, 3, 3)


@pytest.mark.parametrize(("m", "k"), [(1, 8), (1, 1016), (1, 1024), (1, 1032), (2, 8), (2, 120), (2, 128), (2, 136)])
@pytest.mark.parametrize("bits", [3, 4])
def test_columns_around_block_borders(m, k, bits):
    compare(m, 3, k, bits=bits)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize(("k", "groups"), [(1536, 1), (1536, 3), (1536, 12), (120, 5), (120, 15), (2048, 2)])
def test_groups_of_any_size(m, k, groups):
    compare(m, 3, k, groups)


def test_many_rows_dequantize():
    assert triton_kernel.way(17, torch.float32).startswith("dequantize")
    compare(17, 20, 264, 11, 3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("with_zero", [False, True])
def test_dequantized_weights_and_the_gradient(bits, with_zero):
    x, packed, scale, zero = inputs(2, 17, 264, 33, bits, torch.float32, with_zero)
    found = triton_kernel.dequantize(packed, scale, zero, bits, torch.float32)
    torch.testing.assert_close(found, reference.dequantize(packed, scale, zero, bits, torch.float32))
    grad = x[:, :17].contiguous()
    arguments = (grad, packed, scale, zero, bits)
    torch.testing.assert_close(triton_kernel.backward(*arguments), reference.backward(*arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("m", [1, 2])
def test_nan_reaches_the_results_it_belongs_to(m):
    x, packed, scale, zero = inputs(m, 3, 16, 2, 2, torch.float32, True)
    scale[1, 0] = torch.nan
    found = triton_kernel.forward(x, packed, scale, zero, 2)
    assert found.isnan().tolist() == [[False, True, False]] * m
