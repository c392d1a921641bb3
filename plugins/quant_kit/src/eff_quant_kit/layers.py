"""Layers with quantizers before them, and the walk that puts them into a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.errors import ConfigError, UnsupportedModelError, did_you_mean
from eff.modes import eval_mode
from eff.run import Run
from eff_quant_kit.quantizer import Quantizer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LARGE = 0.01
"""Weights with at least this share of a model's parameters are named where they stay in float."""
NAMED = 5
"""Names in one warning."""


class QuantLayer(nn.Module):
    """A convolution or linear layer that quantizes its input and its weight.

    The layer itself stays as it is under `layer`, so names and shapes of its weights are readable.
    """

    def __init__(self, layer: nn.Module, weight_quantizer: Quantizer | None, input_quantizer: Quantizer | None):
        super().__init__()
        self.layer = layer
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer

    @property
    def weight_bits(self) -> float:
        """Bits per weight: the quantizer's, averaged over channels, or 32."""
        return 32 if self.weight_quantizer is None else self.weight_quantizer.mean_bits

    def weight(self) -> Tensor:
        """Return the weight that the layer computes with."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return weight if self.weight_quantizer is None else self.weight_quantizer(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for quantized input and weight."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        weight, bias = self.weight().to(x.dtype), self.layer.bias
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, bias)
        output: Tensor = self.layer._conv_forward(x, weight, bias)  # type: ignore[operator]
        return output


class QuantMatMul(nn.Module):
    """A matrix product of two activations that quantizes both operands."""

    def __init__(self, layer: nn.Module, left_quantizer: Quantizer | None, right_quantizer: Quantizer | None):
        super().__init__()
        self.layer = layer
        self.left_quantizer = left_quantizer
        self.right_quantizer = right_quantizer

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the product of the quantized operands."""
        if self.left_quantizer is not None:
            left = self.left_quantizer(left)
        if self.right_quantizer is not None:
            right = self.right_quantizer(right)
        product: Tensor = self.layer(left, right)
        return product


def is_matmul(module: nn.Module) -> bool:
    """Whether a module is a matrix product of two activations: its class is called MatMul."""
    return type(module).__name__ == "MatMul"


def find_layers(model: nn.Module, matmuls: bool = False) -> dict[str, nn.Module]:
    """Return the layers that can be quantized, by name, in module order.

    nn.MultiheadAttention uses its weights without calling its layers, so what is inside is left out.
    """
    inside_attention = tuple(
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    )
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, (nn.Linear, *CONVOLUTIONS)) or (matmuls and is_matmul(module)))
        and not (inside_attention and name.startswith(inside_attention))
    }


def left_in_float(model: nn.Module) -> dict[str, str]:
    """Return large weight matrices outside of the layers that can be quantized, the largest first.

    Embeddings, transposed convolutions, what is inside nn.MultiheadAttention, and bare parameters.

    Returns:
        By name of the weight its module's type and its share of the model's parameters; shares below `LARGE` are left out.
    """
    layers = find_layers(model)
    whole = sum(parameter.numel() for parameter in model.parameters())
    found = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner not in layers and parameter.ndim > 1 and parameter.numel() >= LARGE * whole:
            share = 100 * parameter.numel() / whole
            found[name] = (share, f"{type(model.get_submodule(owner)).__name__}, {share:.0f} % of the parameters")
    return {name: found[name][1] for name in sorted(found, key=lambda name: -found[name][0])}


def warn_left_in_float(plugin: str, model: nn.Module, run: Run) -> None:
    """Name the large weights that stay in float; call it on the float model. Says nothing where one is rebuilt."""
    if not run.restoring and (others := left_in_float(model)):
        named = "; ".join(f"{name} ({what})" for name, what in list(others.items())[:NAMED])
        more = f"; and {len(others) - NAMED} more" if len(others) > NAMED else ""
        run.warn(f"{plugin}: left in float: {named}{more}")


def check_layers(plugin: str, model: nn.Module, layers: dict[str, nn.Module], exclude: Sequence[str]) -> None:
    """Raise where there is nothing to quantize or `exclude` names no layer.

    Raises:
        UnsupportedModelError: no convolution or linear layer; ConfigError: an unknown name.
    """
    for name in exclude:
        if name not in layers:
            raise ConfigError(
                f"{plugin}: exclude names '{name}', which is no convolution or linear layer{did_you_mean(name, layers)}"
            )
    if not [name for name in layers if name not in exclude]:
        modules = [(name, type(module).__name__) for name, module in model.named_modules() if name]
        example = f", e.g. '{modules[0][0]}': {modules[0][1]}" if modules else ""
        raise UnsupportedModelError(
            f"{plugin}: found no Linear or Conv in {type(model).__name__} ({len(modules)} modules{example}); nothing to quantize"
        )


def execution_order(model: nn.Module, layers: dict[str, nn.Module], forward: Callable[[], Any]) -> list[str]:
    """Return the names of `layers` in the order in which `forward` first calls them.

    Layers that are not called come last, in module order.
    """
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name) if name not in called else None)
        for name, module in layers.items()
    ]
    try:
        with eval_mode(model), torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return called + [name for name in layers if name not in called]


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where `name` is, and everywhere else the same module is used."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        if parent is new:
            continue
        for key, child in list(parent._modules.items()):  # named_children() skips a second name of one module
            if child is old:
                setattr(parent, key, new)


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Return the quantized layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def name_quantizers(model: nn.Module) -> None:
    """Tell every quantizer its place, for messages."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            module.name = name


def initialise_inputs(
    model: nn.Module, initialise: Callable[[Quantizer, Tensor], None], forward: Callable[[], Any]
) -> None:
    """Run `forward` once; every uninitialised quantizer outside the weights sets itself when reached.

    Later quantizers so see what earlier ones have already quantized.
    """
    weights = {id(layer.weight_quantizer) for layer in quant_layers(model).values()}
    handles = []
    for module in model.modules():
        if isinstance(module, Quantizer) and id(module) not in weights and not bool(module.initialised):

            def set_itself(quantizer: nn.Module, inputs: tuple[Any, ...]) -> None:
                assert isinstance(quantizer, Quantizer)
                if not bool(quantizer.initialised):
                    initialise(quantizer, inputs[0])

            handles.append(module.register_forward_pre_hook(set_itself))
    try:
        with eval_mode(model), torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any]) -> int:
    """Compute the running statistics of batch norms afresh, as plain averages over `batches`; return their number.

    Quantized weights shift what batch norms see, and few epochs of training do not bring the running averages there.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return 0
    momenta = [module.momentum for module in norms]
    with eval_mode(model):
        for module in norms:
            module.reset_running_stats()
            module.momentum = None  # cumulative average
            module.train()
        with torch.no_grad():
            for batch in batches:
                forward(batch)
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
    return len(norms)
