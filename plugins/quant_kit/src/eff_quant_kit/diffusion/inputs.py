"""Quantizers before the layers and attention products of a denoiser: who reads what, and ranges from its own path.

`find_operands` names every tensor to quantize; `insert` puts the quantizers there; `calibrate` sets their ranges, one
pass over the recorded path per timestep. A rebuilt checkpoint needs `insert` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eff.run import Run
from eff_quant_kit.diffusion.sampling import Trajectories, predict_noise
from eff_quant_kit.diffusion.time_aware import TimeAwareQuantizer, follow_timesteps
from eff_quant_kit.layers import QuantLayer, QuantMatMul, is_matmul, replace_module
from eff_quant_kit.quantizer import SMALLEST_SCALE, Quantizer

Ranges = Callable[[Tensor, int], "tuple[Tensor, Tensor]"]
"""(values (C, M), bits) -> lowest and highest value to keep, each (C,)."""


@dataclass(frozen=True)
class Operand:
    """One tensor to quantize: input `side` of module `name`, which has `channels` along `axis`."""

    name: str
    side: int
    bits: int
    channels: int
    axis: int | None
    probability: bool = False


def channel_axis(x: Tensor) -> int:
    """Return 1 for (N, C, H, W) and (N, C), the last axis for (N, tokens, C)."""
    return 1 if x.ndim in (2, 4) else -1


def find_operands(model: nn.Module, names: Sequence[str], forward: Callable[[], Any]) -> list[Operand]:
    """Return the operands of `names` with their channels; bits are still 8. A softmax's output is marked."""
    found: dict[tuple[str, int], Operand] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if is_matmul(module):
            left, right = inputs[0], inputs[1]
            is_softmax = bool(left.min() >= 0) and torch.allclose(
                left.sum(-1), torch.ones_like(left.sum(-1)), atol=1e-3
            )
            axis = -1 if is_softmax else -2  # the product runs over the heads' channels of q and k
            found[name, 0] = Operand(name, 0, 8, left.shape[-1], -1, is_softmax)
            found[name, 1] = Operand(name, 1, 8, right.shape[axis], axis)
        else:
            axis = channel_axis(inputs[0])
            found[name, 0] = Operand(name, 0, 8, inputs[0].shape[axis], axis)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: note(name, module, inputs)
        )
        for name in names
    ]
    with torch.no_grad():
        forward()
    for handle in handles:
        handle.remove()
    return list(found.values())


def insert(
    model: nn.Module, operands: Sequence[Operand], weight_bits: dict[str, int], timesteps: Sequence[int]
) -> nn.Module:
    """Replace layers by quantized ones with untouched scales, and make the model follow its timesteps."""
    device = next(model.parameters()).device
    made: dict[str, dict[int, TimeAwareQuantizer]] = {}
    for item in operands:
        channels = 1 if item.axis is None else item.channels
        made.setdefault(item.name, {})[item.side] = TimeAwareQuantizer(item.bits, timesteps, channels, item.axis)
    for name, sides in made.items():
        layer = model.get_submodule(name)
        new: nn.Module
        if is_matmul(layer):
            new = QuantMatMul(layer, sides[0], sides[1])  # type: ignore[arg-type]
        else:
            weight: Tensor = layer.weight  # type: ignore[assignment]
            quantizer = Quantizer(weight_bits[name], False, channels=len(weight), axis=0, with_offset=True)
            for parameter in quantizer.parameters():
                parameter.requires_grad_(False)
            new = QuantLayer(layer, quantizer, sides[0])  # type: ignore[arg-type]
        replace_module(model, name, new.to(device))
    return follow_timesteps(model)


def operand_quantizer(model: nn.Module, item: Operand) -> TimeAwareQuantizer:
    """Return the quantizer that `insert` made for an operand."""
    module: Any = model.get_submodule(item.name)
    if isinstance(module, QuantLayer):
        return module.input_quantizer  # type: ignore[return-value]
    found: TimeAwareQuantizer = module.left_quantizer if item.side == 0 else module.right_quantizer
    return found


def channels_first(x: Tensor, axis: int | None) -> Tensor:
    """Return `x` as (C, M); C is 1 without an axis."""
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)


