"""The quantization kit: ranges, observers, the walk, and the LSQ+ deployment identity."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eff.errors import RunError
from eff_quant_kit.layers import QuantLayer, execution_order, find_layers, reestimate_batch_norm, replace_module
from eff_quant_kit.observers import minmax_affine, minmax_symmetric, mse_affine
from eff_quant_kit.quantizer import Quantizer, integer_range


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((4, True), (-8, 7)), ((4, True, True), (-7, 7)), ((4, False), (0, 15)), ((2, True), (-2, 1))],
)
def test_integer_ranges(arguments, expected):
    assert integer_range(*arguments) == expected


def test_one_bit_has_no_range():
    with pytest.raises(ValueError, match="bits must be between 2 and 16, got 1"):
        integer_range(1, True)


def test_minmax_covers_the_range():
    x = torch.tensor([[-1.0, 3.0], [2.0, -4.0]])
    assert minmax_symmetric(x, 7).item() == pytest.approx(4 / 7)
    assert minmax_symmetric(x, 7, axis=0).tolist() == pytest.approx([3 / 7, 4 / 7])
    scale, offset = minmax_affine(x, 0, 7)
    assert (scale.item(), offset.item()) == pytest.approx((1.0, -4.0))


def test_the_search_is_no_worse_than_minmax():
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) ** 3  # long tails

    def error(scale, offset):
        return (((x - offset) / scale).round().clamp(0, 15) * scale + offset - x).square().mean()

    assert error(*mse_affine(x, 0, 15)) < 0.5 * error(*minmax_affine(x, 0, 15))


def test_a_quantizer_refuses_to_work_before_it_is_initialised():
    quantizer = Quantizer(4)
    quantizer.name = "conv1.input_quantizer"
    with pytest.raises(RunError, match=r"conv1\.input_quantizer: used before it was initialised"):
        quantizer(torch.ones(3))


def test_initial_values_are_filled_in_place():
    quantizer = Quantizer(4)
    parameter = quantizer.scale
    quantizer.set_scale(torch.tensor(0.5))
    assert quantizer.scale is parameter and parameter.item() == 0.5
    assert quantizer(torch.tensor([0.3, 9.0])).tolist() == [0.5, 3.5]


def test_layers_are_found_and_attention_internals_left_out():
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(1, 1, 1), "attention": nn.MultiheadAttention(4, 2), "norm": nn.BatchNorm1d(2)}
    )
    assert list(find_layers(model)) == ["conv"]


def test_execution_order_is_that_of_the_forward_pass():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.last(self.first(x))

    model = Backwards()
    assert execution_order(model, find_layers(model), lambda: model(torch.ones(1, 2))) == ["first", "last"]


def test_a_shared_layer_is_replaced_everywhere():
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": layer, "b": layer})
    replace_module(model, "a", QuantLayer(layer, None, None))
    assert isinstance(model["a"], QuantLayer) and model["a"] is model["b"]


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(3, 4, 3), nn.Conv2d(3, 4, 3, padding=1, groups=1), nn.Conv3d(3, 4, 1), nn.Linear(5, 4)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_without_quantizers_is_the_layer(layer):
    shapes = {"Conv1d": (2, 3, 5), "Conv2d": (2, 3, 5, 5), "Conv3d": (2, 3, 5, 5, 5), "Linear": (2, 5)}
    x = torch.randn(shapes[type(layer).__name__], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(QuantLayer(layer, None, None)(x), layer(x))


def make_affine_layer(layer):
    weight, inputs = Quantizer(4), Quantizer(4, signed=False, with_offset=True)
    weight.set_scale(torch.tensor(0.05))
    inputs.set_scale(torch.tensor(0.21), torch.tensor(-1.3))
    return QuantLayer(layer, weight, inputs)


def test_integers_with_an_offset_compute_what_the_layer_does():
    """LSQ+: W x + b = s_w s_x (Wbar xbar) + (b + beta s_w sum(Wbar)), without padding."""
    torch.manual_seed(0)
    layer = make_affine_layer(nn.Conv2d(3, 4, 3))
    x = torch.randn(2, 3, 6, 6)
    w_bar = layer.weight_quantizer.levels(layer.layer.weight).double()
    x_bar = layer.input_quantizer.levels(x).double()
    s_w, s_x, beta = 0.05, 0.21, -1.3
    bias = layer.layer.bias.double() + beta * s_w * w_bar.sum((1, 2, 3))
    integer = s_w * s_x * F.conv2d(x_bar, w_bar) + bias.view(1, -1, 1, 1)
    torch.testing.assert_close(layer(x).double(), integer, rtol=1e-4, atol=1e-4)


def test_zero_padding_stays_real_zero_under_an_offset():
    """The pitfall: padding the integer codes with 0 would pad with beta."""
    torch.manual_seed(0)
    layer = make_affine_layer(nn.Conv2d(1, 1, 3, padding=1))
    x = torch.randn(1, 1, 4, 4)
    x_hat, weight = layer.input_quantizer(x), layer.weight()
    expected = F.conv2d(F.pad(x_hat, (1, 1, 1, 1)), weight, layer.layer.bias)
    torch.testing.assert_close(layer(x), expected)
    with_codes_of_zero = F.conv2d(F.pad(x_hat, (1, 1, 1, 1), value=-1.3), weight, layer.layer.bias)
    assert not torch.allclose(layer(x), with_codes_of_zero)


def test_batch_norm_statistics_are_those_of_the_batches():
    model = nn.Sequential(nn.BatchNorm1d(2))
    batches = [torch.full((4, 2), 1.0), torch.full((4, 2), 3.0)]
    reestimate_batch_norm(model, batches, model)
    assert model[0].running_mean.tolist() == pytest.approx([2.0, 2.0])
    assert model[0].momentum == 0.1
