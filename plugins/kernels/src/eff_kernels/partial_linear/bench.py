"""partial_linear beside LoRA (as two products, and peft's layer) and the whole weight: a training step of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff_kernels.bench import Case, Library, Made, buffers
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

    ways: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]] = {
        "eff": (ours, [p]), "LoRA": (lora, [down, up]), "full weight": (whole, [full]),
    }  # fmt: skip

    def step(function: Callable[[Tensor], Tensor], trained: list[Tensor]) -> list[Callable[[], Any]]:
        return [lambda x=x: torch.autograd.grad(function(x), (x, *trained), dy) for x in inputs]  # type: ignore[misc]

    def reference() -> tuple[Tensor, Tensor]:
        dx, dw = torch.autograd.grad(whole(inputs[0]), (inputs[0], full), dy)
        return dx, dw[:, index]

    def peft() -> Made:
        layer = peft_layer(weight)
        a, b = (value for value in layer.parameters() if value.requires_grad)

        def plain(x: Tensor) -> Tensor:
            return F.linear(x, weight) + F.linear(F.linear(x, a), b)

        return Made(step(layer, [a, b]), step(plain, [a, b])[0], kept_bytes(lambda: layer(inputs[0]), weight, a, b))

    calls = {name: step(function, trained) for name, (function, trained) in ways.items()}
    yield Case(
        f"forward + backward, {tokens} tokens, {width} channels, {RANK} columns, {str(dtype).removeprefix('torch.')}",
        calls.pop("eff"),
        calls,
        OP.choose(weight).by("gathered columns, torch's products"),
        flops=4 * tokens * width**2 + 2 * tokens * width * RANK,
        dtype=str(dtype).removeprefix("torch."),
        reference=reference,
        tolerance=1e-4 if dtype == torch.float32 else 2e-2,
        memory={
            name: kept_bytes(lambda function=function: function(inputs[0]), weight, *trained)  # type: ignore[misc]
            for name, (function, trained) in ways.items()
        },
        libraries={"LoRA (peft)": Library("peft", peft)},
    )


def kept_bytes(function: Callable[[], Any], *without: Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, `without` the weights, which are there anyway."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in without}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()  # held until all is counted, so that no two tensors have one address
    del output
    return sum(kept.values())


def peft_layer(weight: Tensor) -> nn.Module:
    """Return the LoRA layer of the peft library on this weight."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    base.weight = nn.Parameter(weight, requires_grad=False)
    settings = {"r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0}
    try:
        layer: nn.Module = Linear(base, "default", config=LoraConfig(**settings), **settings)
    except TypeError:  # before the configuration was an argument
        layer = Linear(base, "default", **settings)
    return layer.to(weight.dtype)
