"""int_matmul and scaled_int_matmul beside torch's 8-bit product, alone and with what follows it in eager, and torchao's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_kernels.bench import Case, Library, Made, buffers
from eff_kernels.int_matmul import dyadic, int_matmul, reference, scaled_int_matmul
from eff_kernels.int_matmul.library import OP


def cases(device: torch.device) -> Iterator[Case]:
    """Yield a single token and batches, K from 512 up; W8A8 with bias, to integers and to float."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4096, 4096), (1024, 1024, 512), (1024, 1024, 4096)]
    if device.type == "cuda":
        shapes = [(1, 4096, 4096), (4096, 4096, 512), (4096, 4096, 4096)]
    for m, n, k in shapes:
        yield _case(m, n, k, device, generator)
    for m, n, k in shapes[:2]:
        yield _scaled_case(m, n, k, device, generator)


def _integers(device: torch.device, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator).to(device)


def _case(m: int, n: int, k: int, device: torch.device, generator: torch.Generator) -> Case:
    inputs = buffers(lambda _: (_integers(device, generator, m, k), _integers(device, generator, n, k)), k * (m + n))
    multiplier, shift = (t.to(device) for t in dyadic(torch.full((n,), 0.01 / k**0.5)))
    bias = torch.arange(n, dtype=torch.int32, device=device)
    wide = multiplier.long(), (torch.ones_like(shift) << (shift.long() - 1)), shift.long()

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return int_matmul(x, w, multiplier, shift, q_min=-128, q_max=127, bias=bias)

    def alone(x: Tensor, w: Tensor) -> Tensor:
        return torch._int_mm(x, w.t())

    def eager(x: Tensor, w: Tensor) -> Tensor:
        total = torch._int_mm(x, w.t()).long()
        return (((total + bias) * wide[0] + wide[1]) >> wide[2]).clamp(-128, 127).to(torch.int8)

    def half_precision(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.t()

    def calls(function: Callable[[Tensor, Tensor], Tensor]) -> list[Callable[[], Any]]:
        return [lambda x=x, w=w: function(x, w) for x, w in inputs]  # type: ignore[misc]

    peers = {"_int_mm + eager requantization": calls(eager)}
    halves = [(x.bfloat16(), w.bfloat16()) for x, w in inputs]
    peers["bfloat16 product"] = [lambda x=x, w=w: half_precision(x, w) for x, w in halves]  # type: ignore[misc]
    x, w = inputs[0]
    return Case(
        f"({m}, {k}) x ({n}, {k}), int8", calls(ours), peers,
        OP.choose(x).by("8-bit product, requantized in pieces" if device.type == "cpu" else "requantized in the kernel"),
        m * k + n * k + m * n, 2 * m * n * k, "int8",
        lambda: reference.forward(x, w, multiplier, shift, bias, -128, 127, False), 0.0,
        bounds={"_int_mm alone": calls(alone)},
    )  # fmt: skip


def _scaled_case(m: int, n: int, k: int, device: torch.device, generator: torch.Generator) -> Case:
    inputs = buffers(lambda _: (_integers(device, generator, m, k), _integers(device, generator, n, k)), k * (m + n))
    scale = torch.rand(n, generator=generator).add_(0.5).mul_(1e-4).to(device)
    bias = torch.randn(n, generator=generator).to(device)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return scaled_int_matmul(x, w, scale, bias)

    def dequantized(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x.float(), w.float() * scale[:, None], bias)

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return torch._int_mm(x, w.t()).float() * scale + bias

    def calls(function: Callable[[Tensor, Tensor], Tensor]) -> list[Callable[[], Any]]:
        return [lambda x=x, w=w: function(x, w) for x, w in inputs]  # type: ignore[misc]

    def torchao() -> Made:  # what its Int8Tensor does once x is quantized; 1 is the scale of x, ours is in `scale`
        from torchao.kernel import int_scaled_matmul

        ones = torch.ones(m, 1, device=device)
        return Made(calls(lambda x, w: int_scaled_matmul(x, w.t(), ones) * scale + bias))

    x, w = inputs[0]
    return Case(
        f"({m}, {k}) x ({n}, {k}), int8, scaled to float32", calls(ours),
        {"dequantize + linear": calls(dequantized), "_int_mm + scale": calls(eager)},
        OP.choose(x).by("8-bit product, scaled in place" if device.type == "cpu" else "scaled in the kernel"),
        m * k + n * k + 4 * m * n, 2 * m * n * k, "int8", lambda: reference.scaled(x, w, scale, bias), 1e-6,
        libraries={"torchao int8": Library("torchao", torchao)},
    )  # fmt: skip
