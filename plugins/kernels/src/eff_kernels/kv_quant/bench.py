"""One decoding step over a quantized cache, beside the float cache and beside dequantizing first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from eff_kernels.bench import Case
from eff_kernels.kv_quant import QuantizedKV, kv_attention, kv_dequantize, kv_quantize
from eff_kernels.kv_quant.library import OP


def cases(device: torch.device) -> Iterator[Case]:
    """Yield one query over 60 % of tokens in 4 bits and the rest in 2, 32 query heads on 8 heads."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    batch, heads, length, dim = (8, 8, 16384, 128) if cuda else (1, 8, 4096, 128)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    caches: list[tuple[Tensor, Tensor, QuantizedKV]] = []
    for _ in range(2 if cuda else 8):
        keys, values = random(batch, heads, length, dim), random(batch, heads, length, dim)
        salient = torch.rand(batch, heads, length, generator=generator).argsort(-1)[..., : int(0.6 * length)].to(device)
        caches.append((keys, values, kv_quantize(keys, values, salient)))
    query = random(batch, 4 * heads, 1, dim)

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    float_bytes = 2 * caches[0][0].numel() * dtype.itemsize
    yield Case(
        f"1 query, {length} tokens, {heads} heads, 4/2 bits",
        [lambda cache=cache: kv_attention(query, cache) for _, _, cache in caches],  # type: ignore[misc]
        {
            "dequantize + attention": [lambda cache=cache: attend(*kv_dequantize(cache)) for _, _, cache in caches],  # type: ignore[misc]
            "float cache": [lambda keys=keys, values=values: attend(keys, values) for keys, values, _ in caches],  # type: ignore[misc]
        },
        OP.choose(query.float()).by("blocks of tokens, codes unpacked by planes" if not cuda else "codes unpacked in the kernel"),
        moved=caches[0][2].nbytes,
        reference=lambda: attend(*kv_dequantize(caches[0][2])),
        tolerance=1e-3 if dtype == torch.float32 else 2e-2,
        memory={"eff": caches[0][2].nbytes, "float cache": float_bytes, "dequantize + attention": float_bytes},
    )  # fmt: skip
