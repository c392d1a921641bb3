"""The network as a list of operations that integers can do, read off the model by torch.fx."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from eff.errors import UnsupportedModelError
from eff.modes import eval_mode

PLUGIN = "quant_hawqv3"


@dataclass(frozen=True)
class Node:
    """One operation: input, layer, clip, add, cat, max_pool, mean, flatten, slice or pad."""

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    layer: str = ""
    """Module name of a convolution or linear layer."""


@dataclass(frozen=True)
class Plan:
    """Operations in their order; the last one's value is the model's output."""

    nodes: tuple[Node, ...]
    norms: dict[str, str]
    """Layer -> the batch norm behind it."""
    macs: dict[str, int]
    """Multiply-adds of each layer per sample, over all its calls."""
    output: str

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers in the order of their first call."""
        return tuple(dict.fromkeys(node.layer for node in self.nodes if node.op == "layer"))

    @property
    def edges(self) -> tuple[str, ...]:
        """The first layers and those that make the output: they stay at 8 bits."""
        return tuple(
            dict.fromkeys(
                [
                    *self.layers[:1],
                    *(n.layer for n in self.nodes if n.op == "layer" and (n.name == self.output or not self._used(n))),
                ]
            )
        )

    def _used(self, node: Node) -> bool:
        """Whether another layer comes after this one."""
        reached = {node.name}
        for other in self.nodes:
            if reached & set(other.inputs):
                if other.op == "layer":
                    return True
                reached.add(other.name)
        return False

    @property
    def nonnegative(self) -> frozenset[str]:
        """Values that cannot be below 0, by their structure."""
        found: set[str] = set()
        for node in self.nodes:
            keeps = node.op in ("max_pool", "mean", "flatten", "slice", "pad", "add", "cat")
            if (node.op == "clip" and node.options["low"] >= 0) or (keeps and found >= set(node.inputs)):
                found.add(node.name)
        return frozenset(found)

    @property
    def groups(self) -> list[list[str]]:
        """Layers that read one value: a shortcut shares its bits with the first convolution of its block."""
        readers: dict[str, list[str]] = {}
        for node in self.nodes:
            if node.op == "layer":
                readers.setdefault(node.inputs[0], []).append(node.layer)
        merged: list[set[str]] = []
        for names in readers.values():
            group = set(names)
            for other in [item for item in merged if item & group]:
                merged.remove(other)
                group |= other
            merged.append(group)
        return [[name for name in self.layers if name in group] for group in merged if len(group) > 1]


def read_plan(model: nn.Module, example: Tensor) -> Plan:
    """Return the model's operations.

    Args:
        model: in any mode; is run once in eval mode.
        example: two or more inputs (N, ...).

    Raises:
        UnsupportedModelError: the model cannot be traced, or does what integers cannot; all such places are named.
    """
    try:
        with eval_mode(model), torch.no_grad():
            traced = fx.symbolic_trace(model)
            ShapeProp(traced).propagate(example)
    except Exception as error:  # whatever a model's code raises when it meets a proxy
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(
            f"{PLUGIN}: {type(model).__name__} cannot be traced ({reason}); its forward must not depend on values"
        ) from error
    return _Reader(traced).read()


