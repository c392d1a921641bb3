"""One decoding step over a quantized cache, beside the float cache, dequantizing first, and transformers' caches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from eff_kernels.bench import Case, Library, Made
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

    def step(layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a layer of transformers attends to with the newest token; the layer stays as it is."""
        found: tuple[Tensor, Tensor] = copy.copy(layer).update(keys[:, :, -1:], values[:, :, -1:])
        return found

    def transformers(backend: str, **options: int) -> Made:  # its default is 4 bits by groups of 64
        from transformers import cache_utils

        pairs = []
        for keys, values, _ in caches[:2]:  # what it dequantizes is beyond the caches of the processor in any case
            layer = getattr(cache_utils, f"{backend}QuantizedLayer")(**options)
            layer.update(keys[:, :, :-1], values[:, :, :-1])
            pairs.append((layer, keys, values))

        def exact() -> Tensor:
            keys, values = (x.double().repeat_interleave(4, 1) for x in step(*pairs[0]))
            return torch.softmax(query.double() @ keys.mT / dim**0.5, -1) @ values

        return Made([lambda pair=pair: attend(*step(*pair)) for pair in pairs], exact)  # type: ignore[misc]

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
        libraries={
            "transformers + quanto, 4 bits": Library("optimum", lambda: transformers("Quanto")),
            "transformers + HQQ, 4 bits": Library("hqq", lambda: transformers("HQQ", axis_key=1, axis_value=1)),
        },
    )  # fmt: skip
