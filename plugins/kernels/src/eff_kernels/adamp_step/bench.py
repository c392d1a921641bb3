"""adamp_step_ beside the plain loop; torch's AdamW, which does less, is the lower bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from eff_kernels.adamp_step import adamp_step_, reference
from eff_kernels.adamp_step.library import OP
from eff_kernels.bench import Calls, Case, buffers

SHAPES = [(512, 512), (512,)] * 12 + [(256, 128, 3, 3)] * 4
OPTIONS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "delta": 0.1, "wd_ratio": 0.1, "nesterov": False}
ALWAYS = 1e6
"""A delta that every cosine is below, however far the weights have moved."""


def cases(device: torch.device) -> Iterator[Case]:
    """Yield one step of a model of 4.3 million weights with random gradients, which nothing and everything projects."""
    generator = torch.Generator().manual_seed(0)

    params, grads = ([torch.randn(shape, generator=generator).to(device) for shape in SHAPES] for _ in range(2))
    counts = [10.0] * len(params)
    total = sum(weight.numel() for weight in params)
    matrices = sum(weight.numel() for weight in params if weight.ndim > 1)

    def state(_: int) -> list[list[Tensor]]:
        zeros = [torch.zeros_like(weight) for weight in params]
        return copied([params, grads, zeros, zeros])

    states = buffers(state, 16 * total)

    def step(
        function: Callable[..., None], delta: float, lists: list[list[Tensor]]
    ) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            function(*lists, counts, lr=1e-3, **{**OPTIONS, "delta": delta})
            return tuple(lists[0])

        return call

    def steps(function: Callable[..., None], delta: float) -> Calls:
        return [step(function, delta, lists) for lists in states]

    def adamw(**how: bool) -> Calls:
        made = []
        for weights, gradients, *_ in states:
            parameters = [weight.detach().requires_grad_() for weight in weights]
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            made.append(torch.optim.AdamW(parameters, **how).step)
        return made

    way = "large weights in pieces of rows" if device.type == "cpu" else "three kernels per weight"
    for name, delta in (("nothing projected", OPTIONS["delta"]), ("all rows projected", ALWAYS)):
        yield Case(
            f"{total / 1e6:.1f} million float32 weights in {len(params)} tensors, {name}",
            steps(adamp_step_, delta), {"plain loop": steps(reference.adamp_step_, delta)}, OP.choose(params[0]).by(way),
            moved=36 * matrices + 28 * (total - matrices),
            reference=step(reference.adamp_step_, delta, copied(states[0])), tolerance=1e-5,
            bounds={"AdamW foreach": adamw(foreach=True), "AdamW fused": adamw(fused=True)},
        )  # fmt: skip


def copied(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    """Return copies of all tensors."""
    return [[tensor.clone() for tensor in tensors] for tensors in lists]
