"""Training augmentation: what it may do, what it may not, and that a generator decides it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eff.data.augment import Augmentation


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("shape", "flip", "expected"),
    [
        ((3, 224, 224), True, Augmentation(flip=True, resized_crop=True)),
        ((3, 32, 32), True, Augmentation(shift=4, flip=True)),
        ((3, 8, 8), True, Augmentation(shift=1, flip=True)),
        ((1, 28, 28), False, Augmentation(shift=3)),
        ((1, 224, 224), False, Augmentation(shift=4)),
    ],
)
def test_the_shape_decides_the_standard_augmentation(shape, flip, expected):
    assert Augmentation.standard(shape, flip) == expected


def test_a_shift_moves_the_image_by_whole_pixels_and_fills_with_black():
    images = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4).repeat(64, 1, 1, 1)
    shifted = Augmentation(shift=1)(images, seeded())
    padded = torch.nn.functional.pad(images[0, 0], (1, 1, 1, 1))
    possible = {tuple(padded[r : r + 4, c : c + 4].flatten().tolist()) for r in range(3) for c in range(3)}
    assert {tuple(image.flatten().tolist()) for image in shifted} == possible


def test_a_flip_mirrors_about_half_of_the_images():
    images = torch.tensor([0, 1, 2], dtype=torch.uint8).view(1, 1, 1, 3).repeat(1000, 1, 1, 1)
    first = Augmentation(flip=True)(images, seeded())[:, 0, 0, 0].tolist()
    assert set(first) == {0, 2}
    assert 430 < first.count(2) < 570  # 4.4 standard deviations of a fair coin


def test_no_augmentation_changes_nothing():
    images = torch.rand(4, 3, 8, 8, generator=seeded())
    assert torch.equal(Augmentation()(images, seeded()), images)


def test_a_resized_crop_of_a_gradient_is_a_narrower_gradient():
    ramp = torch.linspace(0, 1, 128).view(1, 1, 1, 128).repeat(32, 3, 128, 1)
    crops = Augmentation(resized_crop=True)(ramp, seeded())
    spans = crops[:, 0, 64, -1] - crops[:, 0, 64, 0]
    # Width share: sqrt(area * ratio), area from 0.35, ratio from 3/4; the last pixel's centre is inside.
    assert spans.min() > (0.35 * 0.75) ** 0.5 - 0.02
    assert spans.max() <= 1.0
    assert spans.std() > 0.05


@given(st.integers(0, 2**31 - 1), st.sampled_from([Augmentation(2, True), Augmentation(0, True, True)]))
def test_the_generator_alone_decides(seed, augmentation):
    images = torch.rand(3, 3, 16, 16, generator=seeded())
    before = images.clone()
    first, again = augmentation(images, seeded(seed)), augmentation(images, seeded(seed))
    assert torch.equal(first, again)
    assert torch.equal(images, before)
    assert first.shape == images.shape
    assert first.min() >= 0 and first.max() <= 1
