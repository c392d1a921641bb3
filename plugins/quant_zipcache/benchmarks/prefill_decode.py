"""Time of prefill and of a decoding step, and bytes of the cache, over those with a float cache.

    python plugins/quant_zipcache/benchmarks/prefill_decode.py [--length 4096] [--device cuda] [--json]

A Llama with random weights (4 layers, 8 query heads on 2, 64 channels each), one text of random tokens. Prefill: median of
interleaved runs. Decode: mean over as many steps as the streaming gap, so that one compression is in it, median of
interleaved runs. `dequantized` is a compressed cache that makes float keys and values in each step, as the released code
does; `fp8` is transformers' own quantized cache, the one that needs no further package.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache

from eff_quant_zipcache.cache import ZipCache, ZipLayer
from eff_quant_zipcache.config import ZipCacheConfig
from eff_quant_zipcache.model import compress

VOCABULARY = 1000


class DequantizedLayer(ZipLayer):
    """Dequantizes and joins the whole cache for each step."""

    def attend(self, query: Tensor, visible: Tensor | None, scale: float) -> Tensor:
        """Attend to float keys and values; one query that sees everything."""
        keys, values = (torch.cat(pair, 2) for pair in zip(self.dequantized(), (self.keys, self.values), strict=True))
        return scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)


def cache_bytes(cache: Any) -> int:
    """Return the bytes of the tensors that a cache holds."""
    if isinstance(cache, ZipCache):
        return cache.nbytes
    held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    held += [layer._quantized_keys[0] for layer in cache.layers if hasattr(layer, "_quantized_keys")]
    held += [layer._quantized_values[0] for layer in cache.layers if hasattr(layer, "_quantized_values")]
    return sum(x.numel() * x.element_size() for x in held)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--gap", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=2, max_position_embeddings=2 * options.length, bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    config = ZipCacheConfig(streaming_gap=options.gap)
    compress(model, config)
    model.to(options.device, torch.bfloat16 if options.device.startswith("cuda") else torch.float32)

    def dequantized() -> ZipCache:
        cache = ZipCache(config, 4)
        cache.layers = [DequantizedLayer(config, index) for index in range(4)]
        return cache

    kinds: dict[str, Callable[[], Any]] = {
        "float": lambda: DynamicCache(config=model.config),
        "zipcache": lambda: ZipCache(config, 4),
        "dequantized": dequantized,
        "fp8": lambda: QuantizedCache("fp8", config=model.config),
    }
    text = torch.randint(VOCABULARY, (1, options.length + options.gap), device=options.device)

    def timed(call: Callable[[], object]) -> float:
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    def decode(cache: Any) -> None:
        for step in range(options.length, options.length + options.gap):
            model(input_ids=text[:, step : step + 1], past_key_values=cache)

    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in kinds}
    sizes: dict[str, int] = {}
    with torch.inference_mode():
        for run in range(options.runs + 1):
            for name, make in kinds.items():
                cache = make()
                prefill = timed(lambda cache=cache: model(input_ids=text[:, : options.length], past_key_values=cache))  # type: ignore[misc]
                sizes[name] = cache_bytes(cache)
                step = timed(lambda cache=cache: decode(cache)) / options.gap  # type: ignore[misc]
                if run:  # the first warms up
                    times[name][0].append(prefill)
                    times[name][1].append(step)
    width = next(model.parameters()).element_size()
    rows = {
        name: {
            "prefill_ms": statistics.median(times[name][0]),
            "decode_ms": statistics.median(times[name][1]),
            "prefill_over_float": statistics.median(times[name][0]) / statistics.median(times["float"][0]),
            "decode_over_float": statistics.median(times[name][1]) / statistics.median(times["float"][1]),
            "bytes": sizes[name],
            "16_bit_over_bytes": sizes["float"] * 2 / width / sizes[name],
        }
        for name in kinds
    }
    if options.json:
        print(json.dumps({"length": options.length, "device": options.device, "rows": rows}, indent=2))
        return
    print(f"{options.length} tokens, {options.device}, {torch.get_num_threads()} threads, {options.runs} runs")
    print(f"{'cache':12} {'prefill':>10} {'decode':>10} {'/ float':>8} {'/ float':>8} {'bytes':>10} {'16 bit /':>8}")
    for name, row in rows.items():
        print(
            f"{name:12} {row['prefill_ms']:7.1f} ms {row['decode_ms']:7.2f} ms {row['prefill_over_float']:8.2f} "
            f"{row['decode_over_float']:8.2f} {row['bytes']:10,d} {row['16_bit_over_bytes']:8.2f}"
        )


if __name__ == "__main__":
    main()
