"""Finding the search space of a network: which layers may shrink, and what must shrink with them.

The network is traced with torch.fx on one example. Along the graph every tensor carries the group of
channels it is made of; an addition joins two groups, an operation that is not known channel by channel fixes
them. A convolution or linear layer starts a new group with its output and shrinks its input with the group that
it reads. Each group that is not fixed becomes one width choice.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F
from torch.nn.utils import parametrize

from eff.errors import ConfigError, UnsupportedModelError, did_you_mean
from eff.modes import eval_mode
from eff_nas_kit.slicing import same_padding
from eff_nas_kit.space import Axis, Choice, LayerChoices, SearchSpace

_CHANNEL_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid,
    nn.Mish, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.ZeroPad2d, nn.Upsample,
)  # fmt: skip
_CHANNEL_FUNCTIONS = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.dropout, F.dropout2d, F.max_pool2d,
    F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.relu, torch.sigmoid, torch.tanh, torch.flatten,
    F.interpolate,
}  # fmt: skip
_CHANNEL_METHODS = {"relu", "relu_", "sigmoid", "tanh", "flatten", "contiguous", "view", "reshape"}
_ADDITIONS = {operator.add, operator.iadd, torch.add}
_SCALINGS = {operator.mul, operator.imul, operator.truediv, torch.mul, torch.div}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)


@dataclass(frozen=True)
class SpaceOptions:
    """What the user wants to search.

    Args:
        search: kinds of choices.
        width_shares: candidates as shares of each layer's width, increasing, at most 1.
        kernels: candidate kernel sizes, odd and increasing; empty: 3 up to the layer's, or 1 and 3.
        depths: candidate numbers of blocks; empty: depth is not searched.
        include: layers whose width and kernel are searched; empty: the model's `searchable`, else all.
        crop: where smaller kernels are cut out.
    """

    search: tuple[str, ...] = ("width", "kernel")
    width_shares: tuple[float, ...] = (0.25, 0.5, 1.0)
    kernels: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    include: tuple[str, ...] = ()
    crop: Literal["center", "corner"] = "center"


@dataclass
class _Group:
    """Channels that can only shrink together."""

    size: int
    fixed: bool = False
    makers: list[str] = field(default_factory=list)
    users: list[tuple[str, Literal["out", "inp"], int]] = field(default_factory=list)


@dataclass(frozen=True)
class _Flow:
    """Whose channels a tensor holds, and where."""

    group: int
    """Index of a group, which may have been joined to another."""
    repeat: int = 1
    """Features per channel."""
    last: bool = False
    """Channels are the last dimension (after a linear layer), not the second."""


def find_space(model: nn.Module, example: Sequence[Tensor], options: SpaceOptions, who: str) -> SearchSpace:
    """Return the search space of `model`.

    Args:
        model: any network; it runs once on `example`.
        example: positional inputs.
        options: what to search.
        who: the method's name, for messages.

    Raises:
        ConfigError: a candidate does not fit a layer, or `include` names none.
        UnsupportedModelError: nothing can be searched, a layer is used twice, or weights are parametrized.
    """
    layers = _layers(model, who)
    included = _included(model, layers, options, who)
    with eval_mode(model):
        choices: dict[str, Choice] = {}
        found: dict[str, LayerChoices] = {}
        if "width" in options.search:
            _add_widths(_Trace(model, example, who).groups(), included, options, choices, found)
        if "kernel" in options.search:
            _add_kernels(layers, included, options, choices, found, who)
        if options.depths:
            _add_depths(model, example, options, choices, found, who)
    if not any(len(choice.values) > 1 for choice in choices.values()):
        kinds = f"{type(model).__name__} ({len(list(model.modules()))} modules)"
        raise UnsupportedModelError(
            f"{who}: found nothing to choose in {kinds}: no width, kernel or depth with two candidates; "
            "use a network with convolutions or linear layers in a row, or other candidates"
        )
    return SearchSpace(choices=choices, layers=found, crop=options.crop)


def _layers(model: nn.Module, who: str) -> dict[str, nn.Module]:
    """Return the layers that can take part, by name; refuse those whose weights are not plain or shared."""
    layers: dict[str, nn.Module] = {}
    seen: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        is_computed = (
            parametrize.is_parametrized(module) or hasattr(module, "weight_g") or hasattr(module, "weight_orig")
        )
        if is_computed and isinstance(module, (nn.Conv2d, nn.Linear)):  # parametrized, it is of another class
            raise UnsupportedModelError(
                f"{who}: the weight of '{name}' is computed (weight or spectral norm, pruning), so its slices are not "
                "nested; remove the parametrization first"
            )
        if type(module) not in (nn.Conv2d, nn.Linear, *_NORMS):
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                raise UnsupportedModelError(
                    f"{who}: '{seen[id(parameter)]}' and '{name}' share a weight, so one cannot be cut without the other; "
                    "give each its own"
                )
            seen[id(parameter)] = name
        layers[name] = module
    return layers


def _included(model: nn.Module, layers: dict[str, nn.Module], options: SpaceOptions, who: str) -> set[str] | None:
    names = options.include or getattr(model, "searchable", ())
    for name in names:
        if not isinstance(layers.get(name), (nn.Conv2d, nn.Linear)):
            known = [key for key, layer in layers.items() if isinstance(layer, (nn.Conv2d, nn.Linear))]
            raise ConfigError(
                f"{who}: include names '{name}', which is no convolution or linear layer{did_you_mean(name, known)}"
            )
    return set(names) or None


class _Trace:
    """One pass over the traced graph that collects the groups."""

    def __init__(self, model: nn.Module, example: Sequence[Tensor], who: str):
        self.model = model
        self.who = who
        self.made: list[_Group] = []
        self.parent: list[int] = []
        self.flows: dict[fx.Node, _Flow | None] = {}
        self.called: set[str] = set()
        try:
            traced = fx.symbolic_trace(model)
            with torch.no_grad():
                ShapeProp(traced).propagate(*example)
        except Exception as error:  # tracing runs foreign code and raises many types
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UnsupportedModelError(
                f"{who}: {type(model).__name__} cannot be traced ({reason}), so it is not known which widths go "
                "together; use search=kernel or depth_choices"
            ) from error
        self.graph = traced.graph

    def groups(self) -> list[_Group]:
        """Return the groups."""
        for node in self.graph.nodes:
            self.flows[node] = self._visit(node)
        return [group for index, group in enumerate(self.made) if self.parent[index] == index]

    def _visit(self, node: fx.Node) -> _Flow | None:
        if node.op == "call_module":
            return self._module(node, self.model.get_submodule(str(node.target)))
        if node.op == "call_function" and node.target in _ADDITIONS | _SCALINGS:
            return self._pointwise(node)
        known = node.target in (_CHANNEL_FUNCTIONS if node.op == "call_function" else _CHANNEL_METHODS)
        if node.op in ("call_function", "call_method") and known:
            return self._kept(node)
        if node.op == "call_method" and node.target in ("size", "dim"):
            return None
        if node.op == "call_function" and node.target is getattr:  # x.shape
            return None
        self._fix(node)
        return None

    def _module(self, node: fx.Node, module: nn.Module) -> _Flow | None:
        name = str(node.target)
        if any(True for _ in module.parameters()):
            if name in self.called:
                raise UnsupportedModelError(
                    f"{self.who}: '{name}' is used more than once in a forward pass; a shared layer has no width of its own"
                )
            self.called.add(name)
        flow = self._flow_of(node)
        is_last = _rank(node) == 2 or (flow is not None and flow.last)
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            self._use(flow, name, "inp", module.in_channels, node)
            return self._new(name, module.out_channels)
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels:
            return flow if self._use(flow, name, "out", module.out_channels, node) else None
        if isinstance(module, nn.Linear):
            if is_last:
                self._use(flow, name, "inp", module.in_features, node)
            else:
                self._fix(node)
            return self._new(name, module.out_features, last=True)
        if isinstance(module, _NORMS) and (_rank(node) == 2 or is_last == isinstance(module, nn.LayerNorm)):
            features = module.normalized_shape[0] if isinstance(module, nn.LayerNorm) else module.num_features
            return flow if self._use(flow, name, "out", features, node) else None
        if isinstance(module, _CHANNEL_MODULES):
            return self._kept(node)
        self._fix(node)
        return None

    def _kept(self, node: fx.Node) -> _Flow | None:
        """Follow an operation that keeps channels apart; a flatten puts their pixels in a row."""
        flow, source = self._flow_of(node), node.args[0]
        before, after = _shape(source), _shape(node)
        if flow is None or before is None or after is None or before[0] != after[0]:
            self._fix(node)
            return None
        if after == before or (len(after) == len(before) and after[1] == before[1] and not flow.last):
            return flow
        if not flow.last and len(after) == 2 and len(before) > 2 and after[1] % before[1] == 0:
            return _Flow(flow.group, flow.repeat * (after[1] // before[1]))
        self._fix(node)
        return None

    def _pointwise(self, node: fx.Node) -> _Flow | None:
        tensors = [argument for argument in node.args if isinstance(argument, fx.Node) and _shape(argument) is not None]
        flows = [self.flows.get(argument) for argument in tensors]
        if len(tensors) == 1 and flows[0] is not None and len(node.all_input_nodes) == 1:
            # A constant added to a channel that is not there would be seen by the next layer.
            return flows[0] if node.target in _SCALINGS else self._fixed(node)
        if len(tensors) == 2 and node.target in _ADDITIONS and _shape(tensors[0]) == _shape(tensors[1]):
            first, second = flows
            if first is not None and second is not None and (first.repeat, first.last) == (second.repeat, second.last):
                self._join(first.group, second.group)
                return first
        return self._fixed(node)

    def _fixed(self, node: fx.Node) -> None:
        self._fix(node)
        return None

    def _fix(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            flow = self.flows.get(source)
            if flow is not None:
                self._group(flow.group).fixed = True

    def _flow_of(self, node: fx.Node) -> _Flow | None:
        source = node.args[0] if node.args else None
        return self.flows.get(source) if isinstance(source, fx.Node) else None

    def _use(self, flow: _Flow | None, name: str, side: Literal["out", "inp"], size: int, node: fx.Node) -> bool:
        if flow is None:
            return False
        group = self._group(flow.group)
        if group.size * flow.repeat != size:
            self._fix(node)
            return False
        group.users.append((name, side, flow.repeat))
        return True

    def _new(self, name: str, size: int, last: bool = False) -> _Flow:
        self.made.append(_Group(size, makers=[name]))
        self.parent.append(len(self.made) - 1)
        return _Flow(len(self.made) - 1, last=last)

    def _group(self, index: int) -> _Group:
        return self.made[self._root(index)]

    def _root(self, index: int) -> int:
        while self.parent[index] != index:
            index = self.parent[index]
        return index

    def _join(self, first: int, second: int) -> None:
        a, b = sorted((self._root(first), self._root(second)))
        if a == b:
            return
        into, other = self.made[a], self.made[b]
        self.parent[b] = a
        into.fixed = into.fixed or other.fixed or into.size != other.size
        into.makers += other.makers
        into.users += other.users


def _shape(value: Any) -> torch.Size | None:
    meta = value.meta.get("tensor_meta") if isinstance(value, fx.Node) else None
    shape = getattr(meta, "shape", None)
    return shape if isinstance(shape, torch.Size) else None


def _rank(node: fx.Node) -> int:
    return len(_shape(node) or ())


def _add_widths(
    groups: list[_Group], included: set[str] | None, options: SpaceOptions, choices: dict[str, Choice],
    found: dict[str, LayerChoices],
) -> None:  # fmt: skip
    for group in groups:
        values = tuple(sorted({max(1, round(share * group.size)) for share in options.width_shares}))
        if group.fixed or len(values) < 2 or (included is not None and not included.issuperset(group.makers)):
            continue
        name = f"{group.makers[0]}.width"
        choices[name] = Choice(kind="width", values=values)
        for maker in group.makers:
            found[maker] = found.get(maker, LayerChoices()).model_copy(update={"out": Axis(choice=name)})
        for user, side, repeat in group.users:
            axis = Axis(choice=name, repeat=repeat)
            found[user] = found.get(user, LayerChoices()).model_copy(update={side: axis})


def _add_kernels(
    layers: dict[str, nn.Module], included: set[str] | None, options: SpaceOptions, choices: dict[str, Choice],
    found: dict[str, LayerChoices], who: str,
) -> None:  # fmt: skip
    for name, layer in layers.items():
        if not isinstance(layer, nn.Conv2d) or (included is not None and name not in included):
            continue
        size = layer.kernel_size[0]
        if size == 1 or not _can_shrink(layer):
            continue
        if larger := [kernel for kernel in options.kernels if kernel > size]:
            raise ConfigError(
                f"{who}: kernel_choices: {larger[0]} is larger than the kernel of '{name}', which is {size}; "
                "use smaller candidates, or name other layers with include"
            )
        values = options.kernels or (tuple(range(3, size + 1, 2)) if size > 3 else (1, 3))
        if len(values) > 1:
            choices[f"{name}.kernel"] = Choice(kind="kernel", values=values)
            found[name] = found.get(name, LayerChoices()).model_copy(update={"kernel": f"{name}.kernel"})


def _can_shrink(layer: nn.Conv2d) -> bool:
    """Whether smaller kernels give outputs of the same size: square, odd, dilated alike, padded by half."""
    size, dilation = layer.kernel_size[0], layer.dilation[0]
    half = same_padding(size, dilation)
    return (
        len(set(layer.kernel_size)) == len(set(layer.dilation)) == 1
        and size % 2 == 1
        and layer.padding in ((half, half), "same")
        and layer.padding_mode == "zeros"
    )


def _add_depths(
    model: nn.Module, example: Sequence[Tensor], options: SpaceOptions, choices: dict[str, Choice],
    found: dict[str, LayerChoices], who: str,
) -> None:  # fmt: skip
    stages = _stages(model, example)
    for name, blocks in stages.items():
        if blocks >= options.depths[-1] and len(options.depths) > 1:
            choices[f"{name}.depth"] = Choice(kind="depth", values=options.depths)
            found[name] = LayerChoices(depth=f"{name}.depth")
    if not any(choice.kind == "depth" for choice in choices.values()):
        seen = ", ".join(f"'{name}' has {blocks}" for name, blocks in stages.items()) or "there are none"
        raise ConfigError(
            f"{who}: depth_choices: no row of equal blocks is {options.depths[-1]} long ({seen}); use smaller depths"
        )


def _stages(model: nn.Module, example: Sequence[Tensor]) -> dict[str, int]:
    """Return the rows of blocks of one class, from the second on with equal shapes in and out, by name and length."""
    rows = {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, nn.Sequential) and len(module) > 1 and len({type(b) for b in module}) == 1
        and any(True for _ in module[0].children())
    }  # fmt: skip
    kept: dict[nn.Module, bool] = {}

    def note(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        kept[block] = isinstance(output, Tensor) and inputs[0].shape == output.shape

    handles = [block.register_forward_hook(note) for row in rows.values() for block in row]
    with torch.no_grad():
        model(*example)
    for handle in handles:
        handle.remove()
    return {name: len(row) for name, row in rows.items() if all(kept.get(block) for block in row[1:])}
