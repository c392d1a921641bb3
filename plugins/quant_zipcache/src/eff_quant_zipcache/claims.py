"""The paper's claims at desk scale: the quantizers, the score of salience, and a task that needs single tokens.

`quantizers`: 512 tokens of 256 standard normal channels, 8 of them times 10. `planted`: 200 tokens, 20 of which at random
places get more attention from every query that sees them. `retrieval`: see `retrieval.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eff.claims import ClaimRun
from eff.seeding import named_generator
from eff_kernels.kv_quant import kv_dequantize, kv_quantize_parts, quantize
from eff_quant_zipcache.config import ZipCacheConfig
from eff_quant_zipcache.importance import Mask, Probes, all_rows, choose_probes, importance, least
from eff_quant_zipcache.retrieval import measure

GROUP = 32


def quantizers(run: ClaimRun) -> dict[str, list[float]]:
    """Return mean squared errors and numbers of parameters by scheme, width and seed."""
    return run.by_seed("quantizers", _quantizer_errors)


def _quantizer_errors(seed: int) -> dict[str, float]:
    tokens, channels = 512, 256
    generator = named_generator(seed, "claims/quantizers")
    x = torch.randn(tokens, channels, generator=generator)
    x[:, torch.randperm(channels, generator=generator)[:8]] *= 10
    found: dict[str, float] = {}
    for bits in (4, 2):
        found[f"separable_{bits}bit"] = _error(x, _through_cache(x, bits, "channel_separable"))
        found[f"token_{bits}bit"] = _error(x, _through_cache(x, bits, "token"))
        found[f"group{GROUP}_{bits}bit"] = _error(x, by_groups(x, bits))
    found["token_over_separable"] = found["token_4bit"] / found["separable_4bit"]
    found["separable_parameters"] = channels + 2 * tokens
    found[f"group{GROUP}_parameters"] = 2 * tokens * channels // GROUP
    return found


def _error(x: Tensor, found: Tensor) -> float:
    return float((x - found).square().mean())


def _through_cache(x: Tensor, bits: int, scheme: str) -> Tensor:
    """Return values (tokens, channels) as they come back from a cache of this scheme."""
    every = torch.ones(1, 1, len(x), dtype=torch.bool)
    cache = kv_quantize_parts(x[None, None], x[None, None], [(every, bits, bits)], value_scheme=scheme)
    return kv_dequantize(cache)[1][0, 0]


def by_groups(x: Tensor, bits: int) -> Tensor:
    """Return x (tokens, channels) with a range of its own for every GROUP channels of a token."""
    groups = x.reshape(1, 1, -1, GROUP)
    return quantize(groups, bits, by_token=True).dequantize(None).reshape(x.shape)


def planted(run: ClaimRun) -> dict[str, list[float]]:
    """Return the share of planted tokens among the most salient ones, by score and seed."""
    return run.by_seed("planted", planted_recall)


def planted_recall(seed: int, length: int = 200, count: int = 20, boost: float = 1.5) -> dict[str, float]:
    """Return the recall of each score for tokens whose scores are `boost` above standard normal ones."""
    generator = named_generator(seed, "claims/planted")
    logits = torch.randn(length, length, generator=generator)
    where = torch.randperm(length, generator=generator)[:count]
    logits[:, where] += boost
    present = torch.ones(1, length, dtype=torch.bool)
    mask = Mask(present[:, :0], present)
    few = choose_probes(present, 0.05, 0.05, generator)
    settings: dict[str, tuple[Probes, ZipCacheConfig]] = {
        "accumulated": (all_rows(present), ZipCacheConfig(metric="accumulated")),
        "normalized": (all_rows(present), ZipCacheConfig()),
        "probes": (few, ZipCacheConfig()),
        "probes_full": (few, ZipCacheConfig(nnz="full")),
    }
    found = {}
    for name, (probes, config) in settings.items():
        # Identical keys: the scores are the queries themselves.
        score = importance(logits[None, None], torch.eye(length)[None, None], mask, probes, 1.0, config)
        salient = ~least(score, present, 1 - count / length, per_head=True)[0, 0]
        found[name] = float(salient[where].float().mean())
    return found


def retrieval(run: ClaimRun) -> dict[str, list[float]]:
    """Return exactly retrieved values in %, bytes and ratios by cache and seed."""
    return run.by_seed("retrieval", measure)
