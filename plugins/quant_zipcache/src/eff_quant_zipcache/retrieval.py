"""Key-value retrieval: strings of 20 pairs, then a key whose value is asked for.

A Llama of two layers (width 64, 4 heads, biases and a small base of the rotation, without which a model of this size does
not learn it in a minute) is trained on fresh strings, with all keys asked one after another. Strings grow from 2 pairs to
20, by a quarter each time 90 % of the answers have become right. Measured on other strings: the pairs are read and compressed, then one
key is decoded through the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache

from eff.seeding import derive_seed, named_generator
from eff_quant_zipcache.cache import ZipCache
from eff_quant_zipcache.config import ZipCacheConfig
from eff_quant_zipcache.model import compress

KEYS, VALUES, PAIRS = 64, 16, 20
STEPS, BATCH, RATE = 2200, 32, 3e-3
STRINGS, AT_ONCE = 1000, 20
SETTINGS = {
    "bits4": ZipCacheConfig(bits_other=4),
    "normalized": ZipCacheConfig(),
    "normalized_full_nnz": ZipCacheConfig(nnz="full"),
    "accumulated": ZipCacheConfig(metric="accumulated"),
    "bits2": ZipCacheConfig(bits_salient=2),
}


def strings(count: int, pairs: int, asked: int, generator: torch.Generator) -> Tensor:
    """Return ids (count, 1 + 2 pairs + 2 asked): a start token, pairs, then asked keys with their values."""
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = KEYS + torch.randint(VALUES, (count, pairs), generator=generator)
    pick = torch.rand(count, pairs, generator=generator).argsort(1)[:, :asked]
    start = torch.full((count, 1), KEYS + VALUES)
    told = torch.stack([keys, values], 2).flatten(1)
    answers = torch.stack([keys.gather(1, pick), values.gather(1, pick)], 2).flatten(1)
    return torch.cat([start, told, answers], 1)


def trained(seed: int, steps: int = STEPS, pairs: int = PAIRS) -> nn.Module:
    """Return a model that retrieves, in evaluation mode."""
    torch.manual_seed(derive_seed(seed, "claims/retrieval"))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=KEYS + VALUES + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, attention_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0}, initializer_range=0.05,
            bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    generator = named_generator(seed, "claims/retrieval/train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.98))
    now, right = 2, 0.0
    for step in range(steps):
        cooling = min(1.0, max(0.05, (steps - step) / (0.3 * steps)))
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 30) * cooling
        count = max(BATCH, BATCH * 8 // now)  # short strings cost little
        ids = strings(count, now, now, generator)
        first = 1 + 2 * now
        logits = model(input_ids=ids, use_cache=False).logits[:, first:-1:2]
        answers = ids[:, first + 1 :: 2]
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = 0.9 * right + 0.1 * float((logits.argmax(-1) == answers).float().mean())
        if right > 0.9 and now < pairs:
            now, right = min(pairs, max(now + 2, now * 5 // 4)), 0.0
    return model.eval()


def measure(seed: int, steps: int = STEPS, count: int = STRINGS) -> dict[str, float]:
    """Return exactly retrieved values in % for each cache, and its bytes for one string."""
    model = trained(seed, steps)
    ids = strings(count, PAIRS, 1, named_generator(seed, "claims/retrieval/test"))
    found: dict[str, float] = {}
    found["fp"] = retrieved(model, ids, lambda: DynamicCache(config=model.config))[0]
    found["fp8_transformers"] = retrieved(model, ids, lambda: QuantizedCache("fp8", config=model.config))[0]
    compress(model, SETTINGS["normalized"])
    for name, config in SETTINGS.items():
        found[name], last = retrieved(model, ids, lambda config=config: ZipCache(config, 2))  # type: ignore[misc]
        found[f"{name}_bytes"] = last.nbytes / AT_ONCE
        found[f"{name}_ratio"] = last.compression_ratio()
    return found


def retrieved(model: nn.Module, ids: Tensor, make_cache: Any) -> tuple[float, Any]:
    """Return the share of strings in % whose last token is decoded exactly, and the last cache before it decodes."""
    right = 0
    with torch.inference_mode():
        for part in ids.split(AT_ONCE):
            cache = make_cache()
            model(input_ids=part[:, :-2], past_key_values=cache, use_cache=True)
            logits = model(input_ids=part[:, -2:-1], past_key_values=cache, use_cache=True).logits[:, -1]
            right += int((logits.argmax(-1) == part[:, -1]).sum())
    return 100.0 * right / len(ids), cache
