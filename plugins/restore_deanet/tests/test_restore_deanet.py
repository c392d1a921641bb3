"""restore_deanet: kernels by hand, folding against parallel convolutions, attention, network, loss, refusals."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

from eff.errors import ConfigError, DataError, EffError, ModelError, UnsupportedModelError
from eff.measure import time_calls
from eff.options import check_config
from eff.runner import apply
from eff.schemas import MethodUse, Recipe, TrainOptions
from eff.use import UseRequest, evaluate, export_model, predict
from eff_restore_deanet.attention import CGAFusion, ContentGuidedAttention
from eff_restore_deanet.building import make_deanet
from eff_restore_deanet.config import DEANetConfig
from eff_restore_deanet.deconv import DEConv, angular, central, horizontal, vertical
from eff_restore_deanet.insert import choose_convs, deconvs_of, fold, fold_error, folded_copy, insert_deconvs
from eff_restore_deanet.loss import contrastive_regularisation
from eff_restore_deanet.published import own_name
from eff_restore_kit.features import VGGFeatures
from eff_restore_kit.samples import scene_images

EFF_PLUGIN = "restore_deanet"
DATA = "eff_restore_kit.samples:scenes?train=8&test=2&size=32"


def test_contract(eff_contract_check):
    eff_contract_check()


def recipe(model="deanet:tiny", data=DATA, epochs=1, **options):
    train = TrainOptions(epochs=epochs, batch_size=4)
    use = MethodUse(name="restore_deanet", options=options)
    return Recipe(model=model, data=data, methods=(use,), train=train, device="cpu")


# --- DEConv

W = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
U = torch.tensor([[[1.0, 2.0, 3.0]]])


@pytest.mark.parametrize(
    ("kernel", "taps"),
    [
        (central(W), [1, 2, 3, 4, 5 - 45, 6, 7, 8, 9]),
        (angular(W), [1 - 4, 2 - 1, 3 - 2, 4 - 7, 0, 6 - 3, 7 - 8, 8 - 9, 9 - 6]),
        (horizontal(U), [1, 0, -1, 2, 0, -2, 3, 0, -3]),
        (vertical(U), [1, 2, 3, 0, 0, 0, -1, -2, -3]),
    ],
    ids=["central", "angular", "horizontal", "vertical"],
)
def test_kernels_by_hand(kernel, taps):
    assert kernel.flatten().tolist() == taps


def test_difference_kernels_answer_nothing_to_a_constant():
    torch.manual_seed(0)
    w, u = torch.randn(4, 3, 3, 3, dtype=torch.float64), torch.randn(4, 3, 3, dtype=torch.float64)
    for kernel in (central(w), angular(w), horizontal(u), vertical(u)):
        assert kernel.sum((2, 3)).abs().max() < 1e-12


def test_differences_are_those_of_neighbouring_pixels():
    """An independent form: sums over pixel differences (the definition), not over kernels."""
    torch.manual_seed(0)
    x, w = torch.randn(1, 1, 5, 5, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    around = F.unfold(x, 3)[0].T  # (positions, taps)
    ring = [0, 1, 2, 5, 8, 7, 6, 3]
    following = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    expected_central = sum(w[k] * (around[:, k] - around[:, 4]) for k in range(9))
    expected_angular = sum(w[k] * (around[:, k] - around[:, following[k]]) for k in ring)
    kernel = w.view(1, 1, 3, 3)
    torch.testing.assert_close(F.conv2d(x, central(kernel)).flatten(), expected_central)
    torch.testing.assert_close(F.conv2d(x, angular(kernel)).flatten(), expected_angular)


@given(
    st.integers(1, 9), st.integers(1, 9), st.sampled_from(["chva", "c", "hv", "a"]), st.booleans(), st.integers(0, 99)
)
@settings(max_examples=30, deadline=None)
def test_the_folded_convolution_equals_the_parallel_ones(inputs, outputs, branches, bias, seed):
    torch.manual_seed(seed)
    layer = DEConv(inputs, outputs, branches, bias)
    x = torch.randn(2, inputs, 7, 8)
    assert (layer.folded()(x) - layer.parallel(x)).abs().max() <= 1e-5
    torch.testing.assert_close(layer(x), layer.folded()(x), atol=0, rtol=0)


def test_the_folded_convolution_is_measurably_faster():
    torch.manual_seed(0)
    layer, x = DEConv(32), torch.rand(1, 32, 96, 96)
    conv = layer.folded()
    with torch.inference_mode():
        ratios = [
            time_calls(lambda: layer.parallel(x), torch.device("cpu"), 0.1).median
            / time_calls(lambda: conv(x), torch.device("cpu"), 0.1).median
            for _ in range(3)
        ]
    assert max(ratios) > 2  # about 5 on a quiet machine


def test_every_branch_learns():
    layer = DEConv(3)
    layer(torch.randn(2, 3, 6, 6)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_branches_that_do_not_fit_are_refused():
    model = nn.Sequential(DEConv(4), DEConv(4))
    model[1].central.weight = nn.Parameter(torch.zeros(4, 2, 3, 3))
    with pytest.raises(UnsupportedModelError, match=r"restore_deanet: 1: the branches .* central \(4, 2, 3, 3\)"):
        fold(model)
    assert isinstance(model[0], DEConv)  # nothing was folded


# --- insertion into any network


class Backbone(nn.Module):
    """Convolutions of all kinds; two of them can become DEConvs, one under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.same = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.again = self.same
        self.strided = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(6, 6, 3, padding=2, dilation=2)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 3, 4, stride=2, padding=1)

    def forward(self, x):
        x = self.again(torch.relu(self.same(torch.relu(self.first(x)))))
        return self.up(torch.relu(self.grouped(torch.relu(self.dilated(torch.relu(self.strided(x)))))))


