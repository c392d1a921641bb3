"""The quantized network: one plan, run on real numbers for training and on integers for everything else.

    weights      S_w = max|W'| / (2^(b-1) - 1) per output channel (per tensor in the last layer), W' with its norm folded
    inputs       8 bits: S = max|x| / 127, codes -128..127;   4 bits: S = max x / 15, codes 0..15, after ReLU only
    layer        acc = sum q_x q_w + round(b' / (S S_w)),     its scale S S_w
    sums, cat    every branch goes to the grid of the result, S_o = max|.| / (2^15 - 1), by a dyadic number of its own
    means        the sum over the window; 1 / n becomes part of the scale and so of the next dyadic number

Codes in evaluation are float64 (sums of integers below 2^53 are exact in any order); every requantization is in int64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.errors import RunError
from eff_kernels.int_matmul.reference import shift_rounded
from eff_quant_hawqv3.config import HAWQV3Config
from eff_quant_hawqv3.dyadic import factor
from eff_quant_hawqv3.plan import PLUGIN, Node, Plan

Path = Literal["integers", "simulated", "float"]
FLOOR = 1e-8
LIVE_MOMENTUM = 0.01
"""What a batch's statistics add where norms are not fixed; the reference keeps 0.99."""


def round_ties(x: Tensor, half_even: bool) -> Tensor:
    """Return x rounded; ties go up, or to even."""
    return x.round() if half_even else (x + 0.5).floor()


