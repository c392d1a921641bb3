"""restore_kit: metrics against scikit-image and the literature, degradations, data, tiling, the task."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from eff.data import load_data
from eff.errors import DataError, EffError, RequestError
from eff.image_quality import psnr, ssim
from eff.schemas import TaskSpec
from eff_restore_kit.degradations import Bicubic, Haze, Noise, depth_field
from eff_restore_kit.features import VGGFeatures
from eff_restore_kit.metrics import RestorationMeter, luma
from eff_restore_kit.plugin import RestoreKit
from eff_restore_kit.resize import imresize
from eff_restore_kit.samples import scene_images
from eff_restore_kit.task import Restoration, RestorationOptions
from eff_restore_kit.tiling import Tiling, fades, held_averages, measure_context, restore_in_tiles, starts

SHARED = Path(__file__).parents[3] / ".." / "shared"
SOURCES = RestoreKit.data_sources
SCENES = "eff_restore_kit.samples:scenes"


def shared(*parts):
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs ../shared/{path.relative_to(SHARED)}")
    return path


def data_of(text, task=None):
    return load_data(text, task, SOURCES)


def images(seed=0, shape=(2, 3, 40, 52)):
    return scene_images(*shape, torch.Generator().manual_seed(seed))


def noisy(image, amount=0.1, seed=1):
    return (image + amount * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


# --- metrics


def test_psnr_of_a_known_error():
    target = torch.full((1, 3, 8, 8), 0.5)
    assert psnr(target + 0.1, target).item() == pytest.approx(20.0, abs=1e-4)
    assert psnr(target, target).item() == 100.0


def test_psnr_and_ssim_are_those_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics", reason="the reference is scikit-image")
    target, image = images(), noisy(images())
    for index in range(len(target)):
        x, y = (value[index].permute(1, 2, 0).double().numpy() for value in (image, target))
        assert psnr(image, target)[index].item() == pytest.approx(metrics.peak_signal_noise_ratio(y, x, data_range=1))
        expected = metrics.structural_similarity(
            y, x, channel_axis=2, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(image, target)[index].item() == pytest.approx(expected, abs=1e-9)


def test_luma_is_matlabs_rgb2ycbcr():
    colours = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0]]).view(3, 3, 1, 1)
    assert (255 * luma(colours)).flatten().tolist() == pytest.approx([16, 235, 81.481], abs=1e-4)
    skimage = pytest.importorskip("skimage.color", reason="the reference is scikit-image")
    image = images()[:1]
    expected = skimage.rgb2ycbcr(image[0].permute(1, 2, 0).double().numpy())[..., 0]
    np.testing.assert_allclose(255 * luma(image.double())[0, 0].numpy(), expected, atol=1e-9)


def test_the_meter_takes_mean_over_images_and_leaves_the_border_out():
    target, image = images(), noisy(images())
    meter = RestorationMeter()
    for row in range(2):
        meter.update(image[row : row + 1], {"image": image[row : row + 1], "target": target[row : row + 1]})
    values = meter.compute().values
    assert values["psnr"].value == pytest.approx(psnr(image, target).mean().item())
    assert values["input_psnr"].value == values["psnr"].value
    shaved = RestorationMeter(border=4)
    broken = image.clone()
    broken[..., :4, :] = 0
    shaved.update(broken, {"image": image, "target": target})
    inner = (..., slice(4, -4), slice(4, -4))
    assert shaved.compute().values["psnr"].value == pytest.approx(psnr(image[inner], target[inner]).mean().item())


def test_images_smaller_than_the_window_are_refused():
    with pytest.raises(DataError, match="SSIM needs sides of at least 11 pixels, the images are 8x8"):
        ssim(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8))
    with pytest.raises(DataError, match="cannot be compared"):
        psnr(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 9))


# --- degradations


def test_bicubic_is_matlabs_on_set5():
    """Set5's small images were made by Matlab; on the way back, the literature's 28.42 dB and 0.8104 on luma come out."""
    folder = shared("data", "sr", "Set5", "x4")
    data = data_of(f"pairs:{folder}?train=0&test=5")
    meter = RestorationMeter(border=4, rounded=True)
    for index in range(5):
        batch = data.test.batch([index])
        made = Bicubic(scale=4)(batch["target"], torch.Generator())
        assert (255 * (made - batch["image"])).abs().mean() < 0.31  # the files are rounded: 0.25 by that alone
        meter.update(imresize(batch["image"], 4), batch)
    values = meter.compute().values
    assert values["psnr_y"].value == pytest.approx(28.42, abs=0.02)
    assert values["ssim_y"].value == pytest.approx(0.8104, abs=0.001)


@given(st.integers(5, 40), st.sampled_from([0.25, 1 / 3, 0.5, 2, 3]))
@settings(max_examples=25, deadline=None)
def test_resizing_keeps_constants_and_gives_the_stated_size(side, scale):
    out = imresize(torch.full((1, 1, side, side + 1), 0.7, dtype=torch.float64), scale)
    assert out.shape[-2:] == (math.ceil(side * scale), math.ceil((side + 1) * scale))
    torch.testing.assert_close(out, torch.full_like(out, 0.7))


def test_haze_is_the_scattering_equation():
    clear = images()
    haze = Haze(beta=(1.0, 1.0), airlight=(0.8, 0.8))
    depth = depth_field(2, 40, 52, haze.depth, torch.Generator())
    generator = torch.Generator()
    hazy = haze(clear, generator)
    transmission = (hazy - 0.8) / (clear - 0.8)
    safe = (clear - 0.8).abs() > 0.05
    assert (transmission[safe] >= math.exp(-1.5) - 1e-3).all() and (transmission[safe] <= math.exp(-0.3) + 1e-3).all()
    assert depth.amin().item() == pytest.approx(0.3) and depth.amax().item() == pytest.approx(1.5)
    assert depth[:, :, :10].mean() > depth[:, :, -10:].mean()  # the top of a photo is farther away


def test_every_image_draws_its_own_haze():
    same = images(shape=(1, 3, 32, 32)).expand(2, -1, -1, -1)
    hazy = Haze()(same, torch.Generator().manual_seed(0))
    assert not torch.allclose(hazy[0], hazy[1])


def test_noise_has_the_stated_deviation():
    clear = torch.full((4, 1, 64, 64), 0.5)
    assert (Noise()(clear, torch.Generator().manual_seed(0)) - clear).std().item() == pytest.approx(25 / 255, rel=0.02)


# --- data


@pytest.fixture
def folder(tmp_path):
    for index, image in enumerate(images(shape=(10, 3, 40, 52))):
        array = (image * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(tmp_path / f"{index:02d}.png")
    return tmp_path


def test_photos_are_split_by_seed_and_degraded_reproducibly(folder):
    data = data_of(f"photos:{folder}?degrade=haze&size=32")
    assert (len(data.train), len(data.test)) == (8, 2)
    first, again = data.test.batch([0, 1]), data_of(f"photos:{folder}?degrade=haze&size=32").test.batch([0, 1])
    assert torch.equal(first["image"], again["image"]) and first["target"].shape == (2, 3, 32, 32)
    assert torch.equal(data.test.batch([1])["image"], first["image"][1:])  # however it is batched
    assert data.task.options["size"] == [32, 32]
    other = data_of(f"photos:{folder}?degrade=haze&size=32&beta=2")
    assert other.fingerprint() != data.fingerprint()
    train, test = (set(split.photos.photos) for split in (data.train, data.test))
    assert not train & test


def test_training_draws_new_crops_and_haze(folder):
    split = data_of(f"photos:{folder}?size=16").train
    generator = torch.Generator().manual_seed(3)
    first, second = split.batch([0], generator), split.batch([0], generator)
    assert not torch.equal(first["target"], second["target"])
    again = split.batch([0], torch.Generator().manual_seed(3))
    assert torch.equal(first["image"], again["image"])


def test_whole_photos_of_unequal_sizes_are_padded_and_marked(folder):
    Image.fromarray(np.zeros((33, 45, 3), np.uint8)).save(folder / "small.png")
    split = data_of(f"photos:{folder}?train=0&test=11&size=16&test_size=whole").test
    batch = split.batch(range(11))
    assert batch["image"].shape == (11, 3, 40, 52) and sorted(batch["sizes"].tolist())[0] == [33, 45]


def test_pairs_of_super_resolution_are_cropped_together(folder):
    (folder / "LR").mkdir()
    (folder / "HR").mkdir()
    for path in list(folder.glob("*.png")):
        image = Image.open(path)
        image.save(folder / "HR" / path.name)
        image.reduce(2).save(folder / "LR" / path.name)
        path.unlink()
    data = data_of(f"pairs:{folder}?size=16")
    assert data.task.options["scale"] == 2
    batch = data.train.batch([0, 1, 2], torch.Generator().manual_seed(0))
    assert batch["image"].shape == (3, 3, 8, 8) and batch["target"].shape == (3, 3, 16, 16)
    small = torch.nn.functional.avg_pool2d(batch["target"], 2)
    assert (small - batch["image"]).abs().max() < 2 / 255


def test_one_target_may_have_several_hazy_images(folder):
    (folder / "hazy").mkdir()
    (folder / "clear").mkdir()
    for path in list(folder.glob("0*.png")):
        image = Image.open(path)
        image.save(folder / "clear" / path.name)
        image.save(folder / "hazy" / f"{path.stem}_0.8_0.2.png")
        image.save(folder / "hazy" / f"{path.stem}_1_0.1.png")
    data = data_of(f"pairs:{folder}?size=32")
    assert (len(data.train), len(data.test)) == (16, 4)
    train, test = ({photo.path for photo in split.targets.photos} for split in (data.train, data.test))
    assert not train & test
    (folder / "hazy" / "99.png").write_bytes((folder / "clear" / "00.png").read_bytes())
    with pytest.raises(DataError, match="99.png: has no target of the name 99 in"):
        data_of(f"pairs:{folder}?size=32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("photos:{0}?size=64", r"00.png: is 40x52, smaller than the crop of 64x64; use \?size="),
        ("photos:{0}?degrade=fog", "degrade must be haze, noise or bicubic, got 'fog'"),
        ("photos:{0}?beta=x", "beta must be low-high, the scattering coefficient, got 'x'"),
        ("photos:{0}?beta=2-1", "beta must be low-high with 0 <= low <= high, got 2-1"),
        ("photos:{0}?sigma=25", "option 'sigma' is unknown; photos knows"),
        ("photos:{0}?size=16&test=20", "has 10 images, fewer than 20 for test"),
        ("photos:{0}/none", "there is no file or folder"),
        ("photos:{0}/empty", "empty: has no images"),
        ("pairs:{0}", "has no pairs; it needs the folders input and target"),
    ],
)
def test_bad_data_is_one_clear_line(folder, text, message):
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=message) as caught:
        data_of(text.format(folder))
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_of_another_task_or_scale_is_refused(folder):
    with pytest.raises(DataError, match="is for restoration, the model's task is classification"):
        data_of(f"photos:{folder}?size=16", TaskSpec(name="classification"))
    with pytest.raises(DataError, match="has scale 1, the model 2; use data of scale 2"):
        data_of(f"photos:{folder}?size=16", TaskSpec(name="restoration", options={"scale": 2}))


def test_the_sample_photos_need_no_folder():
    pytest.importorskip("skimage", reason="the photos are scikit-image's")
    pytest.importorskip("sklearn", reason="the photos are scikit-learn's")
    data = data_of("photos?degrade=noise&train=5&test=3&size=128")
    assert len(data.train) == 5 and data.test.batch([0, 1, 2])["target"].shape == (3, 3, 128, 128)


# --- tiling


class Local(nn.Sequential):
    """Looks 6 pixels far on a grid of 2, with a nonlinearity."""

    def __init__(self, scale=1):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1), nn.Tanh(),
            nn.ConvTranspose2d(6, 3, 4, stride=2, padding=1), nn.Upsample(scale_factor=scale),
        )  # fmt: skip


class Global(nn.Module):
    """A local network whose channels are weighted by a global average."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.mix = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.conv(x)
        return y * self.mix(self.pool(y)) * 4


