"""mutual_distances beside torch.cdist with amin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from eff_kernels.bench import Case
from eff_kernels.mutual_score import mutual_distances, reference
from eff_kernels.mutual_score.library import OP

CPU_SHAPES = ((16, 196, 128), (8, 256, 512))
CUDA_SHAPES = ((16, 1369, 1024), (64, 256, 128))


def cases(device: torch.device) -> Iterator[Case]:
    """Yield unit features of small image sets: the computation is far longer than any cache matters."""
    for images, patches, channels in CPU_SHAPES if device.type == "cpu" else CUDA_SHAPES:
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(images, patches, channels, generator=generator).to(device)
        z = torch.nn.functional.normalize(z, dim=-1)
        yield Case(
            f"{images} images, {patches} patches, {channels} channels float32",
            [lambda z=z: mutual_distances(z)],  # type: ignore[misc]
            {"cdist + amin": [lambda z=z: reference.mutual_distances(z)], "one cdist + amin": [_at_once(z)]},  # type: ignore[misc]
            OP.choose(z).by("one product per pair" if device.type == "cpu" else "tiles with a running minimum"),
            moved=4 * z.numel(),
            flops=images * (images - 1) * patches**2 * channels,  # 2 per multiply-add, each pair once
            reference=lambda z=z: reference.mutual_distances(z.double()),  # type: ignore[misc]
            tolerance=1e-5,
            memory={
                "eff": 4 * images**2 * patches + (8 * z.numel() if device.type == "cpu" else 0),
                "one cdist + amin": 4 * (images * patches) ** 2,
            },
        )


def _at_once(z: Tensor) -> Callable[[], Any]:
    def call() -> Tensor:
        flat = z.flatten(0, 1)
        return torch.cdist(flat, flat).view(len(flat), len(z), -1).amin(-1)

    return call
