"""The kernels of codebook_matmul against the reference, in the interpreter or on a GPU; run by test_kernels_triton.py in
a process of its own, because TRITON_INTERPRET must be set before triton is imported."""

import pytest
import torch

from eff_kernels.codebook_matmul import pack_codes, reference, triton_kernel
from eff_kernels.testing import device

DEVICE = device()

# Of the largest result: sums in another order; half dtypes round the result.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def inputs(m, n, codes_per_row, dim, bits, dtype, entries=None):
    generator = torch.Generator().manual_seed(m + n + codes_per_row)
    entries = entries or min(2**bits, 300)
    packed = pack_codes(torch.randint(entries, (n, codes_per_row), generator=generator), bits)
    x = torch.randn(m, codes_per_row * dim, generator=generator).to(dtype)
    return [t.to(DEVICE) for t in (x, packed, torch.randn(entries, dim, generator=generator).to(dtype))]


def compare(m, n, codes_per_row, dim=4, bits=8, dtype=torch.float32):
    if dtype == torch.bfloat16 and m > 1 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot; runs on a GPU")
    arguments = inputs(m, n, codes_per_row, dim, bits, dtype)
    found, expected = triton_kernel.forward(*arguments, bits), reference.forward(*arguments, bits)
    assert found.dtype == dtype and found.shape == expected.shape
    if m:
        error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert float(error) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_widths_and_types(bits, m, dtype):
    compare(m, 9, 6, 4, bits, dtype)


@pytest.mark.parametrize("m", [0, 1, 15, 16, 17, 33, 64])
def test_rows_around_block_borders(m):
    compare(m, 5, 4, dtype=torch.float16)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 31, 32, 33])
def test_weight_rows_around_block_borders(m, n):
    compare(m, n, 6, 2)


@pytest.mark.parametrize(("m", "codes_per_row"), [(1, 126), (1, 128), (1, 130), (2, 30), (2, 32), (2, 34)])
@pytest.mark.parametrize("bits", [4, 16])
def test_codes_around_block_borders(m, codes_per_row, bits):
    compare(m, 3, codes_per_row, 4, bits)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("dim", [1, 2, 3, 5, 8, 12, 64])
def test_entries_of_any_length(m, dim):
    compare(m, 3, 70, dim)


def test_many_rows_decode_first():
    assert triton_kernel.way(17, torch.float32).startswith("decode, ")
    compare(17, 20, 34)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("dim", [3, 4])
def test_decoded_weights_and_gradients(bits, dim):
    x, packed, codebook = inputs(4, 17, 66, dim, bits, torch.float32)
    assert torch.equal(triton_kernel.decode(packed, codebook, bits), reference.decode(packed, codebook, bits))
    grad = x[:, :17].contiguous()
    for name, arguments in (
        ("backward_x", (grad, packed, codebook, bits)), ("backward_codebook", (grad, x, packed, len(codebook), bits)),
    ):  # fmt: skip
        found, expected = (getattr(module, name)(*arguments) for module in (triton_kernel, reference))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # sums in another order


@pytest.mark.parametrize("m", [1, 2])
def test_a_code_that_the_codebook_lacks_gives_nan(m):
    x, packed, codebook = inputs(m, 3, 4, 2, 8, torch.float32, entries=5)
    packed[1, 2] = 5
    found = triton_kernel.forward(x, packed, codebook, 8)
    assert found.isnan().tolist() == [[False, True, False]] * m
    assert triton_kernel.decode(packed, codebook, 8).isnan().sum() == 2
