"""A key/value cache in 4 and 2 bits: salient tokens keep more of them (ZipCache; He et al., NeurIPS 2024, arXiv:2405.14256).

    keys     per channel:            k = s_d q + m_d,  range over batch and tokens of a part
    values   channel-separable:      v = c_d (s_t q + m_t),  c_d = sqrt(max |v_d|),  range over all heads of a token

A cache has two parts, the salient tokens and the others, each with its own width and ranges. Attention reads the packed
codes: with p = softmax over all tokens,

    q . k_t = sum_d (q_d s_d) code_td + sum_d q_d m_d,    out_d = c_d (sum_t (p_t s_t) code_td + sum_t p_t m_t)

so no float cache is ever made. A decoding step sees all tokens, whose order therefore does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eff_kernels.checks import FLOATS, check_choice, check_device, check_dtype, check_not_empty, check_shape
from eff_kernels.dispatch import requested
from eff_kernels.kv_quant import library
from eff_kernels.kv_quant.cache import Part, QuantizedKV, dequantize_part, quantize_part

__all__ = ["Part", "QuantizedKV", "kv_attention", "kv_dequantize", "kv_quantize"]

_BITS = (2, 4, 8)


def kv_quantize(keys: Tensor, values: Tensor, salient: Tensor, bits: tuple[int, int] = (4, 2)) -> QuantizedKV:
    """Return the cache of these keys and values. No backward.

    Args:
        keys, values: (batch, heads, length, dim), dim divisible by 4; float16, bfloat16 or float32.
        salient: positions of the salient tokens of each head, (batch, heads, n) int64, 0 <= n <= length, none twice.
        bits: widths of salient tokens and of the others: 2, 4 or 8.

    Returns:
        The packed cache; `nbytes` is what it takes.

    Raises:
        TypeError, ValueError: a dtype, shape, width or position does not fit; NaN or infinity in keys or values.
    """
    requested()
    op = "kv_quantize"
    check_dtype(op, "keys", keys, FLOATS[:3])
    check_dtype(op, "values", values, (keys.dtype,))
    check_dtype(op, "salient", salient, (torch.int64,))
    check_shape(op, "keys", keys, ("batch", "heads", "length", "dim"))
    check_shape(op, "values", values, tuple(keys.shape))
    check_not_empty(op, "keys", keys)
    check_shape(op, "salient", salient, (*keys.shape[:2], "n"))
    check_device(op, "values", values, "keys", keys)
    check_device(op, "salient", salient, "keys", keys)
    length, dim = keys.shape[2:]
    if dim % 4:
        raise ValueError(f"{op}: keys have {dim} channels, expected a multiple of 4, so that codes fill bytes")
    for width in bits:
        check_choice(op, "bits", width, _BITS)
    for name, x in (("keys", keys), ("values", values)):
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{op}: {name} hold NaN or infinity, expected finite numbers")
    chosen = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device)
    if salient.shape[-1] > length or (salient.numel() and not 0 <= int(salient.min()) <= int(salient.max()) < length):
        raise ValueError(f"{op}: salient has positions outside 0 to {length - 1}, or more than there are")
    chosen.scatter_(2, salient, True)
    if int(chosen.sum()) != salient.numel():
        raise ValueError(f"{op}: salient names a position twice, expected each once per head")
    others = (~chosen).nonzero()[:, 2].view(*keys.shape[:2], length - salient.shape[-1])
    channel = values.float().abs().amax((0, 2)).sqrt()  # over both parts
    channel = torch.where(channel > 0, channel, 1.0)
    parts = tuple(
        quantize_part(keys, values, channel, index, width)
        for index, width in zip((salient, others), bits, strict=True)
        if index.shape[-1]
    )
    return QuantizedKV(parts, channel, keys.dtype, length)


def kv_dequantize(cache: QuantizedKV) -> tuple[Tensor, Tensor]:
    """Return keys and values (batch, heads, length, dim) in their order and dtype."""
    requested()
    first = cache.parts[0]
    shape = (*first.index.shape[:2], cache.length, cache.channel.shape[-1])
    keys, values = (torch.empty(shape, dtype=cache.dtype, device=cache.channel.device) for _ in range(2))
    for part in cache.parts:
        place = part.index[..., None].expand(-1, -1, -1, shape[-1])
        for target, found in zip((keys, values), dequantize_part(part, cache.channel), strict=True):
            target.scatter_(2, place, found.to(cache.dtype))
    return keys, values


def kv_attention(
    query: Tensor, cache: QuantizedKV, recent: tuple[Tensor, Tensor] | None = None, scale: float | None = None
) -> Tensor:
    """Return attention of a few queries over the whole cache and over recent tokens in float; softmax in float32.

    Args:
        query: (batch, query heads, queries, dim), query heads a multiple of the cache's (grouped queries: head h reads
            h // (query heads / heads)). All see all tokens.
        cache: what `kv_quantize` made.
        recent: keys and values (batch, heads, tokens, dim) that are not quantized yet.
        scale: of the scores; None: 1 / sqrt(dim).

    Returns:
        Like `query`.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit.
    """
    op = "kv_attention"
    heads, dim = cache.channel.shape
    batch = cache.parts[0].index.shape[0]
    check_dtype(op, "query", query, FLOATS[:3])
    check_shape(op, "query", query, (batch, "query heads", "queries", dim))
    check_not_empty(op, "query", query)
    check_device(op, "query", query, "cache", cache.channel)
    if query.shape[1] % heads:
        raise ValueError(f"{op}: query has {query.shape[1]} heads, expected a multiple of the cache's {heads}")
    scaled = query.float() * (dim**-0.5 if scale is None else scale)
    grouped = scaled.reshape(batch, heads, -1, dim)  # queries of all heads that read the same keys
    found = [library.attend_op(grouped, *part.tensors(), cache.channel, part.bits) for part in cache.parts]
    if recent is not None:
        for name, x in zip(("recent keys", "recent values"), recent, strict=True):
            check_shape(op, name, x, (batch, heads, "tokens", dim))
        if recent[0].shape[2]:
            found.append(_attend_float(grouped, *recent))
    return merge(found).reshape(query.shape).to(query.dtype)


def _attend_float(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scores = query @ keys.float().mT
    largest = scores.amax(-1)
    weights = (scores - largest[..., None]).exp()
    return weights @ values.float(), largest, weights.sum(-1)


def merge(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return attention over all parts from each one's sum of values, largest score and sum of weights."""
    sums, largest, totals = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    factor = (largest - largest.amax(0)).exp()
    return (sums * factor[..., None]).sum(0) / (totals * factor).sum(0)[..., None]
