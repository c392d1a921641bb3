"""ONNX with QuantizeLinear and DequantizeLinear: integer weights in the file, 8-bit containers.

Fewer than 8 bits are stored in int8/uint8: the input is clipped to the range before QuantizeLinear,
so the values are those of the narrower integer. An offset that is a whole number of scales becomes the zero point; any
other (LSQ+) is subtracted before and added after.

A batch norm behind a layer goes into the scales of its weights, whose integers stay: only so does onnxruntime see
convolution, ReLU and QuantizeLinear side by side and compute in integers.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.errors import UnsupportedModelError
from eff.exporting import onnx_agreement, onnx_export
from eff.run import Run
from eff_quant_kit.layers import QuantLayer, QuantMatMul, quant_layers, replace_module
from eff_quant_kit.quantizer import Quantizer

_OPSET = 19


def _container(signed: bool) -> torch.dtype:
    return torch.int8 if signed else torch.uint8


def _zero_point(quantizer: Quantizer) -> tuple[Tensor, Tensor | None]:
    """Return zero point (integers, float32, like the scale) and the offset where that cannot be one."""
    scale = quantizer.scale.detach().float()
    if quantizer.offset is None:
        return torch.zeros_like(scale), None
    offset = quantizer.offset.detach().float()
    zero = (-offset / scale).round()
    whole = bool(((-offset / scale) - zero).abs().max() < 1e-3)
    inside = bool((zero >= quantizer.q_min).all() and (zero <= quantizer.q_max).all())
    return (zero, None) if whole and inside else (torch.zeros_like(scale), offset.clone())


class OnnxQuantizer(nn.Module):
    """An activation quantizer as ONNX operators."""

    def __init__(self, quantizer: Quantizer):
        super().__init__()
        if quantizer.bits > 8:
            raise UnsupportedModelError(f"{quantizer.name}: ONNX export holds up to 8 bits, got {quantizer.bits}")
        self.q_min, self.q_max = quantizer.q_min, quantizer.q_max
        self.dtype = _container(quantizer.signed)
        self.register_buffer("scale", quantizer.scale.detach().float().clone())
        zero, offset = _zero_point(quantizer)
        self.register_buffer("zero", zero.to(self.dtype))
        self.register_buffer("offset", offset)
        scale = float(quantizer.scale.detach())
        self.low, self.high = (self.q_min - float(zero)) * scale, (self.q_max - float(zero)) * scale
        self.full = quantizer.bits == 8 and not quantizer.narrow_range

    def forward(self, x: Tensor) -> Tensor:
        """Return QuantizeLinear then DequantizeLinear of `x`."""
        if self.offset is not None:
            x = x - self.offset
        if not self.full:
            x = x.clamp(self.low, self.high)
        codes = torch.onnx.ops.symbolic(
            "QuantizeLinear", (x, self.scale, self.zero), dtype=self.dtype, shape=x.shape, version=_OPSET
        )
        value = torch.onnx.ops.symbolic(
            "DequantizeLinear", (codes, self.scale, self.zero), dtype=torch.float32, shape=x.shape, version=_OPSET
        )
        return value if self.offset is None else value + self.offset


class OnnxLayer(nn.Module):
    """A quantized layer with its weight as an integer initializer behind DequantizeLinear."""

    def __init__(self, source: QuantLayer):
        super().__init__()
        self.layer = source.layer
        self.input_quantizer = None if source.input_quantizer is None else OnnxQuantizer(source.input_quantizer)
        quantizer = source.weight_quantizer
        bias = source.layer.bias
        if bias is None:  # torch.onnx would write operators that make one at every run
            bias = torch.zeros(len(source.layer.weight))  # type: ignore[arg-type]
        self.register_buffer("bias", bias.detach().float().clone())  # type: ignore[union-attr,operator]
        self.axis = None
        self.register_buffer("codes", None)
        if quantizer is not None:
            dtype = _container(quantizer.signed)
            self.axis = quantizer.axis
            self.register_buffer("codes", quantizer.levels(source.layer.weight).to(dtype))  # type: ignore[arg-type]
            self.register_buffer("scale", quantizer.scale.detach().float().clone())
            zero, offset = _zero_point(quantizer)
            if offset is not None:
                raise UnsupportedModelError(
                    f"{quantizer.name}: its offset is no whole number of steps; ONNX has no such weights"
                )
            self.register_buffer("zero", zero.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        weight = self.layer.weight
        if self.codes is not None:
            attributes: dict[str, Any] = {} if self.axis is None else {"axis": self.axis}
            weight = torch.onnx.ops.symbolic(
                "DequantizeLinear", (self.codes, self.scale, self.zero), attributes,
                dtype=torch.float32, shape=self.codes.shape, version=_OPSET,
            )  # fmt: skip
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.bias)
        output: Tensor = self.layer._conv_forward(x, weight, self.bias)  # type: ignore[operator]
        return output


def to_onnx_modules(model: nn.Module) -> nn.Module:
    """Return a copy of `model` whose quantizers are ONNX operators."""
    exported = copy.deepcopy(model).float().eval()
    for name, layer in quant_layers(exported).items():
        replace_module(exported, name, OnnxLayer(layer))
    for module in list(exported.modules()):
        if isinstance(module, QuantMatMul):
            for side in ("left_quantizer", "right_quantizer"):
                quantizer = getattr(module, side)
                setattr(module, side, None if quantizer is None else OnnxQuantizer(quantizer))
    return exported


def write_onnx(model: nn.Module, path: Path, run: Run) -> dict[str, Any]:
    """Write the file, run it in onnxruntime where that is installed, and return the agreement."""
    onnx_export(to_onnx_modules(model), path, run, rewrite=suit_runtimes)
    return onnx_agreement(model, path, run)


def suit_runtimes(graph: Any) -> None:
    """Rewrite a graph (`onnx_ir.Graph`) so that onnxruntime computes it fast; what it computes stays.

    A convolution between DequantizeLinear and QuantizeLinear runs in integers there; every other one runs in float, with
    weights that had better be constants.
    """
    for node in list(graph):
        if node.op_type == "BatchNormalization":
            _fold_batch_norm(node)
    for node in list(graph):
        if node.op_type in ("Conv", "Gemm") and (dequantize := _dequantize(node)) is not None:
            _center(dequantize)
            has_zeros = dequantize.inputs[2].const_value.numpy().any()  # its integer convolution is slow with those
            in_float = node.op_type == "Conv" and (has_zeros or not _is_requantized(node))
            if in_float or _bias_overflows(node, dequantize):
                _dequantize_at_load(node, dequantize)
                _keep_in_float(node)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


def _fold_batch_norm(norm: Any) -> None:
    """Put a batch norm into the scales and the bias of the quantized layer before it.

    With a = gamma / sqrt(var + eps) the weights' scale becomes s |a|. Where a < 0 the container's integers are counted
    from the other end, zero point included. A norm stays where anybody else reads the layer's output or weight.
    """
    layer = norm.inputs[0].producer()
    if layer is None or layer.op_type not in ("Conv", "Gemm") or len(norm.inputs[0].uses()) > 1:
        return
    weight = _dequantize(layer)
    if weight is None or len(weight.outputs[0].uses()) > 1:
        return
    codes, scale, zero = (value.const_value.numpy() for value in weight.inputs)
    gamma, beta, mean, var = (value.const_value.numpy().astype(np.float64) for value in norm.inputs[1:])
    bias = layer.inputs[2].const_value.numpy() if len(layer.inputs) > 2 else 0.0  # the exporter drops one of zeros
    factor = gamma / np.sqrt(var + norm.attributes.get_float("epsilon", 1e-5))
    limits, turned = np.iinfo(codes.dtype), factor < 0
    codes, zero = codes.copy(), np.broadcast_to(zero, factor.shape).copy()
    for integers in (codes, zero):
        integers[turned] = limits.min + limits.max - integers[turned].astype(np.int32)
    _replace_constant(weight, 0, codes)
    _replace_constant(weight, 1, (scale * np.abs(factor)).astype(np.float32))
    _replace_constant(weight, 2, zero)
    layer.resize_inputs(3)
    _replace_constant(layer, 2, ((bias - mean) * factor + beta).astype(np.float32))
    weight.attributes.add(_ir().AttrInt64("axis", 0))
    norm.outputs[0].replace_all_uses_with(norm.inputs[0])
    norm.graph.remove(norm, safe=True)


def _is_requantized(layer: Any) -> bool:
    """Whether a layer's output goes to one QuantizeLinear alone, or through a ReLU that cuts nothing off its range."""
    low, high = -np.inf, np.inf
    node = layer
    while len(uses := node.outputs[0].uses()) == 1:
        node = uses[0].node
        if node.op_type == "QuantizeLinear":
            smallest, largest = _range(node)
            slack = np.finfo(np.float32).eps  # as onnxruntime has it
            return bool(low <= smallest + slack and largest <= high + slack)
        if node.op_type == "Relu":
            low = max(low, 0.0)
        elif node.op_type == "Clip" and all(
            value is None or value.const_value is not None for value in node.inputs[1:]
        ):
            bounds = [None if value is None else float(value.const_value.numpy()) for value in node.inputs[1:]]
            low = max([low, *(bound for bound in bounds[:1] if bound is not None)])
            high = min([high, *(bound for bound in bounds[1:] if bound is not None)])
        else:
            return False
    return False


