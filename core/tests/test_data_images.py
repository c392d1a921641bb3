"""One image: pixels, orientation, size, and what is wrong with bad files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eff.data.images import MAX_PIXELS, decode, native_shape, read_image
from eff.errors import DataError


def gradient(height: int, width: int) -> np.ndarray:
    """Return an RGB image whose red is the row and whose green is the column."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=2).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def test_an_image_of_the_wanted_size_keeps_its_pixels(tmp_path):
    pixels = gradient(5, 6)
    image = read_image(save(tmp_path / "a.png", pixels), (3, 5, 6))
    assert image.dtype == torch.float32
    assert torch.equal((image * 255).round().byte(), torch.from_numpy(pixels).permute(2, 0, 1))


def test_a_larger_image_loses_its_longer_side_at_both_ends(tmp_path):
    path = save(tmp_path / "a.png", gradient(4, 10))
    image = read_image(path, (3, 4, 4)) * 255
    assert image[1, 0].tolist() == pytest.approx([3, 4, 5, 6])


def test_the_shorter_side_decides_the_scale(tmp_path):
    # 8 x 20 to 4 x 4: to 4 x 10, then columns 3 to 6, each the mean of about two
    image = read_image(save(tmp_path / "a.png", gradient(8, 20)), (3, 4, 4)) * 255
    assert image[1, 2].tolist() == pytest.approx([6.5, 8.5, 10.5, 12.5], abs=1.0)  # antialiasing and rounding to bytes


def test_an_image_turned_by_its_exif_tag_is_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees to see it upright
    pixels = gradient(4, 6)
    path = save(tmp_path / "a.png", pixels, exif=exif)
    upright = (read_image(path, (3, 6, 4)) * 255).round().byte()
    assert native_shape(path, "a") == (3, 6, 4)
    assert torch.equal(upright, torch.from_numpy(np.rot90(pixels, -1).copy()).permute(2, 0, 1))


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("1", 1), ("RGB", 3), ("P", 3), ("RGBA", 3), ("CMYK", 3)])
def test_every_common_mode_is_read_as_grey_and_as_rgb(tmp_path, mode, channels):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(gradient(4, 4)).convert(mode).save(path)
    assert native_shape(path, "a") == (channels, 4, 4)
    assert read_image(path, (1, 4, 4)).shape == (1, 4, 4)
    assert read_image(path, (3, 4, 4)).shape == (3, 4, 4)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    path = save(tmp_path / "a.png", np.array([[0, 0x80FF], [0xFF00, 0x0100]], dtype=np.uint16))
    assert (read_image(path, (1, 2, 2)) * 255).round().flatten().tolist() == [0, 0x80, 0xFF, 1]


def test_bytes_and_file_give_the_same_pixels(tmp_path):
    path = save(tmp_path / "a.jpg", gradient(9, 7))
    assert np.array_equal(decode(path, (3, 4, 4), "a"), decode(path.read_bytes(), (3, 4, 4), "a"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png: there is no such file"):
        read_image(tmp_path / "gone.png", (3, 4, 4))


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(DataError, match="is a folder, not an image"):
        read_image(tmp_path, (3, 4, 4))


def test_text_is_no_image(tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"a\.jpg: is not an image that Pillow can read"):
        read_image(tmp_path / "a.jpg", (3, 4, 4))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_image_is_called_damaged(tmp_path, suffix):
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, format="JPEG" if suffix == "jpg" else "PNG")
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    with pytest.raises(DataError, match=rf"a\.{suffix}: the image is damaged .*; replace or remove it"):
        read_image(path, (3, 64, 64))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    side = int(MAX_PIXELS**0.5) + 2
    path = tmp_path / "bomb.png"
    Image.new("1", (side, side)).save(path)
    with pytest.raises(DataError, match=r"bomb\.png: has more than 89\.5 million pixels"):
        read_image(path, (1, 4, 4))


def test_four_channels_are_more_than_images_have(tmp_path):
    path = save(tmp_path / "a.png", gradient(4, 4))
    with pytest.raises(DataError, match=r"the model wants 4 channels; images give 1 \(grey\) or 3 \(RGB\)"):
        read_image(path, (4, 4, 4))