def backbone():
    return Backbone()


def test_insertion_keeps_the_function_and_folds_back():
    model, x = Backbone().eval(), torch.rand(1, 3, 16, 16)
    names = choose_convs(model, (), ())
    assert names == ["first", "same"]
    count = sum(parameter.numel() for parameter in model.parameters())
    changed = insert_deconvs(copy.deepcopy(model), names, "chva", "zero")
    assert list(deconvs_of(changed)) == ["first", "same"] and changed.again is changed.same
    torch.testing.assert_close(changed(x), model(x))
    assert changed.same.vanilla.bias is None
    folded = folded_copy(changed)
    assert not deconvs_of(folded) and sum(p.numel() for p in folded.parameters()) == count
    torch.testing.assert_close(folded(x), model(x))
    other = insert_deconvs(copy.deepcopy(model), names, "ca", "default")
    assert not torch.allclose(other(x), model(x)) and fold_error(other) <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"include": ("strided",)},
            r"include names 'strided', which cannot become a DEConv: its stride is \(2, 2\), not",
        ),
        ({"include": ("dilated",)}, r"its padding is \(2, 2\), not \(1, 1\), its dilation is \(2, 2\)"),
        ({"include": ("grouped",)}, "its groups is 2, not 1"),
        ({"include": ("up",)}, "it is a ConvTranspose2d, not a Conv2d"),
        ({"exclude": ("frist",)}, "exclude names 'frist', which the model lacks; did you mean 'first'"),
    ],
)
def test_convolutions_that_cannot_be_folded_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        choose_convs(Backbone(), options.get("include", ()), options.get("exclude", ()))


def test_a_network_without_such_convolutions_is_refused():
    with pytest.raises(UnsupportedModelError, match="found no 3x3 convolution with stride 1 in Flatten"):
        choose_convs(nn.Flatten(), (), ())


@pytest.mark.parametrize("folds", [True, False])
def test_a_foreign_network_is_trained_with_deconvs_and_reloads(tmp_path, monkeypatch, folds):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    report = apply(recipe(f"{Path(__file__).stem}:backbone", fold=folds, insert_init="default"), tmp_path / "run")
    state = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["state_dict"]
    assert ("same.central.weight" in state) is not folds
    again = evaluate(UseRequest(str(tmp_path / "run" / "model.pt"), device="cpu"))
    assert again.metrics.values["psnr"].value == pytest.approx(report.after.metrics.values["psnr"].value, abs=1e-4)
    assert report.after.metrics.values["fold_error"].value <= 1e-5
    [artifact] = export_model(
        UseRequest(str(tmp_path / "run" / "model.pt"), device="cpu"), ["safetensors"], tmp_path / "out"
    )
    exported = evaluate(UseRequest(str(artifact.path), device="cpu"))  # folded in either case
    assert exported.parameters == sum(p.numel() for p in Backbone().parameters())
    assert exported.metrics.values["psnr"].value == pytest.approx(again.metrics.values["psnr"].value, abs=1e-4)


