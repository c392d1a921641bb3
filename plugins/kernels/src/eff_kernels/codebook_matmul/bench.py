"""codebook_matmul beside decoding and multiplying (also by torchao), and beside the dense product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_kernels.bench import Case, Library, Made
from eff_kernels.codebook_matmul import codebook_matmul, decode, reference
from eff_kernels.codebook_matmul.library import OP

N = K = 2048
ENTRIES = 256


def cases(device: torch.device) -> Iterator[Case]:
    """Yield one row and many at 2 bits a weight, one row at 1 bit, and training of x and the codebook."""
    generator = torch.Generator().manual_seed(0)
    for m, dim, dtype, trains in [
        (1, 4, torch.float32, False), (1, 4, torch.bfloat16, False), (1, 8, torch.bfloat16, False),
        (256, 4, torch.bfloat16, False), (256, 4, torch.float32, True),
    ]:  # fmt: skip
        yield _case(m, dim, dtype, trains, device, generator)


def _case(m: int, dim: int, dtype: torch.dtype, trains: bool, device: torch.device, generator: torch.Generator) -> Case:
    def codes(_: int) -> Tensor:  # at 8 bits a byte is a code
        return torch.randint(ENTRIES, (N, K // dim), generator=generator, dtype=torch.uint8).to(device)

    packed = [codes(index) for index in range(64)]  # beyond the caches, as 16 dense weights are
    looked_up = [one.long() for one in packed[:16]]
    codebook = torch.randn(ENTRIES, dim, generator=generator).to(device, dtype).requires_grad_(trains)
    x = torch.randn(m, K, generator=generator).to(device, dtype).requires_grad_(trains)
    dense = [decode(one, codebook, bits=8) for one in packed[:16]]
    ones = torch.ones(m, N, dtype=dtype, device=device)

    def measured(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
        return (lambda w: torch.autograd.grad(function(w), (x, codebook), ones)) if trains else function

    def calls(function: Callable[[Tensor], Any], weights: list[Tensor]) -> list[Callable[[], Any]]:
        return [lambda w=w: function(w) for w in weights]  # type: ignore[misc]

    def decoded(code: Tensor) -> Tensor:
        return F.linear(x, F.embedding(code, codebook).flatten(1))

    name = str(dtype).removeprefix("torch.")
    peers = {"decode + linear": calls(measured(decoded), looked_up)}
    if not trains:
        peers[f"dense {name} linear"] = calls(lambda w: F.linear(x, w), dense)
    size = packed[0].numel() + codebook.numel() * codebook.element_size()
    element = x.element_size()

    def torchao() -> Made:
        from torchao.prototype.quantization.codebook import CodebookQuantizedTensor

        entries, ones = codebook.detach()[:, None], torch.ones(N, 1, 1, dtype=dtype, device=device)
        coded = [
            CodebookQuantizedTensor(one.int(), entries, (1, dim), ones, torch.Size((N, K)), dtype=dtype)
            for one in packed[:16]
        ]
        return Made(calls(lambda w: F.linear(x, w), coded), memory=4 * packed[0].numel() + N * K * element)

    def exact() -> Any:
        if not trains:
            return reference.forward(x, packed[0], codebook, 8)
        d_x = reference.backward_x(ones, packed[0], codebook.detach(), 8)
        return d_x, reference.backward_codebook(ones, x.detach(), packed[0], ENTRIES, 8)

    return Case(
        f"({m}, {K}) x ({N}, {K}), {ENTRIES} x {dim}, {name}" + (", with backward" if trains else ""),
        calls(measured(lambda p: codebook_matmul(x, p, codebook, bits=8)), packed), peers,
        OP.choose(x).by(_way(x, packed[0], codebook)), size + (m * K + m * N) * element, 2 * m * N * K * (3 if trains else 1),
        name, exact, 1e-4 if dtype == torch.float32 else 2e-2,
        {"eff": size, "decode + linear": size + N * K * element, f"dense {name} linear": N * K * element},
        libraries={} if trains else {"torchao codebook": Library("torchao", torchao)},
    )  # fmt: skip


def _way(x: Tensor, packed: Tensor, codebook: Tensor) -> str:
    if x.device.type == "cpu":
        from eff_kernels.codebook_matmul.cpu import product_dtype, takes_table

        if takes_table(x, packed, codebook):
            return "looked up in a table of the products of x with the entries"
        return f"decoded in blocks, multiplied in {str(product_dtype(x.dtype)).removeprefix('torch.')}"
    from eff_kernels.codebook_matmul.triton_kernel import way

    return way(len(x), x.dtype)
