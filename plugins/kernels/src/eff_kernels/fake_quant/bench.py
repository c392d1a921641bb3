"""fake_quant beside torch's learnable op and the equations under autograd and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from eff_kernels.bench import Case, buffers
from eff_kernels.fake_quant import fake_quant, reference
from eff_kernels.fake_quant.library import OP

SIZE = 1 << 22


def cases(device: torch.device) -> Iterator[Case]:
    """Yield forward, and forward with backward, on 4 Mi float32 values with one scale."""
    generator = torch.Generator().manual_seed(0)

    def make(_: int) -> Tensor:
        return torch.randn(SIZE, generator=generator).to(device).requires_grad_()

    inputs = buffers(make, 4 * SIZE)
    scale = torch.tensor(0.2, device=device, requires_grad=True)
    zero, ones = torch.zeros(1, device=device), torch.ones(SIZE, device=device)

    def ours(x: Tensor) -> Tensor:
        return fake_quant(x, scale, -8, 7)

    def learnable(x: Tensor) -> Tensor:
        result: Tensor = torch._fake_quantize_learnable_per_tensor_affine(x, scale.view(1), zero, -8, 7, 1.0)
        return result

    def detach_form(x: Tensor) -> Tensor:
        u = (x / scale).clamp(-8, 7)
        return ((u.round() - u).detach() + u) * scale

    peers: dict[str, Callable[[Tensor], Tensor]] = {
        "torch learnable op": learnable, "autograd": detach_form, "torch.compile": torch.compile(detach_form),
    }  # fmt: skip

    def forward(function: Callable[[Tensor], Tensor]) -> list[Callable[[], Any]]:
        return [lambda x=x: function(x.detach()) for x in inputs]  # type: ignore[misc]

    def both(function: Callable[[Tensor], Tensor]) -> list[Callable[[], Any]]:
        return [lambda x=x: torch.autograd.grad(function(x), (x, scale), ones) for x in inputs]  # type: ignore[misc]

    arguments = (scale.detach(), None, -8, 7, -1)
    choice = OP.choose(inputs[0])
    yield Case(
        "forward, 4 Mi float32", forward(ours), {name: forward(peer) for name, peer in peers.items()}, choice, 8 * SIZE,
        reference=lambda: reference.forward(inputs[0].detach(), *arguments), tolerance=1e-6,
    )  # fmt: skip
    yield Case(
        "forward + backward, 4 Mi float32", both(ours), {name: both(peer) for name, peer in peers.items()}, choice,
        20 * SIZE,
        reference=lambda: reference.backward(ones, inputs[0].detach(), *arguments)[:2], tolerance=1e-3,
    )  # fmt: skip
    yield _groups(device)


def _groups(device: torch.device) -> Case:
    """A weight (4096, 1024) with groups of 128."""
    generator = torch.Generator().manual_seed(0)
    weights = buffers(lambda _: torch.randn(4096, 1024, generator=generator).to(device), 4 * SIZE)
    scale = torch.full((4096, 8), 0.2, device=device)

    def ours(x: Tensor) -> Tensor:
        return fake_quant(x, scale, -8, 7, group_size=128)

    def equations(x: Tensor) -> Tensor:
        s = scale[..., None]
        return ((x.view(4096, 8, 128) / s).clamp(-8, 7).round() * s).view_as(x)

    def calls(function: Callable[[Tensor], Tensor]) -> list[Callable[[], Any]]:
        return [lambda x=x: function(x) for x in weights]  # type: ignore[misc]

    return Case(
        "forward, groups of 128, 4096 x 1024 float32", calls(ours),
        {"eager": calls(equations), "torch.compile": calls(torch.compile(equations))}, OP.choose(weights[0]), 8 * SIZE,
        reference=lambda: equations(weights[0]), tolerance=1e-6,
    )  # fmt: skip
