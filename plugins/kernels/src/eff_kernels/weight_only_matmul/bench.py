"""weight_only_matmul beside the dense product, torch's own 4-bit product, and those of torchao, HQQ and gemlite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_kernels.bench import Calls, Case, Library, Made
from eff_kernels.packing import unpack_rows
from eff_kernels.weight_only_matmul import cpu, dequantize, prepack, prepacked, reference, weight_only_matmul
from eff_kernels.weight_only_matmul.library import OP

SIZE = 4096
GROUP = 128


def cases(device: torch.device) -> Iterator[Case]:
    """Yield one row at 4 and 3 bits, with one scale a row too, and as many as make the product the limit."""
    generator = torch.Generator().manual_seed(0)
    many = 256 if device.type == "cpu" else 2048
    for m, bits, group, dtype in [
        (1, 4, GROUP, torch.float32),
        (1, 4, GROUP, torch.bfloat16),
        (1, 3, GROUP, torch.bfloat16),
        (1, 4, SIZE, torch.bfloat16),
        (16, 4, GROUP, torch.bfloat16),
        (many, 4, GROUP, torch.bfloat16),
    ]:
        yield _case(m, bits, group, dtype, device, generator)


def _case(m: int, bits: int, group: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    n = k = SIZE

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def packed_weight(_: int) -> Tensor:  # any bytes are levels
        return torch.randint(256, (n, k * bits // 8), generator=generator, dtype=torch.uint8).to(device)

    size = n * k * bits // 8
    packed = [packed_weight(index) for index in range(16)]  # beyond the caches, as three dense weights are
    scale = (0.01 + torch.rand(n, k // group, generator=generator) / 100).to(device, dtype)
    x = normal(m, k)
    grouped = group < k  # one scale a row is measured as it is
    made = [prepack(one, scale, bits=bits) if grouped and dtype == torch.bfloat16 else None for one in packed]
    dense = [dequantize(one, scale, bits=bits, dtype=dtype) for one in packed[:3]]

    def calls(function: Callable[[Tensor], Any], weights: list[Tensor]) -> list[Callable[[], Any]]:
        return [lambda w=w: function(w) for w in weights]  # type: ignore[misc]

    name = str(dtype).removeprefix("torch.")
    peers: dict[str, Calls] = {f"dense {name} linear": calls(lambda w: F.linear(x, w), dense)}
    scale_bytes = scale.numel() * scale.element_size()
    second = 0 if made[0] is None or m > prepacked.ROWS else made[0].codes.numel() + 2 * made[0].grid.numel()
    choice = OP.choose(x)
    memory = {
        "eff": size + scale_bytes + second,
        f"dense {name} linear": n * k * x.element_size(),
    }
    if bits == 4 and grouped and dtype == torch.bfloat16:
        peers["torch int4pack"] = _int4pack(x, packed[:3], scale)
        memory["torch int4pack"] = size + 2 * scale_bytes
    makers = {"HQQ": ("hqq", _hqq)}
    if bits == 4 and dtype == torch.bfloat16:
        makers["gemlite"] = ("gemlite", _gemlite)
        if grouped:
            makers["torchao int4"] = ("torchao", _torchao)
    libraries = {
        name: Library(module, lambda make=make: make(x, packed[:3], scale, bits))  # type: ignore[misc]
        for name, (module, make) in makers.items()
    }
    return Case(
        f"({m}, {k}) x ({n}, {k}), {bits} bits{'' if grouped else ', one scale a row'}, {name}",
        [lambda p=p, q=q: weight_only_matmul(x, p, scale, bits=bits, prepacked=q) for p, q in zip(packed, made, strict=True)],  # type: ignore[misc]
        peers,
        choice.by(_way(x, scale, bits, made[0] is not None)), (second or size + scale_bytes) + (m * k + m * n) * x.element_size(), 2 * m * n * k, name,
        lambda: reference.forward(x, packed[0], scale, None, bits), 1e-5 if dtype == torch.float32 else 2e-2, memory,
        libraries=libraries,
    )  # fmt: skip


def _way(x: Tensor, scale: Tensor, bits: int, is_prepacked: bool) -> str:
    if x.device.type == "cpu":
        if is_prepacked and len(x) <= prepacked.ROWS:
            slower = "; from about 16 rows slower than a dense weight" if len(x) >= 16 else ""
            return f"in the layout of torch's 4-bit product, made once{slower}"
        if cpu.takes_bytes(x, scale, None, bits):
            return "unpacked in blocks to bytes, torch's product of bfloat16 with int8"
        name = str(cpu.product_dtype(len(x), x.dtype)).removeprefix("torch.")
        return f"dequantized in blocks, multiplied in {name}; slower than a dense weight, the more the fewer rows"
    from eff_kernels.weight_only_matmul.triton_kernel import way

    return way(len(x), x.dtype)


def _tiles(packed: list[Tensor], scale: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return weights and grid in the layout of torch's own product: (level - 8) * scale + 0."""
    grid = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()
    levels = [unpack_rows(one, 4) for one in packed]
    if scale.is_cuda:
        return [torch._convert_weight_to_int4pack(one[:, ::2] << 4 | one[:, 1::2], 8) for one in levels], grid
    return [torch._convert_weight_to_int4pack_for_cpu(one.int(), 2) for one in levels], grid


