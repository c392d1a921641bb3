"""The kernel of partial_linear against the reference, in the interpreter or on a GPU; see test_kernels_triton.py."""

import pytest
import torch

from eff_kernels.partial_linear import reference, triton_kernel
from eff_kernels.testing import device

DEVICE = device()


def compare(shape, count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    index = torch.randint(0, shape[-1], (count,), generator=generator).to(DEVICE)
    assert torch.equal(
        triton_kernel.select_columns(x, index), reference.select_columns(x, index)
    )  # copied, bit for bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 31, 32, 33])
def test_rows_around_the_block(rows, dtype):
    compare((rows, 40), 5, dtype)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 70])
def test_columns_around_the_block(count):
    compare((3, 50), count)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 4, 5), (0, 6)])
def test_any_number_of_dimensions(shape):
    compare(shape, 4)


def test_a_view_and_an_index_outside():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE).t()
    index = torch.tensor([5, 0], device=DEVICE)
    assert torch.equal(triton_kernel.select_columns(x, index), x[:, [5, 0]])
    outside = triton_kernel.select_columns(x, torch.tensor([6, 1, -1], device=DEVICE))
    assert outside.isnan().all(0).tolist() == [True, False, True]