class _Reader:
    """Translates fx nodes one by one."""

    def __init__(self, traced: fx.GraphModule):
        self.graph, self.modules = traced.graph, dict(traced.named_modules())
        self.nodes: list[Node] = []
        self.alias: dict[str, str] = {}
        self.norms: dict[str, str] = {}
        self.macs: dict[str, int] = {}
        self.problems: list[str] = []
        self.calls: dict[str, set[str]] = {}

    def read(self) -> Plan:
        output = ""
        for node in self.graph.nodes:
            if node.op == "output":
                result = node.args[0]
                if not isinstance(result, fx.Node):
                    raise UnsupportedModelError(f"{PLUGIN}: the model returns no single tensor")
                output = self.alias.get(result.name, "")
            elif node.op == "placeholder":
                if self.nodes:
                    if node.users:
                        self.problems.append(f"second input '{node.name}'")
                    continue
                self._add(node, "input")
            elif isinstance(node.meta.get("tensor_meta"), tuple) and hasattr(node.meta["tensor_meta"], "shape"):
                self._operation(node)
            # what yields no tensor (sizes, chunks) is read where it is used
        for layer, norms in self.calls.items():
            if len(norms) > 1:
                self.problems.append(f"{layer} (called with different norms behind it)")
        if self.problems:
            raise UnsupportedModelError(
                f"{PLUGIN}: no integer form for {', '.join(dict.fromkeys(self.problems))}; it has convolutions, linear "
                "layers, batch norms behind them, ReLU, ReLU6, sums, concatenations, pooling, slices and zero padding"
            )
        if not any(node.op == "layer" for node in self.nodes):
            raise UnsupportedModelError(f"{PLUGIN}: the model has no convolution and no linear layer")
        return Plan(tuple(self.nodes), self.norms, self.macs, output)

    def _add(self, node: fx.Node, op: str, inputs: tuple[fx.Node, ...] = (), layer: str = "", **options: Any) -> None:
        names = tuple(self.alias.get(item.name, item.name) for item in inputs)
        self.nodes.append(Node(node.name, op, names, options, layer))
        self.alias[node.name] = node.name

    def _refuse(self, node: fx.Node) -> None:
        if node.op == "call_module":
            what = f"{node.target} ({type(self.modules[str(node.target)]).__name__})"
        else:
            what = getattr(node.target, "__name__", str(node.target))
        self.problems.append(what)
        self.alias[node.name] = node.name

    def _operation(self, node: fx.Node) -> None:
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            for kinds, read in _MODULES:
                if isinstance(module, kinds):
                    return read(self, node, module)
        elif node.op in ("call_function", "call_method"):
            read_function = _FUNCTIONS.get(node.target)
            if read_function is not None and node.args and isinstance(node.args[0], (fx.Node, tuple, list)):
                return read_function(self, node)
        return self._refuse(node)

    def _layer(self, node: fx.Node, module: nn.Module) -> None:
        shape = _shape(node)
        if isinstance(module, nn.Conv2d):
            if module.padding_mode != "zeros" or isinstance(module.padding, str):
                return self._refuse(node)
            count = module.weight[0].numel() * shape[1:].numel()
        else:
            assert isinstance(module, nn.Linear)
            if len(shape) != 2:
                return self._refuse(node)
            count = module.weight.numel()
        name = str(node.target)
        self.macs[name] = self.macs.get(name, 0) + int(count)
        norm = next(iter(node.users)) if len(node.users) == 1 else None
        is_norm = norm is not None and norm.op == "call_module" and isinstance(
            self.modules[str(norm.target)], (nn.BatchNorm1d, nn.BatchNorm2d)
        )  # fmt: skip
        self.calls.setdefault(name, set()).add(str(norm.target) if is_norm and norm is not None else "")
        self._add(node, "layer", (node.args[0],), layer=name)  # type: ignore[arg-type]

    def _norm(self, node: fx.Node, module: nn.Module) -> None:
        source = node.args[0]
        last = self.nodes[-1] if self.nodes else None
        is_plain = isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1
        if (
            not is_plain
            or last is None
            or last.op != "layer"
            or last.name != source.name
            or module.running_mean is None
        ):  # type: ignore[union-attr]
            return self._refuse(node)
        self.norms[last.layer] = str(node.target)
        self.alias[node.name] = last.name

    def _same(self, node: fx.Node, *_: Any) -> None:
        source = node.args[0]
        self.alias[node.name] = self.alias.get(source.name, source.name)  # type: ignore[union-attr]

    def _clip(self, node: fx.Node, low: float, high: float | None) -> None:
        self._add(node, "clip", (node.args[0],), low=float(low), high=high)  # type: ignore[arg-type]

    def _hardtanh(self, node: fx.Node, module: nn.Hardtanh) -> None:
        self._clip(node, module.min_val, float(module.max_val))

    def _sum(self, node: fx.Node) -> None:
        sides = tuple(node.args[:2])
        if len(sides) != 2 or not all(isinstance(side, fx.Node) for side in sides) or node.kwargs:
            return self._refuse(node)
        if _shape(sides[0]) != _shape(sides[1]):  # type: ignore[arg-type]
            return self._refuse(node)
        self._add(node, "add", sides)  # type: ignore[arg-type]

    def _cat(self, node: fx.Node) -> None:
        parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if dim not in (1, 1 - len(_shape(node))) or not isinstance(parts, (list, tuple)):
            return self._refuse(node)
        self._add(node, "cat", tuple(parts))  # type: ignore[arg-type]

    def _pool(self, node: fx.Node, op: str, kernel: Any, stride: Any, padding: Any, plain: bool) -> None:
        if not plain:
            return self._refuse(node)
        kernel = _pair(kernel)
        self._add(
            node, op, (node.args[0],), kernel=kernel, stride=_pair(stride or kernel), padding=_pair(padding)  # type: ignore[arg-type]
        )  # fmt: skip

    def _pool_module(self, node: fx.Node, module: Any) -> None:
        is_max = isinstance(module, nn.MaxPool2d)
        plain = not module.ceil_mode and (_pair(module.dilation) == (1, 1) if is_max else _counts_padding(module))
        op = "max_pool" if is_max else "mean"
        self._pool(node, op, module.kernel_size, module.stride, module.padding, plain)

    def _pool_function(self, node: fx.Node, op: str) -> None:
        names = ("kernel_size", "stride", "padding")
        found = {**dict(zip(names, node.args[1:4], strict=False)), **node.kwargs}
        extra = [value for key, value in found.items() if key not in names] + list(node.args[4:])
        plain = all(value in (False, None, 1, True) for value in extra) and not (
            op == "mean" and found.get("count_include_pad") is False and found.get("padding")
        )
        plain = plain and not found.get("ceil_mode") and not (op == "max_pool" and found.get("return_indices"))
        self._pool(node, op, found["kernel_size"], found.get("stride"), found.get("padding", 0), plain)

    def _adaptive(self, node: fx.Node, op: str, size: Any) -> None:
        before = _shape(node.args[0])[2:]  # type: ignore[arg-type]
        after = _shape(node)[2:]
        divides = len(before) == 2 and all(b % a == 0 for b, a in zip(before, after, strict=True))
        kernel = tuple(b // a for b, a in zip(before, after, strict=True)) if divides else (1, 1)
        self._pool(node, op, kernel, kernel, 0, divides)

    def _mean(self, node: fx.Node) -> None:
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
        shape = _shape(node.args[0])  # type: ignore[arg-type]
        is_spatial = isinstance(dims, (list, tuple)) and len(shape) == 4 and {int(d) % 4 for d in dims} == {2, 3}
        if not is_spatial:
            return self._refuse(node)
        options = {"kernel": tuple(shape[2:]), "stride": tuple(shape[2:]), "padding": (0, 0)}
        if keep:
            self._add(node, "mean", (node.args[0],), **options)  # type: ignore[arg-type]
            return
        source = self.alias[node.args[0].name]  # type: ignore[union-attr]
        self.nodes.append(Node(node.name + "_mean", "mean", (source,), options))
        self.nodes.append(Node(node.name, "flatten", (node.name + "_mean",)))
        self.alias[node.name] = node.name

    def _flatten(self, node: fx.Node, *_: Any) -> None:
        before, after = _shape(node.args[0]), _shape(node)  # type: ignore[arg-type]
        if len(after) != 2 or after[0] != before[0]:
            return self._refuse(node)
        if len(before) == 2:
            return self._same(node)
        self._add(node, "flatten", (node.args[0],))  # type: ignore[arg-type]

    def _item(self, node: fx.Node) -> None:
        source, index = node.args[0], node.args[1]
        assert isinstance(source, fx.Node)
        if source.target in (torch.chunk, "chunk", torch.split, "split"):
            return self._chunk(node, source, index)
        shape = _shape(source)
        parts = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(part, slice) for part in parts) or parts[0] != slice(None):
            return self._refuse(node)
        cuts = []
        for size, part in zip(shape, parts, strict=False):
            if any(isinstance(edge, fx.Node) for edge in (part.start, part.stop, part.step)):  # type: ignore[union-attr]
                return self._refuse(node)
            cuts.append(part.indices(size))  # type: ignore[union-attr]
        self._add(node, "slice", (source,), cuts=cuts[1:])

    def _chunk(self, node: fx.Node, source: fx.Node, index: Any) -> None:
        whole = source.args[0]
        assert isinstance(whole, fx.Node)
        dim = source.args[2] if len(source.args) > 2 else source.kwargs.get("dim", 0)
        if dim not in (1, 1 - len(_shape(whole))) or not isinstance(index, int) or index < 0:
            return self._refuse(node)
        before = [other for other in source.users if isinstance(other.args[1], int) and other.args[1] < index]
        if len(before) != index:
            return self._refuse(node)
        start = sum(_shape(other)[1] for other in before)
        self._add(node, "slice", (whole,), cuts=[(start, start + _shape(node)[1], 1)])

    def _pad(self, node: fx.Node, sides: Any, mode: str = "constant", value: Any = 0) -> None:
        sides = tuple(sides)
        if mode != "constant" or value not in (0, None) or min(sides) < 0 or len(sides) > 6:
            return self._refuse(node)
        self._add(node, "pad", (node.args[0],), sides=sides)  # type: ignore[arg-type]

    def _pad_function(self, node: fx.Node) -> None:
        names = ("pad", "mode", "value")
        found = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
        self._pad(node, found["pad"], found.get("mode", "constant"), found.get("value", 0))  # type: ignore[arg-type]


