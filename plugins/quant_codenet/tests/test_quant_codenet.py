"""quant_codenet: sampling against a float64 loop, the network, quantizers, files, the CLI's path, bad input."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from eff.errors import EffError, ModelError, RequestError, UnsupportedModelError
from eff.run import Run
from eff.runner import apply
from eff.schemas import MethodUse, ModelSpec, Recipe, TrainOptions
from eff.use import UseRequest, evaluate
from eff_quant_codenet import claims
from eff_quant_codenet.building import build
from eff_quant_codenet.config import CoDeNetConfig
from eff_quant_codenet.deform import ANCHORS, DeformConv2d, Tap, round_straight_through, sample_taps
from eff_quant_codenet.extension import DetectionExtension
from eff_quant_codenet.network import CoDeNet, Deformation, Layout, channel_shuffle
from eff_quant_codenet.plugin import CoDeNetMethod
from eff_quant_codenet.quantizers import QuantConv, RunningRange, weight_range
from eff_quant_codenet.report import count_macs, offset_histogram
from eff_quant_codenet.storage import write
from eff_quant_codenet.task import Detection, DetectionOptions
from eff_quant_kit.layers import QuantLayer, quant_layers

EFF_PLUGIN = "quant_codenet"
TINY = "codenet:small?width=4,8,8&blocks=1&decoder=8&head=4"
SCENES = "scenes?train=16&test=8&size=32"


def test_contract(eff_contract_check):
    eff_contract_check()


def bilinear(image, y, x):
    """Value of a 2-d list at (y, x), written from the definition; 0 outside."""
    height, width = len(image), len(image[0])
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += image[row][column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def deformed_by_loops(x, offsets, weight, stride, padding, dilation):
    """y[o, p] of the formula in float64; depthwise where the weight has one input channel."""
    n, c = x.shape[:2]
    out, per_group, kernel, _ = weight.shape
    height, width = offsets.shape[-2:]
    y = torch.zeros(n, out, height, width, dtype=torch.float64)
    for b, o, r, s in itertools.product(range(n), range(out), range(height), range(width)):
        first = o * c // out if per_group < c else 0
        for i, (tr, tc) in itertools.product(range(per_group), itertools.product(range(kernel), repeat=2)):
            tap = tr * kernel + tc
            dy, dx = float(offsets[b, 2 * tap, r, s]), float(offsets[b, 2 * tap + 1, r, s])
            at = r * stride - padding + tr * dilation + dy, s * stride - padding + tc * dilation + dx
            y[b, o, r, s] += float(weight[o, i, tr, tc]) * bilinear(x[b, first + i].tolist(), *at)
    return y


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 2**31 - 1), st.integers(1, 5), st.integers(3, 6), st.sampled_from([1, 2]), st.sampled_from([1, 2]),
    st.booleans(),
)  # fmt: skip
def test_sampling_and_convolution_are_the_formula(seed, height, width, stride, dilation, depthwise):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, height, width, generator=generator, dtype=torch.float64)
    shape = [(side + 2 * dilation - 2 * dilation - 1) // stride + 1 for side in (height, width)]
    offsets = 3 * torch.randn(1, 18, *shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, 1 if depthwise else 2, 3, 3, generator=generator, dtype=torch.float64)
    sampled = sample_taps(x, offsets, 3, stride, dilation, dilation)
    found = F.conv2d(sampled, weight, stride=3, groups=2 if depthwise else 1)
    torch.testing.assert_close(found, deformed_by_loops(x, offsets, weight, stride, dilation, dilation))
    whole = offsets.round()
    gathered = sample_taps(x, whole, 3, stride, dilation, dilation, nearest=True)
    torch.testing.assert_close(gathered, sample_taps(x, whole, 3, stride, dilation, dilation))


def test_gradients_of_image_positions_and_weights_are_those_of_differences():
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(*s, generator=generator, dtype=torch.float64, requires_grad=True)
        for s in ((1, 2, 4, 3), (2, 1, 3, 3))
    )
    s = (0.15 + torch.rand(1, 1, 4, 3, generator=generator, dtype=torch.float64) * 0.7).requires_grad_()
    anchors = torch.tensor(ANCHORS, dtype=torch.float64).view(1, 18, 1, 1)

    def square(x, s, weight):
        return F.conv2d(sample_taps(x, anchors * (s - 1)), weight, stride=3, groups=2)

    assert torch.autograd.gradcheck(square, (x, s, weight))


@pytest.mark.parametrize("deform", ["full", "bound", "square"])
@pytest.mark.parametrize("bound_mode", ["repo", "paper"])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_variant_starts_as_the_plain_convolution(deform, bound_mode, stride):
    torch.manual_seed(0)
    layer = DeformConv2d(4, 6, deform, stride=stride, bound_mode=bound_mode, groups=2, bias=True)
    x = torch.randn(2, 4, 7, 6)
    plain = F.conv2d(x, layer.conv.weight, layer.conv.bias, stride, 1, groups=2)
    torch.testing.assert_close(layer(x), plain, atol=1e-5, rtol=1e-5)
    assert layer.conv.weight.abs().max().item() <= 1 / math.sqrt(4 * 9)


@pytest.mark.parametrize(("s", "dilation"), [(2.0, 2), (3.0, 3)])
def test_the_square_variant_is_a_dilation(s, dilation):
    torch.manual_seed(0)
    layer, x = DeformConv2d(3, 3, "square", groups=3), torch.randn(1, 3, 9, 8)
    nn.init.constant_(layer.offset.bias, s)
    torch.testing.assert_close(
        layer(x), F.conv2d(x, layer.conv.weight, None, 1, dilation, dilation, 3), atol=1e-5, rtol=1e-5
    )


def test_scale_0_reads_the_centre_only_and_a_negative_one_mirrors_the_taps():
    torch.manual_seed(0)
    layer, x = DeformConv2d(3, 3, "square", groups=3), torch.randn(1, 3, 5, 5)
    nn.init.zeros_(layer.offset.bias)
    torch.testing.assert_close(layer(x), x * layer.conv.weight.sum((1, 2, 3)).view(1, -1, 1, 1), atol=1e-5, rtol=1e-5)
    nn.init.constant_(layer.offset.bias, -1.0)
    mirrored = F.conv2d(x, layer.conv.weight.flip(-1, -2), None, 1, 1, groups=3)
    torch.testing.assert_close(layer(x), mirrored, atol=1e-5, rtol=1e-5)
    paper = DeformConv2d(3, 3, "square", groups=3, bound_mode="paper")
    nn.init.constant_(paper.offset.bias, 1.0)  # t = 1 is s = 2
    paper.conv.weight = layer.conv.weight
    torch.testing.assert_close(paper(x), F.conv2d(x, layer.conv.weight, None, 1, 2, 2, 3), atol=1e-5, rtol=1e-5)


def test_the_first_channel_of_a_tap_moves_it_down():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    offsets = torch.zeros(1, 18, 3, 4)
    offsets[:, 8] = 1.0  # dy of the centre, tap 4
    centre = sample_taps(x, offsets)[..., 1::3, 1::3]
    assert centre[0, 0].tolist() == [[4, 5, 6, 7], [8, 9, 10, 11], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("deform", "mode", "low", "high"),
    [("square", "repo", -7, 8), ("square", "paper", 0, 8), ("bound", "repo", -7, 8), ("bound", "paper", 0, 8)],
)
def test_offsets_are_clipped_and_the_gradient_is_zero_outside(deform, mode, low, high):
    layer = DeformConv2d(1, 1, deform, bound_mode=mode)
    nn.init.ones_(layer.offset.weight)
    nn.init.zeros_(layer.offset.bias)
    x = torch.tensor([low - 2.0, low + 0.5, high - 0.5, high + 3.0]).view(1, 1, 2, 2).requires_grad_()
    found = layer.offset_map(x)[:, :1]
    assert found.flatten().tolist() == [low, low + 0.5, high - 0.5, high]
    found.sum().backward()
    assert x.grad.flatten().tolist() == [0, 1, 1, 0]


def test_full_offsets_have_no_bounds():
    layer = DeformConv2d(1, 1, "full")
    nn.init.constant_(layer.offset.bias, 99.0)
    assert layer.offset_map(torch.zeros(1, 1, 2, 2)).min().item() == 99


def test_rounding_is_for_inference_and_passes_the_gradient_in_training():
    torch.manual_seed(0)
    layer, x = DeformConv2d(2, 2, "square", groups=2, round_offsets=True), torch.randn(1, 2, 6, 6)
    nn.init.constant_(layer.offset.bias, 1.7)
    assert float(layer.offset_map(x).detach().max()) == pytest.approx(1.7)
    layer.eval()
    assert layer.offset_map(x).unique().tolist() == [2]
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.conv.weight, None, 1, 2, 2, 2), atol=1e-5, rtol=1e-5)
    layer.train().round_in_training = True
    layer(x).square().sum().backward()
    assert float(layer.offset.bias.grad.abs()) > 0
    values = torch.tensor([0.5, 1.5, -0.4], requires_grad=True)
    round_straight_through(values).sum().backward()
    assert values.grad.tolist() == [1, 1, 1]


def test_positions_in_wide_images_are_exact_in_half_precision():
    x = torch.arange(300.0).view(1, 1, 1, 300).bfloat16()
    offsets = torch.zeros(1, 18, 1, 300, dtype=torch.bfloat16)
    for nearest in (False, True):
        centre = sample_taps(x, offsets, nearest=nearest)[0, 0, 1, 1::3]
        assert centre.dtype == torch.bfloat16 and torch.equal(centre, x.flatten())


def test_an_offset_map_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"offsets have shape \(1, 18, 3, 4\), expected \(1, 18, 4, 4\)"):
        sample_taps(torch.zeros(1, 1, 4, 4), torch.zeros(1, 18, 3, 4))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("codenet:1x", {"kernel": 5}, "deform=square is defined for 3x3 kernels, got 5x5"),
        ("codenet:1x", {"kernel": 4, "deform": "none"}, "kernel must be odd"),
        ("codenet:1y", {}, "1y: there is no such model.*known: 1x"),
        ("codenet:1x", {"deforms": "full"}, "option 'deforms' is unknown; did you mean 'deform'"),
        ("codenet:1x", {"width": "8,15,16"}, "15 must be even"),
        ("codenet:1x", {"width": "8,16"}, "at least 3 numbers"),
        ("codenet:small", {"decoder": "8"}, "decoder has 1 numbers for 2 stages"),
        ("codenet:deformed", {"layers": "a"}, "option 'base' is missing"),
        ("codenet:deformed", {"base": "eff.testing.samples:tiny_cnn", "layers": "conv9"}, "is no convolution"),
        ("codenet:deformed", {"base": "eff.testing.samples:tiny_cnn", "layers": "conv1", "kernel": 5, "deform": "full"}, "is no 5x5"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_be_is_refused(source, options, message):
    with pytest.raises(ModelError, match=message):
        build(ModelSpec(source=source, options=options), _run(3))


def _run(classes=3, channels=1, size=32):
    shape = (channels, size, size)
    return Run(Detection(DetectionOptions(input_shape=shape, classes=tuple("abcdefgh"[:classes]))), torch.device("cpu"))


def test_the_widths_are_those_of_the_paper_and_the_output_has_stride_4():
    model = build(ModelSpec(source="codenet:1x", options={"num_classes": 20, "in_channels": 3}), _run())
    assert [stage.blocks[0].right[-2][0].out_channels * 2 for stage in model.stages] == [116, 232, 464]
    assert [len(stage.blocks) for stage in model.stages] == [4, 8, 4]
    assert [block.layers[0].conv.in_channels for block in model.decoder] == [1024, 256, 128]
    assert model.eval()(torch.zeros(1, 3, 64, 96)).shape == (1, 24, 16, 24)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Conv2d))
    assert weights / 2 / 2**20 == pytest.approx(0.76, abs=0.05)  # 4 bits each: the paper's 0.76 MB


@pytest.mark.parametrize(("stem", "mix_first", "depthwise"), [("maxpool", True, True), ("stride4", False, False)])
def test_the_other_arrangements_give_the_same_output_shape(stem, mix_first, depthwise):
    layout = Layout((4, 8, 8), (1,), (6,), 4, stem, mix_first)
    model = CoDeNet(2, 1, layout, Deformation(depthwise=depthwise))
    assert model(torch.randn(2, 1, 16, 24)).shape == (2, 6, 4, 6)
    groups = model.decoder[0].layers[2 if mix_first else 0].conv.groups
    assert groups == ((6 if mix_first else 8) if depthwise else 1)


def test_a_size_that_the_stages_do_not_divide_is_refused_with_the_nearest():
    model = CoDeNet(1, 1, Layout((4, 8, 8, 8, 8), (1, 1, 1), (8, 8, 8), 4))
    with pytest.raises(RequestError, match=r"multiples of 32, got 64x90; the nearest to 90 is 96"):
        model(torch.zeros(1, 1, 64, 90))


def test_the_shuffle_deals_out_both_halves_in_turn():
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert channel_shuffle(x).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_convolutions_of_another_network_are_replaced(tmp_path):
    spec = ModelSpec(
        source="codenet:deformed", options={"base": "eff.testing.samples:tiny_cnn", "layers": "conv2,conv3"}
    )
    model = build(spec, _run(4))
    assert isinstance(model.conv2, DeformConv2d) and model.conv3.stride == 2 and model.conv3.conv.bias is not None
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


@pytest.mark.parametrize(("row", "expected"), [([-0.5, 0.2, 0.1], 0.5), ([0.1, 0.3, 0.2], 0.3)])
def test_the_range_of_weights_is_the_larger_end(row, expected):
    assert float(weight_range(torch.tensor([row]), False)) == pytest.approx(expected)
    assert float(weight_range(torch.tensor([row]), True)) == pytest.approx(0.95 * expected)


def test_percentiles_leave_out_the_extreme_weight():
    row = torch.cat([torch.linspace(-1, 1, 1999), torch.tensor([50.0])])
    ordered = row.sort().values
    expected = max(abs(float(ordered[1])), float(ordered[1997]))  # the 2nd and the 1998th of 2000
    assert float(weight_range(row[None], True)) == pytest.approx(expected)


def _conv_and_norm():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    return conv, norm


def test_the_layer_computes_with_folded_weights_on_the_grid_and_passes_gradients_on():
    conv, norm = _conv_and_norm()
    layer, x = QuantConv(conv, norm, 4, False, None), torch.randn(2, 3, 5, 5)
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = (conv.weight * factor.view(-1, 1, 1, 1)).detach()
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 7
    levels = (weight / scale).round().clamp(-8, 7)
    bias = ((0 - norm.running_mean) * factor + norm.bias).detach()
    torch.testing.assert_close(layer(x), F.conv2d(x, levels * scale, bias, padding=1))
    layer(x).sum().backward()
    wanted = torch.autograd.grad(F.conv2d(x, probe := (levels * scale).requires_grad_(), None, padding=1).sum(), probe)[
        0
    ]
    torch.testing.assert_close(conv.weight.grad, wanted * factor.view(-1, 1, 1, 1))  # identity through the rounding
    done = layer.eval().finished()
    torch.testing.assert_close(done(x), F.conv2d(x, levels * scale, bias, padding=1))
    assert (
        isinstance(done, QuantLayer)
        and done.weight_quantizer.levels(done.layer.weight).abs().amax((1, 2, 3)).tolist() == [7] * 4
    )


def test_eight_bits_are_near_the_float_layer():
    conv, norm = _conv_and_norm()
    x = torch.randn(2, 3, 5, 5)
    expected = norm.eval()(conv(x)).detach()
    error = (QuantConv(conv, norm, 8, False, None)(x) - expected).abs().max()
    assert error.item() < 0.02 * expected.abs().max().item()


def test_the_range_follows_with_momentum_and_stands_still_in_evaluation():
    quantizer = RunningRange(8, 0.9)
    quantizer(torch.tensor([-1.0, 4.0]))
    assert (float(quantizer.low), float(quantizer.high)) == (-1, 4)
    quantizer(torch.tensor([-2.0, 14.0]))
    assert float(quantizer.low) == pytest.approx(-1.1) and float(quantizer.high) == pytest.approx(5.0)
    assert float(quantizer.scale) == pytest.approx(6.1 / 255) and quantizer.zero_point == round(1.1 * 255 / 6.1)
    quantizer.eval()(torch.tensor([-50.0, 50.0]))
    assert float(quantizer.high) == pytest.approx(5.0)
    quantizer.train().calibrating = True
    x = torch.tensor([-3.0, 1.0])
    assert quantizer(x) is x and float(quantizer.low) == -3 and float(quantizer.high) == pytest.approx(5.0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), st.integers(2, 8))
def test_codes_stay_in_range_zero_is_one_of_them_and_constants_give_no_nan(values, bits):
    quantizer = RunningRange(bits, 0.99)
    x = torch.tensor(values)
    found = quantizer(x)
    assert bool(torch.isfinite(found).all()) and float(quantizer(torch.zeros(1)).abs()) == 0
    assert 0 <= quantizer.zero_point <= 2**bits - 1
    quantizer.eval()
    codes = quantizer.levels(4 * x)  # beyond the range
    assert int(codes.min()) >= 0 and int(codes.max()) <= 2**bits - 1
    assert float((found - x).abs().max()) <= float(quantizer.scale) * 1.001 + 1e-6


@pytest.fixture(scope="module")
def trained():
    """A small detector after a few steps, its data and its run."""
    data = claims.load_data(SCENES, None, claims._sources())
    model, run = claims.make_detector("square", data, 0)
    claims.train(model, run, TrainOptions(epochs=2, batch_size=8).over(claims.FLOAT))
    return model, data


def _quantized(trained, epochs=1, **options):
    model, data = trained
    run = claims._run(data, 0)
    recipe = TrainOptions(epochs=epochs, batch_size=8).over(claims.QAT)
    method = CoDeNetMethod(CoDeNetConfig(calibration_samples=8, **options))
    return *claims.train(copy.deepcopy(model), run, recipe, method), method


def test_bits_go_where_they_should_and_every_convolution_is_quantized(trained):
    model, _, method = _quantized(trained)
    bits = {name: layer.weight_quantizer.bits for name, layer in quant_layers(model).items()}
    convolutions = [name for name, module in trained[0].named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted(bits) == sorted(convolutions)
    assert [name for name, b in bits.items() if b == 8] == ["stem.0.0"] == [method.structure["first"]]
    assert not [module for module in model.modules() if isinstance(module, (nn.BatchNorm2d, QuantConv))]


def test_the_blocks_of_a_stage_put_out_codes_of_one_scale(trained):
    model = _quantized(trained)[0]
    stage, seen = model.stages[1], []
    handles = [
        block.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0])) for block in stage.blocks[1:]
    ]
    with torch.no_grad():
        output = stage(model.stages[0](model.stem(torch.randn(2, 1, 32, 32))))
    for handle in handles:
        handle.remove()
    assert isinstance(stage.tap, RunningRange) and len(seen) == len(stage.blocks) - 1
    for value in (*seen, output):
        codes = value / float(stage.tap.scale)
        torch.testing.assert_close(codes, codes.round(), atol=2e-3, rtol=0)
        assert len(codes.round().unique()) <= 256
    left = seen[0].chunk(2, 1)[0]  # what only passes keeps its codes
    torch.testing.assert_close(channel_shuffle(torch.cat([left, left], 1))[:, ::2], left)


def test_offsets_are_whole_after_the_method_or_eight_bits_where_asked(trained):
    model, run, _ = _quantized(trained)
    rows = offset_histogram(model, trained[1], run)
    names = [name for name in rows[0] if name != "offset"]
    assert len(names) == 2 and all(sum(row[name] for row in rows) == pytest.approx(100) for name in names)
    assert not [
        name
        for name, module in model.named_modules()
        if name.endswith("offset_tap") and isinstance(module, RunningRange)
    ]
    fine = _quantized(trained, round_offsets=False)[0]
    assert [type(block.layers[0].offset_tap) for block in fine.decoder] == [RunningRange] * 2


def test_a_rebuilt_structure_takes_the_finished_weights(trained):
    model, run, method = _quantized(trained)
    again = CoDeNetMethod(method.config)
    again.structure = dict(method.structure)
    run.restoring = True
    rebuilt = again.transform(model=claims.make_detector("square", trained[1], 5)[0], run=run).eval()
    rebuilt.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(rebuilt(x), model(x))


def test_an_untrained_detector_is_warned_about_and_a_trained_one_is_not(trained):
    for untrained in (True, False):
        run = claims._run(trained[1], 0)
        model = claims.make_detector("square", trained[1], 0)[0] if untrained else copy.deepcopy(trained[0])
        CoDeNetMethod(CoDeNetConfig(calibration_samples=8)).transform(model=model, run=run)
        assert any("has not been trained" in text for text in run.log.warnings) is untrained


def test_a_model_without_convolutions_is_refused(trained):
    with pytest.raises(UnsupportedModelError, match="nothing to quantize"):
        CoDeNetMethod().transform(model=nn.Flatten(), run=claims._run(trained[1], 0))


def test_multiply_accumulates_count_convolutions_and_interpolation(trained):
    run = claims._run(trained[1], 0)
    rows = {row["layer"]: row["macs"] for row in count_macs(trained[0], run)}
    assert rows["stem.0.0"] == 8 * 8 * (16 * 9)  # 16 channels of 3x3 on 8 x 8 pixels
    assert rows["decoder.0.layers.0 (sampling)"] == 4 * 64 * 9 * 2 * 2
    quantized, run, _ = _quantized(trained, epochs=0)
    assert "decoder.0.layers.0 (sampling)" not in {row["layer"] for row in count_macs(quantized, run)}


def test_the_learning_rate_drops_at_the_named_epochs():
    class Step:
        epoch = 0
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)

    method, step, seen = CoDeNetMethod(CoDeNetConfig(drops=(2, 3))), Step(), []
    for step.epoch in range(5):
        generator = method.train_step(step)
        next(generator)
        seen.append(step.optimizer.param_groups[0]["lr"])
        with pytest.raises(StopIteration):
            generator.send(None)
        assert step.optimizer.param_groups[0]["lr"] == 1.0
    assert seen == pytest.approx([1, 1, 0.1, 0.01, 0.01])


def test_the_path_of_a_user_from_float_to_files_that_measure_alike(tmp_path):
    train = TrainOptions(epochs=1, batch_size=8, optimizer="adam", lr=2e-3)
    apply(Recipe(model=TINY, data=SCENES, device="cpu", train=train), tmp_path / "float")
    use = MethodUse(name="quant_codenet", options={"calibration_samples": 8})
    recipe = Recipe(model=str(tmp_path / "float"), methods=(use,), device="cpu", train=train, export=("packed",))
    report = apply(recipe, tmp_path / "w4a8")
    assert not report.warnings and (tmp_path / "w4a8" / "detections.png").stat().st_size > 1000
    wanted = {name: report.after.metrics.values[name].value for name in ("AP50", "AP", "detection_loss")}
    for file in ("model.pt", "model.packed.safetensors"):
        again = evaluate(UseRequest(str(tmp_path / "w4a8" / file), device="cpu"))
        assert {name: again.metrics.values[name].value for name in wanted} == pytest.approx(wanted)
    details = next(item.details for item in report.artifacts if item.format == "packed")
    assert details["rounded_offsets"] and details["stride"] == 4
    assert report.after.metrics.values["weight_bytes"].value == details["code_bytes"]


@pytest.mark.slow
def test_the_onnx_file_agrees_with_the_model_and_gathers(trained, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="running the file needs onnxruntime")
    pytest.importorskip("onnxscript", reason="writing the file needs onnxscript")
    import onnx

    model, run, _ = _quantized(trained)
    write(model, "onnx", tmp_path / "model.onnx", run)
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "GridSample" not in operators and {"QuantizeLinear", "DequantizeLinear"} <= operators
    options = runtime.SessionOptions()
    options.graph_optimization_level = (
        runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    )  # its integer kernels round on their own
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    x = run.task.module_inputs(trained[1].test.batch(range(8)))[0]
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        difference = (found - model(x)).abs()
    assert difference.mean().item() < 1e-3  # a code here and there at a tie


def test_a_model_that_is_not_quantized_is_not_exported(trained, tmp_path):
    with pytest.raises(UnsupportedModelError, match="has no quantized layers, nothing to export"):
        write(trained[0], "packed", tmp_path / "model", claims._run(trained[1], 0))


def test_another_detector_is_quantized_at_the_inputs_of_its_layers(trained):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, 4, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), DeformConv2d(8, 8, "full"), nn.ReLU(), nn.Conv2d(8, 7, 1)
    )  # fmt: skip
    run = claims._run(trained[1], 0)
    recipe = TrainOptions(epochs=1, batch_size=8).over(claims.QAT)
    done, _ = claims.train(model, run, recipe, CoDeNetMethod(CoDeNetConfig(calibration_samples=8)))
    inputs = {name: layer.input_quantizer for name, layer in quant_layers(done).items()}
    assert inputs["0"] is None and all(isinstance(value, RunningRange) for name, value in inputs.items() if name != "0")
    assert done[3].rounds and isinstance(done[1], nn.Identity)


def test_a_plain_tap_passes_its_input():
    x = torch.ones(2)
    assert Tap()(x) is x


def test_the_shortened_claim_measures_what_its_checks_name(trained):
    short = TrainOptions(epochs=1, batch_size=8)
    found = claims.measure(trained[1], 0, short.over(claims.FLOAT), short.over(claims.QAT))
    named = {side for check in CoDeNetMethod.claims[0].checks for side in (check.left, check.right)}
    assert named <= set(found) and all(0 <= value <= 100 for value in found.values())


def test_a_model_of_another_task_is_refused_before_anything_is_written(tmp_path):
    recipe = Recipe(
        model="eff.testing.samples:tiny_cnn", data="eff.testing.samples:blobs", methods=(MethodUse(name="quant_codenet"),),
        device="cpu",
    )  # fmt: skip
    with pytest.raises(EffError, match="quant_codenet is for detection"):
        apply(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_extension_answers_only_its_own_scheme():
    assert DetectionExtension().build_model(ModelSpec(source="zoo:digits_cnn"), _run()) is None
