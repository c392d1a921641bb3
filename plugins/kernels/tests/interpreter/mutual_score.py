"""The kernel of mutual_score against the reference, in the interpreter or on a GPU; see test_kernels_triton.py."""

import pytest
import torch

from eff_kernels.mutual_score import reference, triton_kernel
from eff_kernels.testing import device

DEVICE = device()
# Products of half dtypes are exact in float32; sums are added in another order.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-3}


def compare(images, patches, channels, dtype):
    z = torch.randn(images, patches, channels, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    found, expected = triton_kernel.mutual_distances(z), reference.mutual_distances(z)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("patches", "channels"), [(1, 1), (63, 32), (64, 31), (65, 33)])
def test_sizes_around_the_blocks(patches, channels, dtype):
    compare(2, patches, channels, dtype)


def test_many_images_and_a_view():
    compare(5, 10, 8, torch.float32)
    z = torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE).transpose(0, 2)
    torch.testing.assert_close(triton_kernel.mutual_distances(z), reference.mutual_distances(z), rtol=1e-4, atol=1e-4)


def test_the_image_itself_is_at_infinity():
    z = torch.zeros(2, 3, 4, device=DEVICE)
    found = triton_kernel.mutual_distances(z)
    assert found.isinf().sum() == 6 and found.diagonal().isinf().all()
    assert float(found[0, 1].max()) == 0