@torch.no_grad()
def record_inputs(
    model: nn.Module, operands: Sequence[Operand], x: Tensor, t: int, labels: Tensor | None
) -> dict[Operand, Tensor]:
    """Return what reaches each operand of the float model at timestep t."""
    seen: dict[Operand, Tensor] = {}
    handles = [
        model.get_submodule(item.name).register_forward_pre_hook(
            lambda _, inputs, item=item: seen.__setitem__(item, inputs[item.side])
        )
        for item in operands
    ]
    predict_noise(model, x, torch.full((len(x),), t, device=x.device), labels)
    for handle in handles:
        handle.remove()
    return seen


def calibrate(
    model: nn.Module, teacher: nn.Module, operands: Sequence[Operand], path: Trajectories, ranges: Ranges, run: Run
) -> None:
    """Set every activation quantizer's ranges: a set per timestep, or one from all where there is one set only."""
    constant: dict[str, int] = {}
    pooled: dict[Operand, list[Tensor]] = {}
    for index, (x, t) in enumerate(zip(path.x, path.t, strict=True)):
        for item, values in record_inputs(teacher, operands, x, t, path.labels).items():
            quantizer = operand_quantizer(model, item)
            if len(quantizer.timesteps) == 1:
                pooled.setdefault(item, []).append(values)
                continue
            flat = channels_first(values, item.axis)
            if 2 * quantizer.set_range(index, *ranges(flat, item.bits)) > len(flat):
                constant[item.name] = t
    for item, parts in pooled.items():
        operand_quantizer(model, item).set_range(0, *ranges(channels_first(torch.cat(parts), item.axis), item.bits))
    if constant:
        named = ", ".join(list(constant)[:3])
        run.warn(
            f"more than half the input channels are constant at some timestep in {len(constant)} layers, e.g. {named}"
        )


def shrunk_range(x: Tensor, bits: int, power: float = 2.4, chunk: int = 1 << 16) -> tuple[Tensor, Tensor]:
    """Return per row of (C, M) the range, shrunk by 0 to 79 %, of least mean |x - x_hat|^power."""
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    some = x[:, :: max(1, x.shape[1] // chunk)]
    best = torch.full_like(low, float("inf"))
    best_low, best_high = low.clone(), high.clone()
    for percent in range(80):
        a, b = low * (1 - percent / 100), high * (1 - percent / 100)
        scale, zero = affine(a, b, bits)
        level = ((some / scale[:, None]).round() + zero[:, None]).clamp(0, 2**bits - 1)
        error = ((level - zero[:, None]) * scale[:, None] - some).abs().pow(power).mean(1)
        better = error < best
        best = torch.where(better, error, best)
        best_low, best_high = torch.where(better, a, best_low), torch.where(better, b, best_high)
    return best_low, best_high


def full_range(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return smallest and largest value of each row of (C, M)."""
    return x.amin(1), x.amax(1)


def affine(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale (high - low) / (2^b - 1) and zero point round(-low / scale)."""
    scale = ((high - low) / (2**bits - 1)).clamp(min=SMALLEST_SCALE)
    return scale, (-low / scale).round()


def set_weights(model: nn.Module, ranges: Ranges) -> None:
    """Set scale and offset of every weight quantizer from its weight."""
    for module in model.modules():
        if isinstance(module, QuantLayer) and module.weight_quantizer is not None:
            weight: Tensor = module.layer.weight.detach()  # type: ignore[operator]
            low, high = ranges(weight.flatten(1), module.weight_quantizer.bits)
            scale, zero = affine(low.clamp(max=0), high.clamp(min=0), module.weight_quantizer.bits)
            module.weight_quantizer.set_scale(scale, -zero * scale)


def to_structure(operands: Sequence[Operand], weight_bits: dict[str, int], timesteps: Sequence[int]) -> dict[str, Any]:
    """Return what `from_structure` needs, as JSON values."""
    return {
        "operands": [asdict(item) for item in operands],
        "weight_bits": dict(weight_bits),
        "timesteps": list(timesteps),
    }


def from_structure(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Insert what a checkpoint says was inserted."""
    operands = [Operand(**item) for item in structure["operands"]]
    return insert(model, operands, structure["weight_bits"], structure["timesteps"])