@given(st.integers(1, 90), st.integers(0, 10), st.integers(1, 8), st.sampled_from([1, 2, 4]))
@settings(max_examples=60, deadline=None)
def test_the_weights_of_all_tiles_sum_to_one_and_trust_no_edge(cells, context, blend, multiple):
    side, tiling = cells * multiple, Tiling(32, context // multiple * multiple, blend, multiple)
    total = torch.zeros(side)
    for place, weight in zip(starts(side, tiling), fades(side, tiling), strict=True):
        assert place % multiple == 0
        total[place : place + len(weight)] += weight
        if place > 0:
            assert (weight[: tiling.context] == 0).all()
        if place + len(weight) < side:
            assert (weight[len(weight) - tiling.context :] == 0).all()
    torch.testing.assert_close(total, torch.ones(side))


@pytest.mark.parametrize("scale", [1, 2])
def test_tiles_give_what_the_whole_photo_gives(scale):
    network = Local(scale)
    image = torch.rand(1, 3, 150, 202, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = network(image)
        tiled = restore_in_tiles(network, image, Tiling(64, 8, 8, 2), scale)
    torch.testing.assert_close(tiled, whole, atol=1e-6, rtol=0)


def test_a_context_too_small_shows():
    """The test above would see a seam."""
    network = Local()
    image = torch.rand(1, 3, 150, 202, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert (restore_in_tiles(network, image, Tiling(64, 0, 2, 2)) - network(image)).abs().max() > 1e-3


def test_the_context_is_the_receptive_radius():
    assert measure_context(nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.Conv2d(4, 3, 3, padding=1)), 3, 64) == 3
    assert measure_context(Local(), 3, 64, multiple=2) in (4, 6)
    wide = nn.Conv2d(3, 3, 3, dilation=80, padding=80)
    assert measure_context(wide, 3, 40) == 40


def test_global_averages_are_held_for_all_tiles():
    network = Global()
    image = torch.rand(1, 3, 300, 260, generator=torch.Generator().manual_seed(0))
    image[..., :150] *= 0.2  # tiles alone would have very different averages
    with torch.inference_mode():
        whole = network(image)
        naive = restore_in_tiles(network, image, Tiling(96, 4, 8))
        with held_averages(network, network, image):
            held = network(image)
            tiled = restore_in_tiles(network, image, Tiling(96, 4, 8))
        assert torch.equal(network(image), whole)  # the hooks are gone
    torch.testing.assert_close(tiled, held, atol=1e-6, rtol=0)
    assert (tiled - whole).abs().max() < 0.1 * (naive - whole).abs().max()


def test_tiles_without_room_are_refused():
    with pytest.raises(ValueError, match="tiles of 32 pixels leave nothing beside a context of 16"):
        Tiling(32, 16, 8)


# --- the task


def task_of(**options):
    return Restoration(RestorationOptions(**options))


def test_prediction_equals_the_whole_pass_and_has_the_photos_size(tmp_path):
    network = Local().eval()
    image = torch.rand(1, 3, 143, 201, generator=torch.Generator().manual_seed(0))
    tiled = task_of(multiple=2, tile=96).predict(network, {"image": image})
    whole = task_of(multiple=2, tile=640).predict(network, {"image": image})
    assert tiled.shape == image.shape
    torch.testing.assert_close(tiled, whole, atol=1e-6, rtol=0)


def test_unequal_images_are_measured_without_their_padding():
    network = Local().eval()
    task = task_of(multiple=2)
    batch = {"image": images(), "target": images(), "sizes": torch.tensor([[40, 52], [30, 44]])}
    with torch.inference_mode():
        output = task.forward(network, batch)
        alone = task.forward(network, {"image": batch["image"][1:, :, :30, :44]})
    torch.testing.assert_close(output[1:, :, :30, :44], alone)
    assert (output[1, :, 30:] == 0).all()


def test_a_photo_is_read_and_written_in_its_own_size(tmp_path):
    array = (images(shape=(1, 3, 40, 52))[0] * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "in.png")
    task = task_of()
    batch = task.read_input(tmp_path / "in.png")
    prediction = task.show(task.predict(nn.Identity(), batch), tmp_path / "in.png", tmp_path / "out.png")
    assert prediction.file == tmp_path / "out.png"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), array)
    assert task.show(batch["image"], tmp_path / "in.png", None).rows[0]["restored"] == "40x52"


