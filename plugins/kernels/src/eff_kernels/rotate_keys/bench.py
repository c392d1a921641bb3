"""rotate_keys beside the eager rotation that transformers' models have, and Liger's kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from eff_kernels.bench import Case, Library, Made, buffers
from eff_kernels.rotate_keys import rotate_keys
from eff_kernels.rotate_keys.library import OP

OFFSET = 37


def cases(device: torch.device) -> Iterator[Case]:
    """Yield a cache of one layer, in float32 and in half precision, that moves as a whole."""
    cuda = device.type == "cuda"
    shape = (4, 8, 8192, 128) if cuda else (1, 8, 2048, 128)
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)

        def make(_: int, dtype: torch.dtype = dtype, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        size = dtype.itemsize * torch.Size(shape).numel()
        caches = buffers(make, size)
        inv_freq = 1e4 ** (-torch.arange(0, shape[-1], 2, device=device) / shape[-1])
        angle = (OFFSET * inv_freq).repeat(2)
        tables = angle.cos(), angle.sin()

        def eager(keys: Tensor, tables: tuple[Tensor, Tensor] = tables) -> Tensor:
            cos, sin = (table.to(keys.dtype) for table in tables)
            a, b = keys.chunk(2, -1)
            return keys * cos + torch.cat((-b, a), -1) * sin

        def ours(keys: Tensor, inv_freq: Tensor = inv_freq) -> Tensor:
            return rotate_keys(keys, OFFSET, inv_freq)

        def calls(function: Callable[[Tensor], Tensor], caches: list[Tensor] = caches) -> list[Callable[[], Any]]:
            return [lambda keys=keys: function(keys) for keys in caches]  # type: ignore[misc]

        def liger(
            caches: list[Tensor] = caches, tables: tuple[Tensor, Tensor] = tables, dtype: torch.dtype = dtype
        ) -> Made:  # which takes queries and keys: half of the heads each
            from liger_kernel.transformers.rope import liger_rotary_pos_emb

            cos, sin = (table.to(dtype).expand(1, shape[2], shape[3]).contiguous() for table in tables)

            def rotated(keys: Tensor) -> tuple[Tensor, ...]:
                found: tuple[Tensor, ...] = liger_rotary_pos_emb(*keys.chunk(2, 1), cos, sin)
                return found

            return Made(
                [lambda keys=keys: rotated(keys) for keys in caches],  # type: ignore[misc]
                lambda: tuple(part.to(dtype) for part in eager(caches[0].double()).chunk(2, 1)),
            )

        name = str(dtype).removeprefix("torch.")
        yield Case(
            f"{' x '.join(map(str, shape))} {name}",
            calls(ours),
            {"eager rotate-half": calls(eager), "torch.compile": calls(torch.compile(eager))},
            OP.choose(caches[0]).by("pieces of tokens" if device.type == "cpu" else "one read, one write"),
            moved=2 * size,
            reference=lambda keys=caches[0], eager=eager, dtype=dtype: eager(keys.double()).to(dtype),  # type: ignore[misc]
            tolerance=1e-5 if dtype == torch.float32 else 1e-2,
            libraries={"Liger": Library("liger_kernel", liger)},
        )  # fmt: skip
