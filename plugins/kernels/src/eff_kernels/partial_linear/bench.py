"""partial_linear beside LoRA's two products and beside training the whole weight: forward and backward of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_kernels.bench import Case, buffers
from eff_kernels.partial_linear import partial_linear
from eff_kernels.partial_linear.library import OP

RANK = 16


def cases(device: torch.device) -> Iterator[Case]:
    """Yield a training step (without the optimizer) of one layer."""
    tokens, width, dtype = (1024, 768, torch.float32) if device.type == "cpu" else (8192, 4096, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    weight, index = random(width, width), torch.randperm(width, generator=generator)[:RANK].to(device)
    p = weight[:, index].clone().requires_grad_()
    full = weight.clone().requires_grad_()
    down, up = (
        random(RANK, width).requires_grad_(),
        torch.zeros(width, RANK, device=device, dtype=dtype).requires_grad_(),
    )
    dy = random(tokens, width)
    inputs = buffers(lambda _: random(tokens, width).requires_grad_(), tokens * width * dtype.itemsize)

    def ours(x: Tensor) -> Tensor:
        return partial_linear(x, weight, p, index)

    def lora(x: Tensor) -> Tensor:
        return F.linear(x, weight) + F.linear(F.linear(x, down), up)

    def whole(x: Tensor) -> Tensor:
        return F.linear(x, full)

    def step(function: Callable[[Tensor], Tensor], *trained: Tensor) -> list[Callable[[], Any]]:
        return [lambda x=x: torch.autograd.grad(function(x), (x, *trained), dy) for x in inputs]  # type: ignore[misc]

    def reference() -> tuple[Tensor, Tensor]:
        dx, dw = torch.autograd.grad(whole(inputs[0]), (inputs[0], full), dy)
        return dx, dw[:, index]

    yield Case(
        f"forward + backward, {tokens} tokens, {width} channels, {RANK} columns, {str(dtype).removeprefix('torch.')}",
        step(ours, p),
        {"LoRA": step(lora, down, up), "full weight": step(whole, full)},
        OP.choose(weight).by("gathered columns, torch's products"),
        flops=4 * tokens * width**2 + 2 * tokens * width * RANK,
        dtype=str(dtype).removeprefix("torch."),
        reference=reference,
        tolerance=1e-4 if dtype == torch.float32 else 2e-2,
        memory={
            "eff": tokens * RANK * dtype.itemsize,
            "LoRA": tokens * (width + RANK) * dtype.itemsize,
            "full weight": tokens * width * dtype.itemsize,
        },
    )  # fmt: skip
