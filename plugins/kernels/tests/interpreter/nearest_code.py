"""The kernel of nearest_code against the reference, in the interpreter or on a GPU; see test_kernels_triton.py."""

import pytest
import torch

from eff_kernels.nearest_code import reference, triton_kernel
from eff_kernels.testing import device

DEVICE = device()
# How much farther than the nearest a found entry may be: of squared distances of about 2 d. Half dtypes are exact products in
# float32; |c|^2 - 2 x c then cancels from values of that size.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-3}


def compare(vectors, entries, d, dtype, offset=0.0):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(vectors, d, generator=generator) + offset).to(DEVICE, dtype)
    words = (torch.randn(entries, d, generator=generator) + offset).to(DEVICE, dtype)
    found = triton_kernel.nearest_code(x, words, reference.BLOCK, 0)
    exact = torch.cdist(x.double(), words.double()).square()
    assert found.dtype == torch.int64
    worse = exact.gather(1, found[:, None])[:, 0] - exact.min(1).values
    assert float(worse.max()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("vectors", "entries", "d"), [(1, 1, 1), (63, 127, 8), (64, 128, 16), (65, 257, 17)])
def test_sizes_around_the_blocks(vectors, entries, d, dtype):
    compare(vectors, entries, d, dtype)


def test_vectors_far_from_zero_are_centred():
    compare(20, 150, 8, torch.float32, offset=100.0)


def test_the_first_of_equal_entries_is_taken_within_and_across_blocks():
    words = torch.zeros(300, 4, device=DEVICE)
    words[[3, 60, 200]] = 1.0
    found = triton_kernel.nearest_code(torch.tensor([[1.0] * 4, [0.0] * 4], device=DEVICE), words, reference.BLOCK, 0)
    assert found.tolist() == [3, 0]


def test_strided_and_no_vectors():
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(1)).to(DEVICE).t()
    words = torch.randn(7, 12, generator=torch.Generator().manual_seed(2)).to(DEVICE)[:, ::2]
    expected = reference.nearest_code(x, words, reference.BLOCK, 0)
    assert torch.equal(triton_kernel.nearest_code(x, words, reference.BLOCK, 0), expected)
    assert triton_kernel.nearest_code(x[:0], words, reference.BLOCK, 0).shape == (0,)
