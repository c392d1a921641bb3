"""Restoring photos that are too large for one pass: overlapping tiles, blended, without seams.

A tile's pixels are trusted only where the network saw all that it looks at, `context` pixels away from
the tile's inner edges. Trusted parts of neighbours overlap by `blend` pixels, over which one fades into
the other; the weights of all tiles sum to 1 at every pixel. So a network that looks no farther than
`context` gives exactly what it gives on the whole photo. Tiles begin at multiples of the network's
down-sampling, so that its grid lies as it does on the whole photo.

Global averages (the squeeze of channel attention) would differ from tile to tile. They are measured
once, over patches from all over the photo, and held for all tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Network = Callable[[Tensor], Tensor]

BLEND = 32
_PROBE = 160
"""Side of the random image on which the receptive field is measured."""
_OUTSIDE = 1e-3
"""Share of the gradient that a context may miss where the field is larger than the probe shows."""
_PATCHES, _PATCH = 6, 128
"""Patches per side of the photo, and their side, for global averages."""


@dataclass(frozen=True)
class Tiling:
    """How to cut: all in pixels of the input."""

    tile: int
    """Side of a tile; a multiple of `multiple`."""
    context: int
    """Width at the inner edges of a tile that is not trusted."""
    blend: int = BLEND
    """Width over which neighbours fade into each other."""
    multiple: int = 1
    """Tiles begin and end at multiples of this."""

    @property
    def step(self) -> int:
        """Distance of neighbouring tiles."""
        return (self.tile - 2 * self.context - self.blend) // self.multiple * self.multiple

    def __post_init__(self) -> None:
        if self.tile % self.multiple:
            raise ValueError(f"tile {self.tile} is no multiple of {self.multiple}")
        if self.step < self.multiple:
            raise ValueError(
                f"tiles of {self.tile} pixels leave nothing beside a context of {self.context} and a blend of {self.blend}"
            )


def starts(side: int, tiling: Tiling) -> list[int]:
    """Return where tiles begin along a side (a multiple of `multiple`); the last one ends with the side."""
    if side <= tiling.tile:
        return [0]
    last = side - tiling.tile
    return [*range(0, last, tiling.step), last]


def fades(side: int, tiling: Tiling) -> list[Tensor]:
    """Return each tile's weights along a side; at every pixel they sum to 1 over the tiles.

    Returns:
        One tensor (min(tile, side),) per tile, float32.
    """
    places = starts(side, tiling)
    length = min(tiling.tile, side)
    ramp = torch.arange(length, dtype=torch.float64) - tiling.context + 0.5
    weights = []
    for place in places:
        weight = torch.ones(length, dtype=torch.float64)
        if place > 0:
            weight = weight * (ramp / tiling.blend).clamp(0, 1)
        if place + length < side:
            weight = weight * (ramp.flip(0) / tiling.blend).clamp(0, 1)
        weights.append(weight)
    total = torch.zeros(side, dtype=torch.float64)
    for place, weight in zip(places, weights, strict=True):
        total[place : place + length] += weight
    return [(w / total[p : p + length]).float() for p, w in zip(places, weights, strict=True)]


def restore_in_tiles(network: Network, image: Tensor, tiling: Tiling, scale: int = 1) -> Tensor:
    """Return the network's output on one image, tile by tile.

    Args:
        network: (1, C, h, w) -> (1, C', scale h, scale w).
        image: (1, C, H, W); H and W multiples of `tiling.multiple`.
        tiling: how to cut.
        scale: side of the output / side of the input.

    Returns:
        (1, C', scale H, scale W), on the CPU.
    """
    height, width = image.shape[-2:]
    rows, columns = (_scaled(fades(side, tiling), scale) for side in (height, width))
    tile_height, tile_width = min(tiling.tile, height), min(tiling.tile, width)
    out: Tensor | None = None
    for top, row in zip(starts(height, tiling), rows, strict=True):
        for left, column in zip(starts(width, tiling), columns, strict=True):
            restored = network(image[..., top : top + tile_height, left : left + tile_width])
            if out is None:
                out = torch.zeros(1, restored.shape[1], scale * height, scale * width)
            place = out[..., scale * top :, scale * left :][..., : scale * tile_height, : scale * tile_width]
            place += restored.float().cpu() * row[:, None] * column
    assert out is not None  # an image has at least one tile
    return out


def _scaled(weights: Sequence[Tensor], scale: int) -> list[Tensor]:
    return [weight.repeat_interleave(scale) for weight in weights]


def measure_context(network: Network, channels: int, limit: int, multiple: int = 1, device: str = "cpu") -> int:
    """Return how far, in pixels, an output pixel looks: the radius of the gradient on random images.

    Where all of the gradient lies within the probe, its exact radius; where it does not, the radius
    outside of which lies a thousandth of its sum of magnitudes. At most `limit`, rounded up to `multiple`.

    Args:
        network: (1, C, h, w) -> (1, C', s h, s w), differentiable.
        channels: C.
        limit: the largest context that may be returned.
        multiple: of the network's grid.
        device: where the network is.
    """
    side = math.ceil(_PROBE / multiple) * multiple
    generator = torch.Generator().manual_seed(0)
    probe = torch.rand(1, channels, side, side, generator=generator).to(device).requires_grad_()
    with torch.enable_grad():
        output = network(probe)
        scale = output.shape[-1] // side
        # One whole cell of the grid in the middle: pixels of a cell look differently far to each side.
        first = side // 2 // multiple * multiple
        cell = output[..., scale * first : scale * (first + multiple), scale * first : scale * (first + multiple)]
        signs = torch.randn(cell.shape, generator=generator).to(cell)
        [gradient] = torch.autograd.grad((cell * signs).sum(), probe)
    gradient = gradient[0].abs().sum(0).double().cpu()
    position = torch.arange(side)
    distance = torch.maximum(first - position, position - (first + multiple - 1)).clamp(min=0)
    radius = torch.maximum(distance[:, None], distance[None, :])
    per_radius = torch.zeros(int(radius.max()) + 1, dtype=torch.float64).index_add_(
        0, radius.flatten(), gradient.flatten()
    )
    reached = int(per_radius.nonzero().max()) if per_radius.any() else 0
    if reached >= int(distance[0]) - multiple:  # it goes on outside of the probe
        share = per_radius.cumsum(0) / per_radius.sum()
        reached = int((share < 1 - _OUTSIDE).sum())
    return min(limit, math.ceil(reached / multiple) * multiple)


def global_pools(model: nn.Module) -> list[nn.Module]:
    """Return the modules that average over the whole image."""
    return [m for m in model.modules() if isinstance(m, nn.AdaptiveAvgPool2d) and m.output_size in (1, (1, 1))]


@contextmanager
def held_averages(model: nn.Module, network: Network, image: Tensor, multiple: int = 1) -> Iterator[None]:
    """Within the block, global averages are those of the whole image, whatever tile goes through.

    They are taken over patches from a grid over the image. During that pass each layer gets the mean over
    all patches, as it would on the whole image.

    Args:
        model: holds the `nn.AdaptiveAvgPool2d(1)` modules.
        network: what calls `model`.
        image: (1, C, H, W).
        multiple: the network takes sides that are multiples of this, as those of `image` are.
    """
    pools = global_pools(model)
    if not pools:
        yield
        return
    held: dict[nn.Module, Tensor] = {}

    def take(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if module not in held:
            held[module] = output.mean(0, keepdim=True)
        return held[module].expand(output.shape[0], -1, -1, -1)

    hooks = [pool.register_forward_hook(take) for pool in pools]
    try:
        network(patches(image, multiple))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def patches(image: Tensor, multiple: int = 1) -> Tensor:
    """Return a grid of patches (P, C, h, w) that is spread evenly over an image (1, C, H, W)."""
    places = []
    for side in image.shape[-2:]:
        length = min(math.ceil(_PATCH / multiple) * multiple, side)
        count = min(_PATCHES, math.ceil(side / length))
        places.append((torch.linspace(0, side - length, count).long().tolist(), length))
    (rows, height), (columns, width) = places
    return torch.cat([image[..., top : top + height, left : left + width] for top in rows for left in columns])