# --- attention and network


def test_each_channel_is_guided_by_its_own_coarse_map():
    torch.manual_seed(0)
    attention, r = ContentGuidedAttention(8, reduction=4), torch.randn(1, 8, 6, 7)
    channel = attention.excite(F.relu(attention.squeeze(r.mean((2, 3), keepdim=True))))
    spatial = attention.spatial(torch.stack([r.mean(1), r.max(1).values], 1))
    pairs = torch.stack([r, (channel + spatial).expand_as(r)], 2).flatten(1, 2)  # r_0, coarse_0, r_1, coarse_1, ...
    padded = F.pad(pairs, (3, 3, 3, 3), mode="reflect")
    expected = F.conv2d(padded, attention.pixel.weight, attention.pixel.bias, groups=8).sigmoid()
    torch.testing.assert_close(attention(r), expected)


def test_fusion_weighs_x_and_y_with_the_second_sigmoid():
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 8, 8, 8)
    for double in (True, False):
        fusion = CGAFusion(8, 4, double_sigmoid=double)
        w = fusion.attention(x + y)
        w = w.sigmoid() if double else w
        torch.testing.assert_close(fusion(x, y), fusion.conv(x + y + w * x + (1 - w) * y))
        if double:
            assert w.min() > 0.5 and w.max() < 0.7311


def test_the_papers_network_has_the_papers_number_of_weights():
    model = make_deanet("base")
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_789_313  # the card's 7.789 M
    assert sum(parameter.numel() for parameter in folded_copy(model).parameters()) == 3_653_377  # 3.653 M


def test_the_whole_network_folds_without_a_difference():
    torch.manual_seed(0)
    model, x = make_deanet("tiny").eval(), torch.rand(1, 3, 32, 48)
    with torch.inference_mode():
        assert (folded_copy(model)(x) - model(x)).abs().max() <= 1e-6
    plain = make_deanet("tiny", branches="none")
    plain.load_state_dict(folded_copy(model).state_dict())  # the deploy form is the plain network


def test_a_block_adds_its_input_twice():
    torch.manual_seed(0)
    block = make_deanet("tiny").encoder1[0]
    x = torch.randn(1, 8, 9, 9)
    torch.testing.assert_close(block(x), block.conv2(F.relu(block.conv1(x)) + x) + x)


@pytest.mark.parametrize(
    ("published", "own"),
    [
        ("down1.0.weight", "stem.weight"),
        ("down3.0.bias", "down3.bias"),
        ("fe_level_2.weight", "enter2.weight"),
        ("down_level1_block4.conv1.conv1_1.conv.weight", "encoder1.3.conv1.central.weight"),
        ("up_level2_block1.conv1.conv1_4.conv.bias", "decoder2.0.conv1.angular.bias"),
        ("level3_block8.conv1.conv1_5.weight", "middle.7.conv1.vanilla.weight"),
        ("level3_block1.ca.ca.2.weight", "middle.0.attention.excite.weight"),
        ("level3_block1.pa.pa2.weight", "middle.0.attention.pixel.weight"),
        ("up1.0.weight", "up2.weight"),
        ("up2.0.weight", "up1.weight"),
        ("up3.0.weight", "head.weight"),
        ("mix1.sa.sa.weight", "fusion3.attention.spatial.weight"),
        ("mix2.conv.weight", "fusion2.conv.weight"),
    ],
)
def test_published_names_are_known(published, own):
    assert own_name(published) == own and own in make_deanet("base").state_dict()


