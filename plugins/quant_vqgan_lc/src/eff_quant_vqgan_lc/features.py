"""Maps of a frozen network's features: what codebook tables, the perceptual loss and the Frechet distance are made of."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.errors import ConfigError, RequestError, did_you_mean
from eff.models import ModelRequest, open_model
from eff.session import Plugins
from eff_quant_vqgan_lc.model import PLUGIN


class _Reached(Exception):
    """All layers have been seen; the rest of the network need not run."""


class FrozenFeatures(nn.Module):
    """The outputs of some layers of a network that is never trained.

    Args:
        source: any model source or file.
        layers: names of modules whose outputs are maps (N, C, h, w) or tokens (N, T, C).
        size: side to which images are resized; None leaves them as they are.

    Raises:
        RequestError: the network cannot be opened. ConfigError: it has no such layer.
    """

    def __init__(self, source: str, layers: tuple[str, ...], size: int | None):
        super().__init__()
        try:
            opened = open_model(ModelRequest(source, needs_data=False, needs_task=False), Plugins())
        except RequestError as error:
            raise RequestError(f"{PLUGIN}: features: {error}") from error
        self.network, self.layers, self.size = opened.model.eval().requires_grad_(False), layers, size
        known = dict(self.network.named_modules())
        for layer in layers:
            if layer not in known or not layer:
                raise ConfigError(
                    f"{PLUGIN}: {source} has no module '{layer}'{did_you_mean(layer, known)}; "
                    f"it has {', '.join(name for name in list(known)[1:7])}, ..."
                )
        options: dict[str, Any] = {**opened.task.spec.options, **(getattr(opened.model, "task_options", None) or {})}
        for name, default in (("mean", 0.0), ("std", 1.0)):
            self.register_buffer(name, torch.tensor(options.get(name) or [default]).view(1, -1, 1, 1))
        convolution = next((module for module in self.network.modules() if isinstance(module, nn.Conv2d)), None)
        self.channels = convolution.in_channels if convolution is not None else None

    def train(self, mode: bool = True) -> FrozenFeatures:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return one map (N, C, h, w) per layer for images (N, C, H, W) in [0, 1], in the order of `layers`."""
        image = self._prepared(image)
        seen: dict[str, Tensor] = {}

        def note(name: str, output: Any) -> None:
            seen[name] = _as_map(output[0] if isinstance(output, tuple) else output, name)
            if len(seen) == len(self.layers):
                raise _Reached

        handles = [
            self.network.get_submodule(name).register_forward_hook(lambda *call, name=name: note(name, call[2]))
            for name in self.layers
        ]
        try:
            self.network(image)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) < len(self.layers):
            missing = next(name for name in self.layers if name not in seen)
            raise ConfigError(f"{PLUGIN}: the network of features does not run its module '{missing}'; name another")
        return [seen[name] for name in self.layers]

    def _prepared(self, image: Tensor) -> Tensor:
        if self.size is not None and image.shape[-2:] != (self.size, self.size):
            image = F.interpolate(
                image, (self.size, self.size), mode="bilinear", antialias=self.size < min(image.shape[-2:])
            )
        if image.shape[1] == 1 and self.channels == 3:
            image = image.expand(-1, 3, -1, -1)
        if self.channels is not None and image.shape[1] != self.channels:
            raise ConfigError(
                f"{PLUGIN}: the network of features takes {self.channels} channels, the images have {image.shape[1]}; "
                "name another in features"
            )
        return (image - self.mean) / self.std


def _as_map(output: Any, name: str) -> Tensor:
    """Return a layer's output as a map; a class token is left out."""
    if isinstance(output, Tensor) and output.ndim == 3:
        tokens = output.shape[1]
        side = math.isqrt(tokens)
        if side * side != tokens:
            side = math.isqrt(tokens - 1)
            output = output[:, 1:]
        if side and side * side == output.shape[1]:
            return output.transpose(1, 2).reshape(len(output), -1, side, side)
    if not isinstance(output, Tensor) or output.ndim != 4:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            f"{PLUGIN}: module '{name}' of the features gives {shape}, not a map (N, C, h, w); name another"
        )
    return output
