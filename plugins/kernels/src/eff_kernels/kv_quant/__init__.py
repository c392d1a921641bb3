"""A key/value cache in 4 and 2 bits: salient tokens keep more of them (ZipCache; He et al., NeurIPS 2024, arXiv:2405.14256).

    keys     per channel:            k = s_d q + m_d,  range over batch and tokens of a part
    values   channel-separable:      v = c_d (s_t q + m_t),  c_d = sqrt(max |v_d|),  range over all heads of a token

A cache has parts, the salient tokens and the others, each with its own widths and ranges. Attention reads the packed
codes: with p = softmax over all tokens,

    q . k_t = sum_d (q_d s_d) code_td + sum_d q_d m_d,    out_d = c_d (sum_t (p_t s_t) code_td + sum_t p_t m_t)

so no float cache is ever made. All queries see all tokens of the cache, whose order therefore does not matter; recent
tokens in float may have a mask. Other schemes (keys by token, values by channel) are stored alike and attended to part
by part in float.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eff_kernels.checks import (
    FLOATS,
    check_choice,
    check_device,
    check_dtype,
    check_finite,
    check_flag,
    check_not_empty,
    check_number,
    check_readable,
    check_shape,
)
from eff_kernels.dispatch import requested
from eff_kernels.kv_quant import cache as storage
from eff_kernels.kv_quant import library
from eff_kernels.kv_quant.cache import (
    SCHEMES,
    Codes,
    Part,
    QuantizedKV,
    channel_factor,
    make_part,
    positions,
)
from eff_kernels.kv_quant.reference import attend_float, finite

__all__ = [
    "Codes",
    "Part",
    "QuantizedKV",
    "kv_attention",
    "kv_dequantize",
    "kv_quantize",
    "kv_quantize_parts",
    "quantize",
]

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
    op = "kv_quantize"
    if not isinstance(bits, (tuple, list)) or len(bits) != 2:
        raise TypeError(f"{op}: bits is {bits!r}, expected two widths")
    _check(op, keys, values, bits)
    check_dtype(op, "salient", salient, (torch.int64,))
    check_shape(op, "salient", salient, (*keys.shape[:2], "n"))
    check_device(op, "salient", salient, "keys", keys)
    length = keys.shape[2]
    if salient.shape[-1] > length or (salient.numel() and not 0 <= int(salient.min()) <= int(salient.max()) < length):
        raise ValueError(f"{op}: salient has positions outside 0 to {length - 1}, or more than there are")
    chosen = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device)
    chosen.scatter_(2, salient, True)
    if int(chosen.sum()) != salient.numel():
        raise ValueError(f"{op}: salient names a position twice, expected each once per head")
    return kv_quantize_parts(keys, values, [(chosen, bits[0], bits[0]), (~chosen, bits[1], bits[1])])


def kv_quantize_parts(
    keys: Tensor,
    values: Tensor,
    parts: Sequence[tuple[Tensor, int, int]],
    key_scheme: str = "channel",
    value_scheme: str = "channel_separable",
) -> QuantizedKV:
    """Return the cache of these keys and values, with any number of parts. No backward.

    Args:
        keys, values: (batch, heads, length, dim), dim divisible by 4; float16, bfloat16 or float32.
        parts: tokens (batch, heads, length) bool, width of their keys, width of their values: 2, 4 or 8. No token is in two
            parts; the heads of a sequence have as many. What is in none (padding) is not stored, has no part in any
            range, and attention does not see it.
        key_scheme, value_scheme: "channel", "token" or "channel_separable".

    Raises:
        TypeError, ValueError: a dtype, shape or width does not fit, parts overlap, NaN or infinity in keys or values.
    """
    requested()
    op = "kv_quantize_parts"
    if not isinstance(parts, (tuple, list)):
        raise TypeError(f"{op}: parts is {type(parts).__name__}, expected a sequence")
    for index, part in enumerate(parts):
        if not isinstance(part, (tuple, list)) or len(part) != 3:
            raise TypeError(f"{op}: parts[{index}] is {part!r}, expected tokens, width of keys, width of values")
    _check(op, keys, values, [width for _, *widths in parts for width in widths])
    for name, scheme in (("key_scheme", key_scheme), ("value_scheme", value_scheme)):
        check_choice(op, name, scheme, SCHEMES)
    covered = torch.zeros(keys.shape[:3], dtype=torch.int64, device=keys.device)
    counts = []
    for mask, _, _ in parts:
        check_dtype(op, "tokens", mask, (torch.bool,))
        check_shape(op, "tokens", mask, tuple(keys.shape[:3]))
        check_device(op, "tokens", mask, "keys", keys)
        covered += mask
        per_head = mask.sum(-1)
        if bool((per_head != per_head[:, :1]).any()):
            raise ValueError(
                f"{op}: the heads of a sequence have different numbers of tokens in a part, expected as many"
            )
        counts.append(per_head[:, 0])
    if bool((covered > 1).any()):
        raise ValueError(f"{op}: a token is in two parts, expected each in one at most")
    kept = covered.bool()
    scaled, channels = [], []
    for x, scheme in ((keys, key_scheme), (values, value_scheme)):
        channel = channel_factor(x, kept) if scheme == "channel_separable" else None
        scaled.append(x if channel is None else x.float() / channel[:, None])
        channels.append(channel)
    by_token = (key_scheme != "channel", value_scheme != "channel")
    made = tuple(
        make_part(scaled[0], scaled[1], mask, count, (key_bits, value_bits), by_token)
        for (mask, key_bits, value_bits), count in zip(parts, counts, strict=True)
        if int(count.max())
    )
    if not made:
        raise ValueError(f"{op}: no part has a token, expected at least one")
    return QuantizedKV(made, channels[0], channels[1], keys.dtype, keys.shape[2])


def _check(op: str, keys: Tensor, values: Tensor, widths: Sequence[int]) -> None:
    check_dtype(op, "keys", keys, FLOATS[:3])
    check_dtype(op, "values", values, (keys.dtype,))
    check_shape(op, "keys", keys, ("batch", "heads", "length", "dim"))
    check_shape(op, "values", values, tuple(keys.shape))
    check_not_empty(op, "keys", keys)
    check_device(op, "values", values, "keys", keys)
    check_readable(op, "keys", keys)
    dim = keys.shape[3]
    if dim % 4:
        raise ValueError(f"{op}: keys have {dim} channels, expected a multiple of 4, so that codes fill bytes")
    for width in widths:
        check_choice(op, "bits", width, _BITS)
    for name, x in (("keys", keys), ("values", values)):
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{op}: {name} hold NaN or infinity, expected finite numbers")


def kv_dequantize(cache: QuantizedKV) -> tuple[Tensor, Tensor]:
    """Return keys and values (batch, heads, length, dim) in their order and dtype; 0 for what is not stored.

    Raises:
        TypeError: `cache` is not what `kv_quantize` makes.
    """
    requested()
    _check_cache("kv_dequantize", "cache", cache)
    shape = cache.shape
    device = cache.parts[0].member.device
    keys, values = (torch.zeros(shape, dtype=cache.dtype, device=device) for _ in range(2))
    for part in cache.parts:
        mask = part.mask(cache.length)
        place = positions(mask, part.tokens)
        stored = mask.gather(2, place)[..., None]  # the places of what a shorter sequence does not have
        place = place[..., None].expand(-1, -1, -1, shape[-1])
        for target, codes, channel in (
            (keys, part.keys, cache.key_channel), (values, part.values, cache.value_channel),
        ):  # fmt: skip
            found = codes.dequantize(channel).to(cache.dtype)
            target.scatter_(2, place, torch.where(stored, found, target.gather(2, place)))
    return keys, values


def kv_attention(
    query: Tensor,
    cache: QuantizedKV | Sequence[QuantizedKV],
    recent: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Return attention of a few queries over the whole cache and over recent tokens in float; softmax in float32.

    Args:
        query: (batch, query heads, queries, dim), query heads a multiple of the cache's (grouped queries: head h reads
            h // (query heads / heads)). All see all tokens of the cache.
        cache: what `kv_quantize` made, or several that follow one another.
        recent: keys and values (batch, heads, tokens, dim) that are not quantized yet, of a dtype that `query` may have.
        scale: of the scores, finite; None: 1 / sqrt(dim).
        visible: which recent tokens a query sees, (batch, queries, tokens) bool; None: all.

    Returns:
        Like `query`; 0 for a query that sees nothing. NaN in it or in what is recent reaches the results that read it.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, there is no cache, or `visible` without `recent`.
    """
    op = "kv_attention"
    caches = _checked_caches(op, cache)
    batch, heads, _, dim = caches[0].shape
    check_dtype(op, "query", query, FLOATS[:3])
    check_shape(op, "query", query, (batch, "query heads", "queries", dim))
    check_not_empty(op, "query", query)
    check_device(op, "query", query, "cache", caches[0].parts[0].member)
    if query.shape[1] % heads:
        raise ValueError(f"{op}: query has {query.shape[1]} heads, expected a multiple of the cache's {heads}")
    if scale is not None:
        check_number(op, "scale", scale)
    _check_recent(op, query, caches[0], recent, visible)
    scaled = query.float() * (dim**-0.5 if scale is None else float(scale))
    grouped = scaled.reshape(batch, heads, -1, dim)  # queries of all heads that read the same keys
    found = [_attend(grouped, item, part) for item in caches for part in item.parts]
    if recent is not None and recent[0].shape[2]:
        if visible is not None:
            visible = visible.repeat(1, query.shape[1] // heads, 1)[:, None]
        found.append(attend_float(grouped, recent[0].float(), recent[1].float(), visible))
    return merge(found).reshape(query.shape).to(query.dtype)


def quantize(x: Tensor, bits: int, by_token: bool, present: Tensor | None = None) -> Codes:
    """Return the codes of x (batch, heads, n, dim): q = round((x - min) / s), s = (max - min) / (2^bits - 1).

    Where all values are equal s is 1.

    Args:
        x: float16, bfloat16 or float32, finite (looked at on the CPU only), not empty; dim * bits a multiple of 8.
        bits: 2, 4 or 8.
        by_token: what shares a range: a token, over all heads, else a channel of a head.
        present: (batch, n) bool; the other tokens have no part in minimum and maximum, and their codes mean nothing.

    Raises:
        TypeError, ValueError: a dtype, shape, device, width or value does not fit.
    """
    op = "quantize"
    check_choice(op, "bits", bits, _BITS)
    check_dtype(op, "x", x, FLOATS[:3])
    check_shape(op, "x", x, ("batch", "heads", "n", "dim"))
    check_not_empty(op, "x", x)
    if x.shape[3] * bits % 8:
        raise ValueError(
            f"{op}: x has {x.shape[3]} channels, expected a multiple of {8 // bits}, so that codes fill bytes"
        )
    check_flag(op, "by_token", by_token)
    if present is not None:
        check_dtype(op, "present", present, (torch.bool,))
        check_shape(op, "present", present, (x.shape[0], x.shape[2]))
        check_device(op, "present", present, "x", x)
    check_finite(op, "x", x)
    return storage.quantize(x, bits, by_token, present)


def _check_cache(op: str, name: str, cache: object) -> None:
    if not isinstance(cache, QuantizedKV):
        raise TypeError(f"{op}: {name} is {type(cache).__name__}, expected what kv_quantize returns")


def _checked_caches(op: str, cache: QuantizedKV | Sequence[QuantizedKV]) -> list[QuantizedKV]:
    """Return the caches in their order; they have one batch, heads, channels and device."""
    caches = list(cache) if isinstance(cache, (list, tuple)) else [cache]
    if not caches:
        raise ValueError(f"{op}: cache is an empty sequence, expected at least one cache")
    for index, one in enumerate(caches):
        _check_cache(op, f"cache[{index}]" if isinstance(cache, (list, tuple)) else "cache", one)
        batch, heads, _, dim = one.shape
        first = caches[0].shape
        if (batch, heads, dim) != (first[0], first[1], first[3]):
            raise ValueError(
                f"{op}: cache[{index}] has shape {one.shape}, expected ({first[0]}, {first[1]}, length, {first[3]})"
            )
        check_device(op, f"cache[{index}]", one.parts[0].member, "cache[0]", caches[0].parts[0].member)
    return caches


def _check_recent(
    op: str, query: Tensor, cache: QuantizedKV, recent: tuple[Tensor, Tensor] | None, visible: Tensor | None
) -> None:
    """Raise where what is not quantized yet does not fit the query and the cache."""
    if recent is None:
        if visible is not None:
            raise ValueError(f"{op}: visible is given without recent, which it is the mask of; expected both")
        return
    if not isinstance(recent, (tuple, list)) or len(recent) != 2:
        raise TypeError(f"{op}: recent is {type(recent).__name__}, expected the pair of keys and values")
    batch, heads, _, dim = cache.shape
    for name, x in zip(("recent keys", "recent values"), recent, strict=True):
        check_dtype(op, name, x, FLOATS[:3])
        check_shape(op, name, x, (batch, heads, "tokens", dim))
        check_device(op, name, x, "query", query)
    check_shape(op, "recent values", recent[1], tuple(recent[0].shape))
    if visible is not None:
        check_dtype(op, "visible", visible, (torch.bool,))
        check_shape(op, "visible", visible, (batch, query.shape[2], recent[0].shape[2]))
        check_device(op, "visible", visible, "query", query)


def _attend(query: Tensor, cache: QuantizedKV, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Return attention over one part; on its codes where the schemes allow it."""
    if part.is_packed_attention and cache.key_channel is None:
        bits = part.keys.bits, part.values.bits
        found: tuple[Tensor, Tensor, Tensor] = library.attend_op(
            query, *part.tensors(), cache.value_channel, part.counts, *bits
        )
        return found
    present = part.present()
    keys, values = part.keys.dequantize(cache.key_channel), part.values.dequantize(cache.value_channel)
    return attend_float(query, keys, values, None if present is None else present[:, None, None])


def merge(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return attention over all parts from each one's sum of values, largest score and sum of weights."""
    sums, largest, totals = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    factor = (largest - finite(largest.amax(0))).exp()
    total = (totals * factor).sum(0)
    return (sums * factor[..., None]).sum(0) / torch.where(total > 0, total, 1.0)[..., None]