def test_a_published_checkpoint_opens_with_its_architecture(tmp_path):
    model = make_deanet("tiny")
    own = model.state_dict()
    assert all(own_name(key) == key for key in own)
    as_published = {"stem": "down1.0", "down2": "down2.0", "fusion2": "mix2", "up2": "up1.0", "up1": "up2.0"}
    state = {}
    for key, value in own.items():
        first, _, rest = key.partition(".")
        state[f"{as_published.get(first, first)}.{rest}"] = value
    torch.save({"model": state}, tmp_path / "published.pk.pth")
    measured = evaluate(UseRequest(str(tmp_path / "published.pk.pth"), arch="deanet:tiny", data=DATA, device="cpu"))
    assert measured.parameters == 151_007


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(1, 4, 32, 32), r"takes RGB images \(N, 3, H, W\), got \(1, 4, 32, 32\)"),
        (
            torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
            "floating-point images in .0, 1., got torch.uint8; divide by 255",
        ),
        (torch.rand(1, 3, 32, 12), "sides of at least 16 pixels, got 32x12"),
        (torch.rand(1, 3, 32, 30), "multiples of 4, got 32x30"),
    ],
)
def test_wrong_images_are_refused(image, message):
    with pytest.raises(DataError, match=message):
        make_deanet("tiny")(image)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ("smal", {}, "deanet:smal: there is no such size; did you mean 'small'"),
        ("tiny", {"base_dims": 8}, "option 'base_dims' is unknown; did you mean 'base_dim'"),
        ("tiny", {"base_dim": 12}, "base_dim: input should be a multiple of 8, got 12"),
        ("tiny", {"branches": "cx"}, "branches must be letters of chva, each once, or none"),
        ("tiny", {"reduction": 7}, "a reduction of 7 does not divide 32 channels"),
    ],
)
def test_wrong_networks_are_refused(size, options, message):
    with pytest.raises(ModelError, match=message):
        make_deanet(size, **options)


# --- loss and training


def test_contrast_pulls_to_the_target_and_away_from_the_haze():
    features = VGGFeatures("random")
    clear = scene_images(2, 3, 32, 32, torch.Generator().manual_seed(0))
    hazy = 0.4 * clear + 0.5

    def cr(output):
        return contrastive_regularisation(features, output, clear, hazy)

    assert cr(clear).item() == 0.0
    assert 0 < cr(0.9 * clear + 0.1 * hazy) < cr(0.5 * clear + 0.5 * hazy) < cr(0.1 * clear + 0.9 * hazy)
    output = hazy.clone().requires_grad_()
    assert torch.isfinite(cr(output)) and torch.isfinite(torch.autograd.grad(cr(output), output)[0]).all()


def test_contrast_by_hand():
    """Two levels of the sum against a plain loop, with features that are easy to follow."""

    def features(image):
        return [image * k for k in range(1, 6)]

    output, clear, hazy = torch.full((1, 3, 4, 4), 0.5), torch.full((1, 3, 4, 4), 0.7), torch.full((1, 3, 4, 4), 0.9)
    expected = sum(w * 0.2 / 0.4 for w in (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1))
    assert contrastive_regularisation(features, output, clear, hazy).item() == pytest.approx(expected, rel=1e-5)


def test_contrast_trains_and_the_learning_rate_ends_at_its_floor(tmp_path, monkeypatch):
    rates = []
    original = torch.optim.Adam.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    report = apply(recipe(epochs=3, features="random", lr=1e-3, lr_min=1e-4), tmp_path / "run")
    assert len(rates) == 6 and rates[0] == pytest.approx(1e-3)
    expected = [1e-4 + 0.5 * 9e-4 * (1 + np.cos(np.pi * index / 6)) for index in range(6)]
    assert rates == pytest.approx(expected)
    assert all(np.isfinite(report.training.loss))
    assert Image.open(tmp_path / "run" / "comparison.png").size[0] > 500


