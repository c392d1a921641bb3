"""nearest_code beside torch.cdist with argmin, and the distance matrix from one product."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from eff_kernels.bench import Case
from eff_kernels.nearest_code import nearest_code_distance
from eff_kernels.nearest_code.library import OP
from eff_kernels.nearest_code.reference import BLOCK

CPU_SHAPES = ((2048, 2048, 8), (4096, 16384, 8), (4096, 1024, 64))
CUDA_SHAPES = ((16384, 100_000, 8), (65536, 16384, 8), (65536, 1024, 64))


def cases(device: torch.device) -> Iterator[Case]:
    """Yield latents and codebooks of one spread; what is compared are the squared distances found."""
    for vectors, entries, d in CPU_SHAPES if device.type == "cpu" else CUDA_SHAPES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(vectors, d, generator=generator).to(device)
        words = torch.randn(entries, d, generator=generator).to(device)
        yield Case(
            f"{vectors} vectors, {entries} entries of {d} float32",
            [lambda x=x, words=words: nearest_code_distance(x, words)[1]],  # type: ignore[misc]
            {
                "cdist + min": [lambda x=x, words=words: torch.cdist(x, words).min(1).values.square()],  # type: ignore[misc]
                "one product + min": [lambda x=x, words=words: _at_once(x, words)],  # type: ignore[misc]
            },
            OP.choose(x).by("products of blocks" if device.type == "cpu" else "tiles with a running minimum"),
            moved=4 * (x.numel() + words.numel()) + 12 * vectors,
            flops=2 * vectors * entries * d,
            reference=lambda x=x, words=words: torch.cdist(x.double(), words.double()).min(1).values.square(),  # type: ignore[misc]
            tolerance=1e-5,
            memory={
                "eff": 4 * min(BLOCK, vectors * entries) if device.type == "cpu" else 8 * vectors,
                "one product + min": 4 * vectors * entries,
            },
        )


def _at_once(x: Tensor, words: Tensor) -> Tensor:
    found = torch.addmm(words.square().sum(1), x, words.t(), alpha=-2).min(1).indices
    return (x - words[found]).square().sum(1)