def _range(node: Any) -> tuple[float, float]:
    """Return the smallest and the largest value of a QuantizeLinear or DequantizeLinear with one scale."""
    scale, zero = (value.const_value.numpy() for value in node.inputs[1:])
    limits = np.iinfo(zero.dtype)
    low, high = ((np.float32(limit) - np.float32(zero)) * np.float32(scale) for limit in (limits.min, limits.max))
    return float(low), float(high)


def _dequantize(layer: Any) -> Any | None:
    """Return the node that makes floats of a layer's integer weights."""
    node = layer.inputs[1].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _bias_overflows(layer: Any, dequantize: Any) -> bool:
    """Whether a bias is too large for 32 bits in steps of input scale times weight scale: onnxruntime would cut it off.

    So it is where a batch norm or the method has all but switched a channel off.
    """
    inputs = layer.inputs[0].producer()
    if len(layer.inputs) < 3 or inputs is None or inputs.op_type != "DequantizeLinear":
        return False
    bias, input_scale, weight_scale = (
        value.const_value.numpy().astype(np.float64)
        for value in (layer.inputs[2], inputs.inputs[1], dequantize.inputs[1])
    )
    return bool((np.abs(bias) >= 2.0**30 * input_scale * weight_scale).any())


def _center(dequantize: Any) -> None:
    """Take the zero points off the integers where int8 holds the result: always below eight bits."""
    codes, zero = (dequantize.inputs[place].const_value.numpy().astype(np.int32) for place in (0, 2))
    centred = codes - zero.reshape(-1, *[1] * (codes.ndim - 1))
    if zero.any() and centred.min() >= -128 and centred.max() <= 127:
        _replace_constant(dequantize, 0, centred.astype(np.int8))
        _replace_constant(dequantize, 2, np.zeros(zero.shape, np.int8))


