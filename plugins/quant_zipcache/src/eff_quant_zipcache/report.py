"""What is reported of a model with a compressed cache: bytes, distance to the float cache, and the salience found."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eff.data import Data, move_batch
from eff.modes import eval_mode
from eff.run import Run
from eff.schemas import Metric, Metrics
from eff_quant_zipcache.cache import ZipCache
from eff_quant_zipcache.model import Compressed

SAMPLES = 16


def describe(model: Compressed, data: Data, run: Run) -> Metrics:
    """Measure on the first test windows, read as `Compressed` reads them.

    Returns:
        cache_bytes of a window with the newest tokens in float, what 16-bit floats take over that (ratio_with_recent)
        and over the bytes of the compressed tokens alone (compression_ratio), mean KL divergence of the next-token
        distribution from that with a float cache over the tokens that were read through the compressed one, and the
        share of salient tokens of the prompt that the full attention matrix finds salient too.
    """
    split = data.split("test")
    batch = move_batch(split.batch(range(min(SAMPLES, len(split)))), run.device)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert isinstance(model, nn.Module)
    with eval_mode(model), torch.inference_mode():
        exact = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        output = model(input_ids=ids, attention_mask=mask)
        first = model.steps(ids.shape[1])[0][1]
        prompt = model.make_cache()
        for layer in prompt.layers:
            layer.agreement = []
        model(input_ids=ids[:, :first], attention_mask=mask[:, :first], past_key_values=prompt)
    cache: ZipCache = output.past_key_values
    agreement = [value for layer in prompt.layers for value in layer.agreement or ()]
    values = {
        "cache_bytes": Metric(value=cache.nbytes / len(ids), unit="B", better="lower"),
        "compression_ratio": Metric(value=prompt.compression_ratio(), unit="x", better="higher"),
        "ratio_with_recent": Metric(value=cache.compression_ratio(), unit="x", better="higher"),
        "salience_recall": Metric(value=100.0 * sum(agreement) / max(1, len(agreement)), unit="%", better="higher"),
    }
    through = mask[:, first:].bool()
    if bool(through.any()):
        kl = divergence(exact[:, first:][through], output.logits[:, first:][through])
        values["cache_kl"] = Metric(value=kl, unit="nats", better="lower")
    return Metrics(values=values)


def divergence(exact: Tensor, found: Tensor) -> float:
    """Return the mean of KL(softmax(exact) || softmax(found)) over rows of logits (n, vocabulary), in nats."""
    p, q = exact.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