def test_wrong_photos_and_places_are_refused(tmp_path):
    rgba = np.full((40, 52, 4), 128, np.uint8)
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    with pytest.raises(DataError, match="clear.png: has transparent pixels"):
        task_of().read_input(tmp_path / "clear.png")
    rgba[..., 3] = 255
    Image.fromarray(rgba).save(tmp_path / "opaque.png")
    assert task_of().read_input(tmp_path / "opaque.png")["image"].shape == (1, 3, 40, 52)
    with pytest.raises(DataError, match="opaque.png: is 40x52 pixels, the model needs sides of at least 64"):
        task_of(smallest=64).read_input(tmp_path / "opaque.png")
    for name, message in (
        ("out.pmg", r"'.pmg' is no image format; did you mean"),
        ("no/out.png", "there is no folder"),
    ):
        with pytest.raises(RequestError, match=message):
            task_of().show(torch.rand(1, 3, 8, 8), tmp_path / "opaque.png", tmp_path / name)


def test_a_model_that_makes_other_shapes_is_refused():
    data = load_data(f"{SCENES}?size=32")
    with pytest.raises(EffError, match=r"Sequential makes \(1, 8\).*it does not restore this data"):
        task_of().check_fit(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8)), data)
    with pytest.raises(DataError, match="has 3 channels, the model expects 1"):
        task_of(channels=1).check_fit(nn.Identity(), data)
    with pytest.raises(DataError, match="the model needs sides of at least 64"):
        task_of(smallest=64).check_fit(nn.Identity(), data)


def test_random_features_are_frozen_and_repeatable():
    image = torch.rand(1, 3, 32, 32)
    first, second = VGGFeatures("random"), VGGFeatures("random")
    assert [tuple(f.shape) for f in first(image)] == [
        (1, 16, 32, 32), (1, 32, 16, 16), (1, 64, 8, 8), (1, 128, 4, 4), (1, 128, 2, 2),
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first(image), second(image), strict=True))
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_files_that_are_no_vgg_are_refused(tmp_path):
    with pytest.raises(EffError, match="there is no such file"):
        VGGFeatures(str(tmp_path / "vgg19.pth"))
    torch.save({"features.0.weight": torch.rand(64, 3, 3, 3)}, tmp_path / "vgg19.pth")
    with pytest.raises(EffError, match="VGG-19"):
        VGGFeatures(str(tmp_path / "vgg19.pth"))
