"""quant_kit.onnx_qdq: the written graph computes what the quantized model computes, in integers where it can."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from eff.data import load_data
from eff.errors import UnsupportedModelError
from eff.models import make_task
from eff.run import Run
from eff.session import Plugins
from eff_quant_kit.layers import QuantLayer, quant_layers, replace_module
from eff_quant_kit.onnx_qdq import write_onnx
from eff_quant_kit.quantizer import Quantizer

onnx = pytest.importorskip("onnx", reason="ONNX needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="running ONNX needs onnxruntime")

WEIGHTS = {
    "one scale": {},
    "4 bits, a scale and a zero point per channel": {"bits": 4, "per_channel": True, "zero": True},
    "a scale and a zero point per channel": {"per_channel": True, "zero": True},
}


class Net(nn.Module):
    """Convolutions before a ReLU, a sum, (depthwise) a ReLU6, and a linear layer; batch norms with negative factors too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)
        self.relu6 = nn.ReLU6()
        self.conv4 = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x)).relu()
        h = (self.bn2(self.conv2(h)) + x).relu()
        h = self.relu6(self.bn3(self.conv3(h)))
        return self.head(self.conv4(h).flatten(1))


@pytest.fixture(scope="module")
def run() -> Run:
    data = load_data("digits?seed=0")
    return Run(make_task(data.task, Plugins((), extensions=())), torch.device("cpu"), 0, data)


def images() -> Tensor:
    return torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def quantized(model: nn.Module, per_channel: bool = False, zero: bool = False, bits: int = 8) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
            norm.weight.copy_(torch.tensor([1.3, -0.8, 0.6, 1.1]))
            nn.init.normal_(norm.bias, 0.3, 0.2)
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
            nn.init.uniform_(norm.running_var, 0.3, 1.0)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weight = layer.weight.detach()
            dims = list(range(1 if per_channel else 0, weight.ndim))
            quantizer = Quantizer(
                bits,
                not zero,
                channels=len(weight),
                axis=0 if per_channel else None,
                with_offset=zero,
                narrow_range=not zero,
            )
            low, high = weight.amin(dims), weight.amax(dims)
            if zero:
                scale = (high - low) / quantizer.q_max
                quantizer.set_scale(scale, -(-low / scale).round() * scale)
            else:
                quantizer.set_scale(torch.maximum(-low, high) / quantizer.q_max)
            inputs = Quantizer(8, signed=False)
            inputs.set_scale(torch.tensor(0.02))
            replace_module(model, name, QuantLayer(layer, quantizer, inputs))
    return model.eval()


