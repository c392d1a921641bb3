"""Who reads a layer's output: seen by running the model, so that `forward` may be written in any way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Activation = Literal["relu", "relu6"]


@contextmanager
def remembered_outputs(layers: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Tensor]]]:
    """Collect (name, output) of every call; the tensors are kept alive, so that identity means what it says."""
    outputs: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda module, arguments, output, name=name: outputs.append((name, output)))
        for name, module in layers.items()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def layer_of(outputs: list[tuple[str, Tensor]], tensor: object) -> str | None:
    """Return the layer whose output `tensor` is."""
    return next((name for name, output in reversed(outputs) if output is tensor), None)


def activations_after(layers: Mapping[str, nn.Module], forward: Callable[[], Any]) -> dict[str, Activation]:
    """Return which layers' outputs go straight into a ReLU or ReLU6, be it a module or a function."""
    found: dict[str, Activation] = {}

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
        ) -> Any:
            kind = _activation(function, arguments, options or {})
            if kind and (name := layer_of(outputs, arguments[0])):
                found.setdefault(name, kind)
            return function(*arguments, **(options or {}))

    with remembered_outputs(layers) as outputs, torch.no_grad(), Watch():
        forward()
    return found


def _activation(function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Activation | None:
    name = getattr(function, "__name__", "")
    if name in ("relu", "relu_"):
        return "relu"
    if name == "relu6":
        return "relu6"
    if name.rstrip("_") in ("hardtanh", "clamp", "clip"):
        bounds = (*arguments[1:3], *(options[key] for key in ("min_val", "max_val", "min", "max") if key in options))
        return {(0, 6): "relu6", (0,): "relu", (0, None): "relu"}.get(bounds[:2])  # type: ignore[return-value]
    return None
