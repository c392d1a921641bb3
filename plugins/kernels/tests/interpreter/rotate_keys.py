"""The kernel of rotate_keys against the reference, in the interpreter or on a GPU; see test_kernels_triton.py."""

import pytest
import torch

from eff_kernels.rotate_keys import reference, triton_kernel
from eff_kernels.testing import device

DEVICE = device()
# The interpreter truncates to bfloat16 where torch rounds: one unit in the last place.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2**-7}


def compare(batch, heads, length, dim, half, dtype=torch.float32, interleaved=False, of_batch=False):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(batch, heads, length, dim, generator=generator).to(DEVICE, dtype)
    angle = torch.randn(batch if of_batch else 1, 3, half, generator=generator).to(DEVICE)
    lengths = [length // 3, length // 2, length - length // 3 - length // 2]
    arguments = (keys, angle.cos(), angle.sin(), lengths, interleaved)
    torch.testing.assert_close(
        triton_kernel.rotate(*arguments), reference.rotate(*arguments), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("interleaved", [False, True])
def test_both_pairings(dtype, interleaved):
    compare(1, 2, 5, 16, 8, dtype, interleaved)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 40])
def test_lengths_around_the_block(length):
    compare(1, 1, length, 8, 4)


@pytest.mark.parametrize(("dim", "half"), [(2, 1), (6, 3), (9, 3), (80, 20), (33, 16)])
def test_channels_off_powers_of_two_and_partial_rotary(dim, half):
    compare(1, 2, 3, dim, half)
    compare(1, 2, 3, dim, half, interleaved=True)


def test_offsets_per_sequence():
    compare(3, 2, 7, 8, 4, of_batch=True)


def test_a_transposed_cache():
    keys = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE).transpose(1, 2)
    angle = torch.ones(1, 1, 4, device=DEVICE)
    arguments = (keys, angle.cos(), angle.sin(), [5], False)
    torch.testing.assert_close(triton_kernel.rotate(*arguments), reference.rotate(*arguments))