def _shape(node: fx.Node) -> torch.Size:
    shape: torch.Size = node.meta["tensor_meta"].shape
    return shape


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _counts_padding(module: nn.AvgPool2d) -> bool:
    return module.divisor_override is None and (module.count_include_pad or _pair(module.padding) == (0, 0))


_MODULES: tuple[tuple[Any, Callable[..., None]], ...] = (
    ((nn.Conv2d, nn.Linear), _Reader._layer),
    ((nn.BatchNorm1d, nn.BatchNorm2d), _Reader._norm),
    (nn.ReLU6, lambda reader, node, _: reader._clip(node, 0.0, 6.0)),
    (nn.Hardtanh, _Reader._hardtanh),
    (nn.ReLU, lambda reader, node, _: reader._clip(node, 0.0, None)),
    ((nn.Identity, nn.Dropout, nn.Dropout2d), _Reader._same),
    ((nn.MaxPool2d, nn.AvgPool2d), _Reader._pool_module),
    (nn.AdaptiveAvgPool2d, lambda reader, node, module: reader._adaptive(node, "mean", module.output_size)),
    (nn.AdaptiveMaxPool2d, lambda reader, node, module: reader._adaptive(node, "max_pool", module.output_size)),
    (nn.Flatten, _Reader._flatten),
    (nn.ZeroPad2d, lambda reader, node, module: reader._pad(node, module.padding)),
)


def _relu(reader: _Reader, node: fx.Node) -> None:
    reader._clip(node, 0.0, None)


_FUNCTIONS: dict[Any, Callable[[_Reader, fx.Node], None]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu", "relu_"), _relu),
    F.relu6: lambda reader, node: reader._clip(node, 0.0, 6.0),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _Reader._sum),
    **dict.fromkeys((torch.cat, torch.concat), _Reader._cat),
    **dict.fromkeys((torch.flatten, "flatten", "view", "reshape", torch.reshape), _Reader._flatten),
    **dict.fromkeys((F.dropout, "contiguous"), _Reader._same),
    F.adaptive_avg_pool2d: lambda reader, node: reader._adaptive(node, "mean", None),
    F.adaptive_max_pool2d: lambda reader, node: reader._adaptive(node, "max_pool", None),
    F.avg_pool2d: lambda reader, node: reader._pool_function(node, "mean"),
    F.max_pool2d: lambda reader, node: reader._pool_function(node, "max_pool"),
    **dict.fromkeys((torch.mean, "mean"), _Reader._mean),
    operator.getitem: _Reader._item,
    F.pad: _Reader._pad_function,
}