def through(x: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded` with the gradient of x."""
    return x + (rounded - x).detach()


class Layer(nn.Module):
    """A convolution or linear layer with the norm behind it."""

    def __init__(self, source: nn.Module, norm: nn.Module | None, bits: int, per_tensor: bool, config: HAWQV3Config):
        super().__init__()
        assert isinstance(source, (nn.Conv2d, nn.Linear))
        self.weight, self.bias, self.norm = source.weight, source.bias, norm
        self.bits, self.per_tensor, self.config = bits, per_tensor, config
        self.conv: dict[str, Any] | None = None
        if isinstance(source, nn.Conv2d):
            self.conv = {key: getattr(source, key) for key in ("stride", "padding", "dilation", "groups")}

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return W' = W gamma / sqrt(var + eps) and b' = (b - mean) gamma / sqrt(var + eps) + beta."""
        bias = self.bias if self.bias is not None else self.weight.new_zeros(len(self.weight))
        if self.norm is None:
            return self.weight, bias
        mean, var, eps = self.norm.running_mean, self.norm.running_var, self.norm.eps
        factor = (var + eps).rsqrt()  # type: ignore[operator]
        if self.norm.weight is not None:
            factor = factor * self.norm.weight  # type: ignore[operator]
        bias = (bias - mean) * factor  # type: ignore[operator]
        if self.norm.bias is not None:
            bias = bias + self.norm.bias  # type: ignore[operator]
        return self.weight * factor.reshape(-1, *[1] * (self.weight.ndim - 1)), bias

    def step(self, weight: Tensor, bits: int | None = None) -> Tensor:
        """Return S_w, float32: per channel, shape (O,), or 0-dim."""
        size = weight.detach().float().abs()
        rows = size.reshape(1, -1) if self.per_tensor else size.flatten(1)
        if self.config.percentile_w:
            rank = max(1, round(self.config.percentile_w / 100 * rows.shape[1]))
            top = rows.kthvalue(rank, dim=1).values
        else:
            top = rows.amax(1)
        step = top.clamp_min(FLOOR) / (2 ** ((bits or self.bits) - 1) - 1)
        return step[0] if self.per_tensor else step

    def _levels(self, weight: Tensor, step: Tensor, bits: int | None = None) -> Tensor:
        """Return the codes, with the gradient of weight / step inside the range."""
        half = 2 ** ((bits or self.bits) - 1)
        ratio = (weight / step.reshape(-1, *[1] * (weight.ndim - 1))).clamp(-half, half - 1)
        return through(ratio, round_ties(ratio, self.config.rounding == "half_even").clamp(-half, half - 1))

    def quantized(self, weight: Tensor, bits: int | None = None) -> Tensor:
        """Return `weight` on its grid."""
        step = self.step(weight, bits)
        return self._levels(weight, step, bits) * step.reshape(-1, *[1] * (weight.ndim - 1))

    @torch.no_grad()
    def integers(self, input_step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return weight codes and bias codes (float64) and the sums' scale (float32)."""
        weight, bias = self.folded()
        step = self.step(weight)
        scale = (step * input_step).float()
        limit = 2.0 ** (self.config.bias_bits - 1)
        codes = round_ties(bias.double() / scale.double(), self.config.rounding == "half_even")
        return self._levels(weight, step).double(), codes.clamp(-limit, limit - 1), scale

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the convolution or matrix product."""
        if self.conv is None:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, **self.conv)

    def real(self, x: Tensor, input_step: Tensor | None) -> Tensor:
        """Return the layer of real numbers: quantized where the input's step is given."""
        if self.norm is not None and self.training and not self.config.fix_bn:
            weight = self.weight if input_step is None else self.quantized(self.weight)
            norm: Any = self.norm
            return F.batch_norm(
                self.product(x, weight, self.bias), norm.running_mean, norm.running_var, norm.weight, norm.bias, True,
                LIVE_MOMENTUM, norm.eps,
            )  # fmt: skip
        weight, bias = self.folded()
        if input_step is None:
            return self.product(x, weight, bias)
        step = self.step(weight)
        scale = (step * input_step).float()
        levels = bias / scale
        bias = through(levels, round_ties(levels, self.config.rounding == "half_even")) * scale
        return self.product(x, self.quantized(weight), bias)


class Network(nn.Module):
    """A model as its plan: fake-quantized in training, on integer codes in evaluation."""

    def __init__(self, model: nn.Module, plan: Plan, bits: dict[str, int], config: HAWQV3Config):
        super().__init__()
        self.plan, self.config = plan, config
        modules = dict(model.named_modules())
        last = [node.layer for node in plan.nodes if node.op == "layer" and node.name == plan.output]
        self.layers = nn.ModuleDict()
        for name in plan.layers:
            norm = modules[plan.norms[name]] if name in plan.norms else None
            self.layers[_key(name)] = Layer(modules[name], norm, bits[name], name in last, config)
        names = [node.name for node in plan.nodes]
        self.rows = {name: row for row, name in enumerate(names)}
        self.ranges: Tensor
        self.observed: Tensor
        device = next(model.parameters()).device
        self.register_buffer("ranges", torch.zeros(len(names), 2, device=device))
        self.register_buffer("observed", torch.zeros(len(names), dtype=torch.bool, device=device))
        self.path: Path = "integers"
        """What `forward` computes with in evaluation: integers, the fake-quantized values of training, or plain floats."""
        self.observing = False
        """Update ranges outside of training."""

    def layer(self, name: str) -> Layer:
        """Return a layer by its name in the model."""
        found = self.layers[_key(name)]
        assert isinstance(found, Layer)
        return found

    def grid(self, name: str, bits: int) -> tuple[Tensor, int, int]:
        """Return step, lowest and highest code of a value at `bits`; 4 bits are unsigned.

        Raises:
            RunError: no data has set the range, or all of it was 0.
        """
        low, high = self.ranges[self.rows[name]]
        top = torch.maximum(low.abs(), high.abs()) if bits > 4 else high
        if not bool(self.observed[self.rows[name]]) or not bool(top > 0):
            raise RunError(
                f"{PLUGIN}: value '{name}' has no range (its data were all 0, or none came); calibrate again"
            )
        if bits <= 4:
            return (top / (2**bits - 1)).float(), 0, 2**bits - 1
        return (top / (2 ** (bits - 1) - 1)).float(), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    @torch.no_grad()
    def observe(self, name: str, x: Tensor) -> None:
        """Let a batch move the range of a value."""
        x = x.detach().float().flatten()
        share = self.config.percentile_a
        if share:
            rank = max(1, round(share / 100 * x.numel()))
            new = torch.stack([-(-x).kthvalue(rank).values, x.kthvalue(rank).values])
        else:
            new = torch.stack(list(x.aminmax()))
        row, momentum = self.rows[name], self.config.act_momentum
        if not bool(self.observed[row]):
            self.ranges[row] = new
            self.observed[row] = True
        elif momentum == -1:
            old = self.ranges[row].clone()
            self.ranges[row] = torch.stack([torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])])
        else:
            self.ranges[row] = momentum * self.ranges[row] + (1 - momentum) * new

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (N, ...) in float32; on integers with the gradient of the fake-quantized values."""
        if self.training or self.path != "integers":
            return Real(self).run(x)
        with torch.no_grad():
            value = Codes(self).run(x)
            scale = value.scale.reshape(1, -1, *[1] * (value.x.ndim - 2)) if value.scale.ndim else value.scale
            output = (value.x * scale).float()
        if torch.is_grad_enabled() and x.requires_grad:  # attacks and saliency: integers alone have no gradient
            real = Real(self).run(x)
            output = output + (real - real.detach())  # the value stays that of the integers, bit for bit
        return output


def _key(name: str) -> str:
    return name.replace(".", "__")


class Real:
    """Real numbers with straight-through rounding; a mean's and a flattened value's own 16-bit grid is left out."""

    def __init__(self, net: Network):
        self.net = net
        self.quantizes = net.path != "float"
        self.half_even = net.config.rounding == "half_even"

    def run(self, x: Tensor) -> Tensor:
        """Return the output."""
        net, values = self.net, {}
        updates = net.training or net.observing
        for node in net.plan.nodes:
            inputs = [values[name] for name in node.inputs]
            if node.op == "input":
                value = x
            elif node.op in ("add", "cat"):
                value = _join(node, inputs)
            else:
                value = getattr(self, node.op)(node, *inputs)
            if updates:
                net.observe(node.name, value)
            if self.quantizes and node.op in ("add", "cat"):
                step, _, _ = net.grid(node.name, net.config.residual_bits)
                value = _join(node, [through(v, round_ties(v / step, self.half_even) * step) for v in inputs])
            values[node.name] = value
        result: Tensor = values[net.plan.output]
        return result

    def layer(self, node: Node, x: Tensor) -> Tensor:
        layer = self.net.layer(node.layer)
        if not self.quantizes:
            return layer.real(x, None)
        step, low, high = self.net.grid(node.inputs[0], layer.bits)
        ratio = (x / step).clamp(low, high)
        return layer.real(through(ratio, round_ties(ratio, self.half_even).clamp(low, high)) * step, step)

    def clip(self, node: Node, x: Tensor) -> Tensor:
        return x.clamp(node.options["low"], node.options["high"])

    def max_pool(self, node: Node, x: Tensor) -> Tensor:
        return F.max_pool2d(x, node.options["kernel"], node.options["stride"], node.options["padding"])

    def mean(self, node: Node, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, node.options["kernel"], node.options["stride"], node.options["padding"])

    def flatten(self, node: Node, x: Tensor) -> Tensor:
        return x.flatten(1)

    def slice(self, node: Node, x: Tensor) -> Tensor:
        return x[_index(node)]

    def pad(self, node: Node, x: Tensor) -> Tensor:
        return F.pad(x, node.options["sides"])


def _join(node: Node, values: list[Tensor]) -> Tensor:
    return values[0] + values[1] if node.op == "add" else torch.cat(values, 1)


def _index(node: Node) -> tuple[Any, ...]:
    return (slice(None), *(slice(*cut) for cut in node.options["cuts"]))


@dataclass(frozen=True)
class Value:
    """Codes with their scale, 0-dim or one per channel, and the largest magnitude that they can have."""

    x: Any
    scale: Tensor
    bound: int
    grid: tuple[str, int] | None = None


class Integers:
    """What integers do, node by node; subclasses say what a value is and carry the operations out."""

    def __init__(self, net: Network):
        self.net = net
        self.made: dict[tuple[str, int], Value] = {}

    def run(self, x: Any) -> Value:
        """Return the output's codes."""
        values: dict[str, Value] = {}
        for node in self.net.plan.nodes:
            inputs = [values[name] for name in node.inputs]
            values[node.name] = (
                self._input(node, x) if node.op == "input" else getattr(self, "_" + node.op)(node, inputs)
            )
        return values[self.net.plan.output]

    def emit(self, op: str, out: str, inputs: list[Any], **options: Any) -> Any:
        """Carry one operation out and return its codes."""
        raise NotImplementedError

    def _input(self, node: Node, x: Any) -> Value:
        step, low, high = self.net.grid(node.name, 8)
        codes = self.emit("quantize", f"{node.name}.8", [x], step=step, low=low, high=high)
        return Value(codes, step, -low, (node.name, 8))

    def _move(self, out: str, value: Value, step: Tensor, low: int | None = None, high: int | None = None) -> Any:
        """Return the codes on another grid; rounding's bound in case of no clip."""
        m, e = factor(value.scale, step, out)
        if value.bound * int(m.max()) + (1 << (int(e.max()) - 1)) >= 1 << 62:
            raise RunError(
                f"{PLUGIN}: {out}: codes up to {value.bound} times the factor do not fit 63 bits; use fewer bits"
            )
        return self.emit("requantize", out, [value.x], m=m, e=e, low=low, high=high)

    def _narrow(self, name: str, value: Value, bits: int) -> Value:
        """Return a value on its own grid of `bits`, made once."""
        key = (name, bits)
        if value.grid == key:
            return value
        if key not in self.made:
            step, low, high = self.net.grid(name, bits)
            codes = self._move(f"{name}.{bits}", value, step, low, high)
            self.made[key] = Value(codes, step, max(-low, high), key)
        return self.made[key]

    def _level(self, name: str, value: Value) -> Value:
        """Return a value with one scale for all channels."""
        return value if value.scale.ndim == 0 else self._narrow(name, value, self.net.config.residual_bits)

    def _layer(self, node: Node, inputs: list[Value]) -> Value:
        layer = self.net.layer(node.layer)
        value = self._narrow(node.inputs[0], inputs[0], layer.bits)
        weight, bias, scale = layer.integers(value.scale)
        bound = int((weight.abs().flatten(1).sum(1) * value.bound + bias.abs()).max())
        if bound >= 1 << 31:
            raise RunError(
                f"{PLUGIN}: {node.layer}: sums up to {bound} exceed 32 bits; use fewer bits or smaller layers"
            )
        low = 0 if layer.bits <= 4 else -value.bound
        codes = self.emit("layer", node.name, [value.x], weight=weight, bias=bias, layer=layer, low=low)
        return Value(codes, scale, bound)

    def _clip(self, node: Node, inputs: list[Value]) -> Value:
        value = inputs[0]
        low, high = (
            None if edge is None else (edge / value.scale.double() + 0.5).floor().long()
            for edge in (node.options["low"], node.options["high"])
        )
        codes = self.emit("clip", node.name, [value.x], low=low, high=high)
        bound = value.bound if high is None else min(value.bound, max(int(high.max()), int(low.abs().max())))  # type: ignore[union-attr]
        return Value(codes, value.scale, bound, value.grid if high is None else None)

    def _join(self, node: Node, inputs: list[Value]) -> tuple[list[Any], Tensor, list[int]]:
        step, low, high = self.net.grid(node.name, self.net.config.residual_bits)
        parts = [self._move(f"{node.name}.{place}", value, step) for place, value in enumerate(inputs)]
        bounds = [math.ceil(v.bound * float((v.scale.double() / step.double()).max())) + 1 for v in inputs]
        return parts, step, bounds

    def _add(self, node: Node, inputs: list[Value]) -> Value:
        parts, step, bounds = self._join(node, inputs)
        bits = self.net.config.residual_bits
        if not self.net.config.clip_residual:
            return Value(self.emit("add", node.name, parts), step, sum(bounds))
        codes = self.emit("add", f"{node.name}.sum", parts)
        low, high = torch.tensor(-(2 ** (bits - 1))), torch.tensor(2 ** (bits - 1) - 1)
        return Value(self.emit("clip", node.name, [codes], low=low, high=high), step, 2 ** (bits - 1))

    def _cat(self, node: Node, inputs: list[Value]) -> Value:
        parts, step, bounds = self._join(node, inputs)
        return Value(self.emit("cat", node.name, parts), step, max(bounds))

    def _max_pool(self, node: Node, inputs: list[Value]) -> Value:
        value = inputs[0]
        return Value(self.emit("max_pool", node.name, [value.x], **node.options), value.scale, value.bound)

    def _mean(self, node: Node, inputs: list[Value]) -> Value:
        count = node.options["kernel"][0] * node.options["kernel"][1]
        value = inputs[0]
        if value.bound * count >= 1 << 31:
            value = self._narrow(node.inputs[0], value, self.net.config.residual_bits)
        codes = self.emit("sum_pool", node.name, [value.x], **node.options)
        return Value(codes, (value.scale / count).float(), value.bound * count)

    def _flatten(self, node: Node, inputs: list[Value]) -> Value:
        value = self._level(node.inputs[0], inputs[0])
        return Value(self.emit("flatten", node.name, [value.x]), value.scale, value.bound)

    def _slice(self, node: Node, inputs: list[Value]) -> Value:
        value = self._level(node.inputs[0], inputs[0])
        return Value(self.emit("slice", node.name, [value.x], **node.options), value.scale, value.bound)

    def _pad(self, node: Node, inputs: list[Value]) -> Value:
        value = self._level(node.inputs[0], inputs[0])
        return Value(self.emit("pad", node.name, [value.x], **node.options), value.scale, value.bound)


class Codes(Integers):
    """The simulation: codes in float64 tensors, products by torch, requantization in int64."""

    def __init__(self, net: Network):
        super().__init__(net)
        self.half_even = net.config.rounding == "half_even"
        self.trace: dict[str, Tensor] | None = None

    def emit(self, op: str, out: str, inputs: list[Any], **options: Any) -> Tensor:
        """Carry one operation out."""
        codes: Tensor = getattr(self, op)(*inputs, **options)
        if self.trace is not None:
            self.trace[out] = codes
        return codes

    def quantize(self, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        return round_ties(x.float() / step, self.half_even).clamp(low, high).double()

    def requantize(self, x: Tensor, m: Tensor, e: Tensor, low: int | None, high: int | None) -> Tensor:
        shape = (1, -1, *[1] * (x.ndim - 2)) if m.ndim else ()
        codes = shift_rounded(x.long(), m.reshape(shape), e.reshape(shape), self.half_even)
        return (codes if low is None else codes.clamp(low, high)).double()

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor, layer: Layer, low: int) -> Tensor:
        return layer.product(x, weight, bias)

    def clip(self, x: Tensor, low: Tensor, high: Tensor | None) -> Tensor:
        shape = (1, -1, *[1] * (x.ndim - 2))
        x = torch.maximum(x, low.reshape(shape if low.ndim else ()).to(x))
        return x if high is None else torch.minimum(x, high.reshape(shape if high.ndim else ()).to(x))

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right

    def cat(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, 1)

    def max_pool(self, x: Tensor, kernel: Any, stride: Any, padding: Any) -> Tensor:
        return F.max_pool2d(x, kernel, stride, padding)

    def sum_pool(self, x: Tensor, kernel: Any, stride: Any, padding: Any) -> Tensor:
        return F.avg_pool2d(x, kernel, stride, padding, divisor_override=1)

    def flatten(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def slice(self, x: Tensor, cuts: Any) -> Tensor:
        return x[(slice(None), *(slice(*cut) for cut in cuts))]

    def pad(self, x: Tensor, sides: Any) -> Tensor:
        return F.pad(x, tuple(sides))


def simulate(net: Network, x: Tensor) -> tuple[Value, dict[str, Tensor]]:
    """Return the output's codes and those of every step by name."""
    codes = Codes(net)
    codes.trace = {}
    with torch.no_grad():
        return codes.run(x), codes.trace
