"""quant_kit.execution: layers on integers compute what the fake-quantized ones compute."""

import pytest
import torch
from torch import nn

from eff_quant_kit.execution import IntegerLayer, PackedLinear, on_kernels
from eff_quant_kit.layers import QuantLayer
from eff_quant_kit.quantizer import Quantizer


def weights_of(layer, bits=8, per_channel=True, zero=None):
    weight = layer.weight.detach()
    quantizer = Quantizer(
        bits, zero is None, channels=len(weight), axis=0 if per_channel else None, with_offset=zero is not None
    )
    scale = (weight.abs().flatten(1).amax(1) if per_channel else weight.abs().max()) / (quantizer.q_max // 2 or 1)
    quantizer.set_scale(scale, None if zero is None else -zero * scale)
    return quantizer


def inputs_of(bits=8, signed=False, scale=0.02, offset=None):
    quantizer = Quantizer(bits, signed, with_offset=offset is not None)
    quantizer.set_scale(torch.tensor(scale), None if offset is None else torch.tensor(offset))
    return quantizer


CONVOLUTIONS = {
    "3x3": (nn.Conv2d(5, 7, 3, padding=1), (2, 5, 9, 8)),
    "strided, uneven": (nn.Conv2d(3, 4, (3, 2), (2, 3), (1, 0), bias=False), (2, 3, 9, 8)),
    "1x1, strided": (nn.Conv2d(6, 4, 1, 2), (3, 6, 7, 7)),
    "linear": (nn.Linear(12, 5), (3, 4, 12)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize(
    "inputs",
    [inputs_of(), inputs_of(signed=True), inputs_of(4, scale=0.3), inputs_of(offset=-2.4), inputs_of(2, True, 0.7)],
    ids=["uint8", "int8", "uint4", "zero point", "int2"],
)
@pytest.mark.parametrize(("bits", "per_channel", "zero"), [(8, True, None), (4, False, None), (4, True, 6)])
def test_integers_compute_what_fake_quantization_computes(name, inputs, bits, per_channel, zero):
    layer, shape = CONVOLUTIONS[name]
    source = QuantLayer(layer, weights_of(layer, bits, per_channel, zero), inputs).eval()
    done = on_kernels(nn.Sequential(source))
    assert done.ran == ("0",) and not done.left and isinstance(done.model[0], IntegerLayer)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(done.model(x), source(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero", [None, 1])
def test_packed_weights_compute_what_fake_quantization_computes(bits, zero):
    layer = nn.Linear(16, 5)
    source = QuantLayer(layer, weights_of(layer, bits, zero=zero), None)
    done = on_kernels(nn.Sequential(source))
    assert isinstance(done.model[0], PackedLinear)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(done.model(x), source(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "weight_bits", "inputs", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), 8, inputs_of(), "a convolution in 4 groups"),
        (nn.Conv2d(4, 4, 3, dilation=2), 8, inputs_of(), "a convolution that is dilated or not padded with zeros"),
        (nn.Conv2d(4, 4, 3, padding=1), 8, inputs_of(offset=0.013), "zero is no level of its inputs"),
        (nn.Conv2d(4, 4, 3), 8, None, "a convolution with float inputs"),
        (nn.Conv1d(4, 4, 3), 8, inputs_of(), "Conv1d has no integer product here"),
        (nn.Linear(6, 4), 4, None, "no packed product for 4 bits and 6 inputs"),
        (nn.Linear(8, 4), 9, inputs_of(), "its weights have 9 bits"),
        (nn.Linear(8, 4), 8, inputs_of(16), "its inputs have 16 bits"),
        (nn.Linear(8, 4), None, inputs_of(), "its weights are not quantized"),
    ],
)
def test_what_stays_in_float_is_named_with_its_reason(layer, weight_bits, inputs, reason):
    weights = None if weight_bits is None else weights_of(layer, weight_bits)
    model = nn.Sequential(nn.Identity(), QuantLayer(layer, weights, inputs))
    done = on_kernels(model)
    assert not done.ran and list(done.left) == ["1"] and reason in done.left["1"]
    assert isinstance(done.model[1], QuantLayer)


def test_the_model_given_is_left_alone():
    layer = nn.Linear(8, 4)
    model = nn.Sequential(QuantLayer(layer, weights_of(layer), inputs_of()))
    on_kernels(model)
    assert isinstance(model[0], QuantLayer) and model.training and layer.weight.requires_grad