def _dequantize_at_load(layer: Any, dequantize: Any) -> None:
    """Make floats of integer weights by Cast, Sub and Mul, which a runtime does once.

    onnxruntime repeats DequantizeLinear at every run, and lays out only constant weights for its fast convolution.
    """
    ir = _ir()
    codes, scale, zero = dequantize.inputs
    shape = (-1, *[1] * (codes.const_value.numpy().ndim - 1))
    scales, zeros = (value.const_value.numpy().astype(np.float32).reshape(shape) for value in (scale, zero))
    nodes = [ir.node("Cast", [codes], {"to": ir.DataType.FLOAT})]
    for op, by in (("Sub", zeros), ("Mul", scales)):
        if op == "Mul" or by.any():
            operand = _constant(layer.graph, by)
            nodes.append(ir.node(op, [nodes[-1].outputs[0], operand]))
    layer.graph.insert_before(layer, nodes)
    layer.replace_input_with(1, nodes[-1].outputs[0])
    if not dequantize.outputs[0].uses():
        layer.graph.remove(dequantize, safe=True)


def _keep_in_float(layer: Any) -> None:
    """Put a Clip that changes nothing before a layer with float weights, so that its input is no DequantizeLinear's.

    onnxruntime would round constant float weights between quantized tensors to integers of its own.
    """
    dequantize = layer.inputs[0].producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return
    bounds = [_constant(layer.graph, np.float32(limit)) for limit in _range(dequantize)]
    clip = _ir().node("Clip", [dequantize.outputs[0], *bounds])
    layer.graph.insert_before(layer, clip)
    layer.replace_input_with(0, clip.outputs[0])


def _replace_constant(node: Any, place: int, value: Any) -> None:
    node.replace_input_with(place, _constant(node.graph, value))


def _constant(graph: Any, value: Any) -> Any:
    ir = _ir()
    name = f"constant_{len(graph.initializers)}"  # grows with each; what is unused is dropped at the end only
    made = ir.Value(name=name, const_value=ir.tensor(np.array(value, order="C"), name=name))
    graph.register_initializer(made)
    return made


def _ir() -> Any:
    import onnx_ir  # comes with onnxscript, which the exporter needs

    return onnx_ir