def ops_and_output(path, x: Tensor, optimized: bool = True) -> tuple[Counter, Tensor]:
    """Return the operators onnxruntime ends up with, and the output."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    ops = Counter(node.op_type for node in onnx.load(path.with_name("optimized.onnx")).graph.node)
    return ops, torch.from_numpy(output)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_graph_computes_what_the_model_computes(weights, run, tmp_path):
    model, x, path = quantized(Net(), **WEIGHTS[weights]), images(), tmp_path / "model.onnx"
    write_onnx(model, path, run)
    with torch.no_grad():
        expected = model(x)
    _, plain = ops_and_output(path, x, optimized=False)
    assert torch.allclose(plain, expected, atol=1e-4)
    ops, fast = ops_and_output(path, x)
    # integers round biases to steps of their sums, so that a level flips now and then
    assert float((fast - expected).abs().mean()) < 0.01 * float(expected.std())
    assert ops["BatchNormalization"] == 0
    in_integers = (
        0 if weights == "a scale and a zero point per channel" else 2
    )  # conv1 and conv3: what follows is rounded for the next layer
    assert ops["QLinearConv"] == in_integers and ops["Conv"] + ops["FusedConv"] == 4 - in_integers
    # a byte per weight, and nothing of where the exporter found them
    assert path.stat().st_size < sum(layer.layer.weight.numel() for layer in quant_layers(model).values()) + 8000
    assert b"site-packages" not in path.read_bytes() and __file__.encode() not in path.read_bytes()


def test_relu6_below_the_quantizers_range_keeps_a_layer_in_float(run, tmp_path):
    model, x, path = quantized(Net()), images(), tmp_path / "model.onnx"
    model.conv4.input_quantizer.set_scale(torch.tensor(0.03))  # up to 7.65: ReLU6 is needed between the two
    write_onnx(model, path, run)
    ops, output = ops_and_output(path, x)
    assert ops["QLinearConv"] == 1
    with torch.no_grad():
        expected = model(x)
    assert float((output - expected).abs().mean()) < 0.01 * float(expected.std())


def test_a_negative_factor_folds_into_minus_128_too(run, tmp_path):
    model, x, path = quantized(Net()), images(), tmp_path / "model.onnx"
    layer = model.conv1
    layer.weight_quantizer = Quantizer(8)
    layer.weight_quantizer.set_scale(layer.layer.weight.detach().abs().max() / 128)
    with torch.no_grad():
        layer.layer.weight[1, 0, 0, 0] = -layer.layer.weight.abs().max() * 1.5
    assert int(layer.weight_quantizer.levels(layer.layer.weight).min()) == -128
    write_onnx(model, path, run)
    assert not [node for node in onnx.load(path).graph.node if node.op_type == "BatchNormalization"]
    with torch.no_grad():
        assert torch.allclose(ops_and_output(path, x, optimized=False)[1], model(x), atol=1e-4)


@pytest.mark.parametrize("factor", [0.0, 1e-9])
def test_a_norm_that_switches_a_channel_off_folds_too(factor, run, tmp_path):
    model, x, path = quantized(Net()), images(), tmp_path / "model.onnx"
    with torch.no_grad():
        model.bn1.weight[2] = factor
        model.bn1.bias[2] = 0.5
    write_onnx(model, path, run)
    with torch.no_grad():
        expected = model(x)
    assert torch.allclose(ops_and_output(path, x, optimized=False)[1], expected, atol=1e-4)
    assert float((ops_and_output(path, x)[1] - expected).abs().mean()) < 0.01 * float(expected.std())


class Tapped(Net):
    """Somebody else reads what goes into the second norm, and the layer before the third is used twice."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x)).relu()
        inner = self.conv2(h)
        h = (self.bn2(inner) + inner).relu()
        h = self.bn3(self.conv3(h)) + self.conv3(h.flip(-1))
        return self.head(self.conv4(self.relu6(h)).flatten(1))


def test_a_norm_whose_layer_others_read_stays(run, tmp_path):
    model, x, path = quantized(Tapped(), per_channel=True, zero=True), images(), tmp_path / "model.onnx"
    write_onnx(model, path, run)
    inner = [node.input[0] for node in onnx.load(path).graph.node if node.op_type == "BatchNormalization"]
    sources = {node.output[0]: node.op_type for node in onnx.load(path).graph.node}
    assert len(inner) == 2 and {sources[name] for name in inner} == {"Conv"}
    with torch.no_grad():
        assert torch.allclose(ops_and_output(path, x, optimized=False)[1], model(x), atol=1e-4)


def test_what_onnx_cannot_hold_is_refused(run, tmp_path):
    model = quantized(Net())
    model.conv1.input_quantizer = Quantizer(12, signed=False)
    with pytest.raises(UnsupportedModelError, match="up to 8 bits, got 12"):
        write_onnx(model, tmp_path / "model.onnx", run)
    model = quantized(Net(), zero=True)
    with torch.no_grad():
        model.conv2.weight_quantizer.offset.add_(0.4 * model.conv2.weight_quantizer.scale)
    with pytest.raises(UnsupportedModelError, match="no whole number of steps"):
        write_onnx(model, tmp_path / "model.onnx", run)
