"""sparsify beside exact ways to the largest 0.1 %."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from eff_kernels.bench import Case, buffers
from eff_kernels.sparsify import dgc_step_, reference, sparsify
from eff_kernels.sparsify.library import OP

SIZE, RATIO = 10_000_000, 0.001


def cases(device: torch.device) -> Iterator[Case]:
    """Yield 10 million float32 entries at 0.1 %, alone and with the momentum correction."""
    generator = torch.Generator().manual_seed(0)

    def make(_: int) -> Tensor:
        return torch.randn(SIZE, generator=generator).to(device)

    inputs = buffers(make, 4 * SIZE)
    keep = int(SIZE * RATIO)

    def top(v: Tensor) -> tuple[Tensor, Tensor]:
        indices = v.abs().topk(keep, sorted=False).indices
        return v[indices], indices

    def kth(v: Tensor) -> tuple[Tensor, Tensor]:
        size = v.abs()
        indices = (size >= size.kthvalue(SIZE - keep + 1).values).nonzero().flatten()
        return v[indices], indices

    def plain(v: Tensor) -> tuple[Tensor, Tensor]:
        from eff_kernels.sparsify.plan import make_plan

        plan = make_plan(SIZE, RATIO, 0.01)
        return reference.sparsify(v, plan.keep, plan.stride, plan.start, plan.share, 1.3, 0.8, 10, True)

    def calls(function: Callable[[Tensor], Any]) -> list[Callable[[], Any]]:
        return [lambda v=v: function(v) for v in inputs]  # type: ignore[misc]

    choice = OP.choose(inputs[0]).by("peaks of blocks first" if device.type == "cpu" else "count, then write")
    yield Case(
        "10 M float32, 0.1 %", calls(lambda v: sparsify(v, RATIO)),
        {"torch.topk": calls(top), "kthvalue": calls(kth), "mask of all": calls(plain)},
        choice, moved=4 * SIZE, reference=lambda: plain(inputs[0]), tolerance=0.0,
    )  # fmt: skip

    def state() -> tuple[Tensor, Tensor]:
        return torch.zeros_like(inputs[0]), torch.zeros_like(inputs[0])

    ours, theirs = state(), state()

    def by_topk(gradient: Tensor) -> tuple[Tensor, Tensor]:
        u, v = theirs
        reference.accumulate_(gradient, u, v, 0.9, False)
        values, indices = top(v)
        v[indices] = 0
        u[indices] = 0
        return values, indices

    yield Case(
        "a step of momentum correction, 10 M float32, 0.1 %", calls(lambda g: dgc_step_(g, *ours, RATIO)),
        {"the same by torch.topk": calls(by_topk)}, choice, moved=28 * SIZE,
    )  # fmt: skip
