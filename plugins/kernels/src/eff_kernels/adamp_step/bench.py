"""adamp_step_ beside torch's AdamW, the lower bound, and the plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from eff_kernels.adamp_step import adamp_step_, reference
from eff_kernels.adamp_step.library import OP
from eff_kernels.bench import Case

SHAPES = [(512, 512), (512,)] * 12 + [(256, 128, 3, 3)] * 4
OPTIONS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "delta": 0.1, "wd_ratio": 0.1, "nesterov": False}


def cases(device: torch.device) -> Iterator[Case]:
    """Yield one step of a model of 4.3 million weights with random gradients."""
    generator = torch.Generator().manual_seed(0)

    def tensors() -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(device) for shape in SHAPES]

    params, grads = tensors(), tensors()
    first, second = ([torch.zeros_like(weight) for weight in params] for _ in range(2))
    counts = [10.0] * len(params)

    def step(function: Callable[..., None], state: list[list[Tensor]]) -> Callable[[], Any]:
        def call() -> tuple[Tensor, ...]:
            function(*state, counts, lr=1e-3, **OPTIONS)
            return tuple(state[0])

        return call

    def copies() -> list[list[Tensor]]:
        return [[tensor.clone() for tensor in list_] for list_ in (params, grads, first, second)]

    def adamw(**how: bool) -> Callable[[], Any]:
        weights = [weight.clone().requires_grad_() for weight in params]
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        return torch.optim.AdamW(weights, **how).step

    total = sum(weight.numel() for weight in params)
    matrices = sum(weight.numel() for weight in params if weight.ndim > 1)
    yield Case(
        f"{total / 1e6:.1f} million float32 weights in {len(params)} tensors",
        [step(adamp_step_, copies())],
        {
            "plain loop": [step(reference.adamp_step_, copies())],
        },
        OP.choose(params[0]).by("all weights in each operation" if device.type == "cpu" else "three kernels per weight"),
        moved=40 * matrices + 28 * (total - matrices),
        reference=step(reference.adamp_step_, copies()),
        tolerance=1e-5,
        bounds={"AdamW foreach": [adamw(foreach=True)], "AdamW fused": [adamw(fused=True)]},
    )  # fmt: skip