def _int4pack(x: Tensor, packed: list[Tensor], scale: Tensor) -> Calls:
    """Return torch's product on its own layout, made before."""
    tiles, grid = _tiles(packed, scale)
    product = torch._weight_int4pack_mm if x.is_cuda else torch._weight_int4pack_mm_for_cpu
    return [lambda w=w: product(x, w, GROUP, grid) for w in tiles]  # type: ignore[misc]


def _torchao(x: Tensor, packed: list[Tensor], scale: Tensor, bits: int) -> Made:
    """Return a linear layer on torchao's int4 weights: the layout of torch's product, in a tensor class."""
    if x.is_cuda:
        from torchao.quantization import Int4TilePackedTo4dTensor as Int4
    else:
        from torchao.prototype.quantization.int4 import Int4OpaqueTensor as Int4
    tiles, grid = _tiles(packed, scale)
    shape = torch.Size((len(scale), x.shape[1]))
    weights = [Int4(one, grid, [1, GROUP], shape) for one in tiles]
    return Made([lambda w=w: F.linear(x, w) for w in weights], memory=_bytes(packed[0], grid))  # type: ignore[misc]


def _hqq(x: Tensor, packed: list[Tensor], scale: Tensor, bits: int) -> Made:
    """Return HQQ's layer with these levels and scales in the place of those it would choose."""
    from hqq.core.quantize import HQQLinear, Quantizer

    group = x.shape[1] // scale.shape[1]

    def layer(one: Tensor) -> Any:
        made = HQQLinear(None, None, compute_dtype=x.dtype, device=str(x.device))
        packing = Quantizer.bit_to_packing[bits]
        made.W_q = Quantizer.pack[packing](unpack_rows(one, bits).view(-1, group))
        made.meta = {
            "nbits": bits, "group_size": group, "shape": torch.Size((len(scale), x.shape[1])), "axis": 1,
            "scale": scale.reshape(-1, 1), "zero": torch.full_like(scale.reshape(-1, 1), 2 ** (bits - 1)),
            "packing": packing, "unpack_view_dtype": Quantizer.unpack_view_dtype[packing], "view_as_float": False,
            "compute_dtype": x.dtype, "quant_scale": False, "quant_zero": False,
        }  # fmt: skip
        made.ready = True
        return made

    layers = [layer(one) for one in packed]
    held = _bytes(layers[0].W_q, scale, scale) + len(scale) * x.shape[1] * x.element_size()
    return Made([lambda made=made: made(x) for made in layers], memory=held)  # type: ignore[misc]


def _gemlite(x: Tensor, packed: list[Tensor], scale: Tensor, bits: int) -> Made:
    """Return gemlite's layer (Triton), which packs the levels into 32-bit words."""
    from gemlite.helper import A16W4_HQQ_INT

    processor = A16W4_HQQ_INT(device=str(x.device), dtype=x.dtype)
    zeros = torch.full_like(scale, 2 ** (bits - 1))
    layers = [processor.from_weights(unpack_rows(one, bits), scale, zeros) for one in packed]
    return Made([lambda made=made: made(x) for made in layers], memory=_bytes(packed[0], scale, scale))  # type: ignore[misc]


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
