"""The paper's claims at desk scale: the quantizers, the score of salience, and a task that needs single tokens.

`quantizers`: 512 tokens of 256 standard normal channels, 8 of them times 10. `planted`: 200 tokens, 20 of which at random
places get more attention from every query that sees them. `retrieval`: see `retrieval.py`. `language`: a Llama of two
layers trained on Python's documentation reads held-out text, half of it through the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eff.claims import ClaimRun
from eff.data import load_data
from eff.models import build_model, make_task, parse_source
from eff.run import Run
from eff.schemas import CORE_TRAINING, TrainOptions
from eff.seeding import named_generator
from eff.session import Plugins
from eff.training import Training
from eff_kernels.kv_quant import kv_dequantize, kv_quantize_parts, quantize
from eff_quant_zipcache.config import ZipCacheConfig
from eff_quant_zipcache.importance import Mask, Probes, all_rows, choose_probes, importance, least
from eff_quant_zipcache.model import compress
from eff_quant_zipcache.report import divergence
from eff_quant_zipcache.retrieval import SETTINGS, measure

GROUP = 32
LENGTH, TRAINED, TESTED = 256, 800, 32
RECIPE = TrainOptions(epochs=2, batch_size=16, optimizer="adamw", lr=5e-3)


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


def language(run: ClaimRun) -> dict[str, list[float]]:
    """Return the divergence from the float cache, perplexity, bytes and ratio by cache and seed."""
    return run.by_seed("language", language_model)


def language_model(seed: int, trained: int = TRAINED, tested: int = TESTED) -> dict[str, float]:
    """Return what each cache does to a language model on held-out text, over the tokens that are read through it."""
    data = load_data(f"corpus?length={LENGTH}&train={trained}&test={tested}&seed={seed}")
    plugins = Plugins()
    run = Run(
        make_task(data.task, plugins), torch.device("cpu"), seed, data, train=RECIPE.over(CORE_TRAINING), training=True
    )
    model = build_model(parse_source("zoo:llama_tiny"), run, plugins)
    Training(model, run, plugins).run_all()
    compress(model.eval(), ZipCacheConfig())
    ids = data.split("test").batch(range(tested))["input_ids"]
    half = LENGTH // 2

    def perplexity(logits: Tensor) -> float:
        pairs = logits[:, half:-1].flatten(0, 1), ids[:, half + 1 :].flatten()
        return float(torch.nn.functional.cross_entropy(*pairs).exp())

    with torch.inference_mode():
        exact = model(input_ids=ids, use_cache=False).logits
        found = {"fp_perplexity": perplexity(exact)}
        for name, config in SETTINGS.items():
            model.zip_config = config  # type: ignore[assignment]
            logits = model(input_ids=ids).logits
            found[name] = 1000 * divergence(exact[:, half:].flatten(0, 1), logits[:, half:].flatten(0, 1))
            found[f"{name}_perplexity"] = perplexity(logits)
            cache = model.make_cache()  # type: ignore[operator]
            model(input_ids=ids[:1], past_key_values=cache)
            found[f"{name}_ratio"] = cache.compression_ratio()
    return found