def test_without_training_a_network_is_folded(tmp_path):
    report = apply(recipe(epochs=0), tmp_path / "run")
    assert (report.before.parameters, report.after.parameters) == (151_007, 86_047)
    before, after = (part.metrics.values["psnr"].value for part in (report.before, report.after))
    assert after == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": "cc"}, "branches names one twice"),
        ({"branches": "x"}, "branches"),
        ({"lr": 1e-7}, "lr_min .* is above lr"),
        ({"w_l1": 0}, "nothing would be trained"),
        ({"w_cr": -1}, "w_cr"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_config("restore_deanet", DEANetConfig, options)


def test_missing_features_and_other_tasks_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(EffError, match=r"vgg19.pth: there is no such file"):
        apply(recipe(features=str(tmp_path / "vgg19.pth")), tmp_path / "run")
    with pytest.raises(ConfigError, match="compares output and input, which this task does not allow; use -o w_cr=0"):
        apply(recipe("eff.testing.samples:tiny_cnn", "eff.testing.samples:blobs", features="random"), tmp_path / "run")
    with pytest.raises(ModelError, match="deanet:tiny restores images, the data is for classification"):
        apply(recipe(data="eff.testing.samples:blobs"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_classifier_gets_deconvs_too(tmp_path):
    report = apply(
        recipe("eff.testing.samples:tiny_cnn", "eff.testing.samples:blobs?train=32&test=8"), tmp_path / "run"
    )
    assert report.before.parameters == report.after.parameters


@pytest.mark.slow
def test_onnx_holds_the_folded_network(tmp_path):
    onnx = pytest.importorskip("onnx", reason="the export needs onnx")
    pytest.importorskip("onnxruntime", reason="the comparison runs the file")
    apply(recipe(epochs=0, fold=False), tmp_path / "run")
    [artifact] = export_model(UseRequest(str(tmp_path / "run"), device="cpu"), ["onnx"], tmp_path / "out")
    assert artifact.details["max_difference"] < 1e-4
    weights = onnx.load(artifact.path).graph.initializer
    assert sum(int(np.prod(w.dims)) for w in weights if len(w.dims) == 4) < 86_047


# --- large photos


@pytest.fixture
def trained(tmp_path):
    apply(recipe(epochs=2, lr=2e-3), tmp_path / "run")
    return tmp_path / "run" / "model.pt"


def test_a_photo_in_tiles_has_no_seams(trained, tmp_path):
    """Tiled and whole pass differ least where tiles meet as elsewhere: by what they know of global averages."""
    from eff.checkpoint import read_model_file
    from eff_restore_kit.task import Restoration, RestorationOptions

    model = make_deanet("tiny", branches="none").eval()
    model.load_state_dict(read_model_file(trained).state)
    image = scene_images(1, 3, 402, 502, torch.Generator().manual_seed(5))
    options = {"multiple": 4, "smallest": 16}
    whole = Restoration(RestorationOptions(**options, tile=640)).predict(model, {"image": image})
    task = Restoration(RestorationOptions(**options, tile=192))
    tiled = task.predict(model, {"image": image})
    assert tiled.shape == image.shape
    assert (tiled - whole).abs().max() < 2 / 255
    difference = (tiled - whole).abs().amax((0, 1))
    jump = (difference.diff(dim=-1)).abs()
    assert jump.max() < 1 / 255  # nowhere does it begin abruptly


def test_predict_writes_a_photo_of_any_size(trained, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 71, 3), np.uint8)).save(tmp_path / "in.png")
    [prediction] = predict(UseRequest(str(trained), device="cpu"), [tmp_path / "in.png"], tmp_path / "out.png")
    assert prediction.file == tmp_path / "out.png" and Image.open(tmp_path / "out.png").size == (71, 50)
    Image.fromarray(np.zeros((12, 40, 3), np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(DataError, match="small.png: is 12x40 pixels, the model needs sides of at least 16"):
        predict(UseRequest(str(trained), device="cpu"), [tmp_path / "small.png"], tmp_path / "out.png")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_twelve_megapixels_stay_within_two_gibibytes(tmp_path):
    """The paper's network on a 4000 x 3000 photo, in a process of its own."""
    apply(recipe("deanet:base", "eff_restore_kit.samples:scenes?train=0&test=1&size=32", epochs=0), tmp_path / "run")
    small = scene_images(1, 3, 300, 400, torch.Generator().manual_seed(0))
    photo = F.interpolate(small, scale_factor=10, mode="bilinear")[0]
    Image.fromarray((photo * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "photo.jpg", quality=95)
    code = (
        "import sys; from eff.cli import main\n"
        "try: main()\n"
        "finally: print([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0])"
    )
    arguments = ["predict", str(tmp_path / "run"), str(tmp_path / "photo.jpg"), "-o", str(tmp_path / "out.png")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--device", "cpu"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    peak = int(done.stdout.split("VmHWM:")[1].split()[0]) * 1024
    assert peak < 2 * 2**30, f"{peak / 2**30:.2f} GiB"
    assert Image.open(tmp_path / "out.png").size == (4000, 3000)
