"""kv_quant against the card's formulas in numpy, softmax attention in float64, and the bytes as computed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eff_kernels.kv_quant import cpu, kv_attention, kv_dequantize, kv_quantize, kv_quantize_parts, quantize, reference
from eff_kernels.kv_quant.cache import pack, unpack
from eff_kernels.kv_quant.library import attend_op
from eff_kernels.packing import pack_bits


@pytest.fixture(params=["reference", "cpu"])
def path(request, monkeypatch):
    monkeypatch.setenv("EFF_KERNELS", request.param)
    return request.param


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some(batch, heads, length, count, seed=0):
    """Return `count` positions of each head."""
    return torch.rand(batch, heads, length, generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., :count]


def made(batch=2, heads=3, length=20, dim=8, count=12, bits=(4, 2), dtype=torch.float32):
    keys, values = (
        random(batch, heads, length, dim, dtype=dtype),
        random(batch, heads, length, dim, seed=1, dtype=dtype),
    )
    salient = some(batch, heads, length, count)
    return keys, values, salient, kv_quantize(keys, values, salient, bits)


def by_card(keys, values, salient, bits):
    """The card's quantizers in numpy, one token and one channel after another."""
    keys, values = keys.double().numpy(), values.double().numpy()
    batch, heads, length, dim = keys.shape
    channel = np.sqrt(np.abs(values).max(axis=(0, 2)))
    out_k, out_v = np.zeros_like(keys), np.zeros_like(values)
    for part, width in enumerate(bits):
        index = [[sorted(set(range(length)) - set(salient[b, h].tolist())) if part else sorted(salient[b, h].tolist())
                  for h in range(heads)] for b in range(batch)]  # fmt: skip
        n, levels = len(index[0][0]), 2**width - 1
        for h in range(heads):
            for d in range(dim):
                column = np.array([keys[b, h, t, d] for b in range(batch) for t in index[b][h]])
                if n:
                    step = (column.max() - column.min()) / levels or 1.0
                    for b in range(batch):
                        for t in index[b][h]:
                            out_k[b, h, t, d] = np.round((keys[b, h, t, d] - column.min()) / step) * step + column.min()
        for b in range(batch):
            for i in range(n):
                row = np.concatenate([values[b, h, index[b][h][i]] / channel[h] for h in range(heads)])
                step = (row.max() - row.min()) / levels or 1.0
                for h in range(heads):
                    t = index[b][h][i]
                    code = np.round((values[b, h, t] / channel[h] - row.min()) / step)
                    out_v[b, h, t] = channel[h] * (code * step + row.min())
    return torch.from_numpy(out_k), torch.from_numpy(out_v)


@pytest.mark.parametrize("bits", [(4, 2), (8, 4), (2, 2)])
@pytest.mark.parametrize("count", [0, 7, 20])
def test_a_cache_is_quantized_as_the_card_says(bits, count):
    keys, values, salient, cache = made(count=count, bits=bits)
    for found, expected in zip(kv_dequantize(cache), by_card(keys, values, salient, bits), strict=True):
        # A value in the middle of two levels may fall to either in float32; no value here is.
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_salient_tokens_are_closer_to_what_they_were():
    keys, _, salient, cache = made(length=200, count=100)
    error = (kv_dequantize(cache)[0] - keys).abs().mean(-1)
    is_salient = torch.zeros(2, 3, 200, dtype=torch.bool).scatter_(2, salient, True)
    assert float(error[is_salient].mean()) < 0.5 * float(error[~is_salient].mean())


@pytest.mark.parametrize(("length", "dim", "count"), [(20, 8, 12), (33, 16, 0), (7, 4, 7), (50, 64, 30)])
def test_the_bytes_are_those_computed(length, dim, count):
    batch, heads = 2, 3
    cache = made(batch, heads, length, dim, count)[3]
    codes = 2 * batch * heads * dim * (count * 4 + (length - count) * 2) // 8
    parts = len(cache.parts)
    parameters = heads * dim + parts * 2 * heads * dim + 2 * batch * length  # channel; keys; values
    member = parts * batch * heads * math.ceil(length / 8)  # a bit for each position
    assert cache.nbytes == codes + 4 * parameters + member


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_packed_as_all_others(bits):
    codes = torch.randint(0, 2**bits, (3, 5, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(pack(codes, bits).flatten(), pack_bits(codes, bits))
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


def attention(query, keys, values, scale=None):
    """Softmax attention in float64; grouped queries."""
    query, keys, values = (x.double() for x in (query, keys, values))
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    return torch.softmax(query @ keys.mT * (query.shape[-1] ** -0.5 if scale is None else scale), -1) @ values


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("length", "count"), [(1, 0), (1, 1), (20, 12), (300, 100), (257, 0), (600, 600)])
def test_attention_is_that_over_the_dequantized_cache(path, length, count, group):
    cache = made(length=length, count=count)[3]
    query = random(2, 3 * group, 2, 8, seed=2)
    expected = attention(query, *kv_dequantize(cache))
    torch.testing.assert_close(kv_attention(query, cache).double(), expected, rtol=1e-4, atol=1e-5)


def test_recent_tokens_and_a_scale_count(path):
    cache = made()[3]
    query, recent = random(2, 6, 1, 8, seed=2), (random(2, 3, 5, 8, seed=3), random(2, 3, 5, 8, seed=4))
    joined = [torch.cat(pair, 2) for pair in zip(kv_dequantize(cache), recent, strict=True)]
    found = kv_attention(query, cache, recent, scale=0.7)
    torch.testing.assert_close(found.double(), attention(query, *joined, scale=0.7), rtol=1e-4, atol=1e-5)
    none = tuple(x[:, :, :0] for x in recent)
    assert torch.equal(kv_attention(query, cache, none), kv_attention(query, cache))


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 40), block=st.integers(1, 50), bits=st.sampled_from([2, 4, 8]), factor=st.sampled_from([1.0, 100.0]),
    seed=st.integers(0, 50),
)  # fmt: skip
def test_blocks_of_any_size_give_the_reference(length, block, bits, factor, seed):
    """Also where scores are so large that the softmax is nearly a maximum."""
    keys, values = random(1, 2, length, 8, seed=seed), random(1, 2, length, 8, seed=seed + 1)
    part = kv_quantize(keys, values, some(1, 2, length, length), (bits, bits)).parts[0]
    counts = torch.tensor([seed % (length + 1)], dtype=torch.int32) if seed % 2 else None
    query = factor * random(1, 2, 3, 8, seed=seed + 2)
    arguments = (query, *part.tensors(), torch.rand(2, 8) + 0.5, counts, bits, bits)
    before = cpu.BLOCK
    cpu.BLOCK = block
    try:
        own = cpu.attend(*arguments)
    finally:
        cpu.BLOCK = before
    for found, expected in zip(own, reference.attend(*arguments), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_in_half_precision(dtype):
    cache = made(dtype=dtype)[3]
    query = random(2, 3, 1, 8, seed=2, dtype=dtype)
    found = kv_attention(query, cache)
    assert found.dtype == dtype and kv_dequantize(cache)[0].dtype == dtype
    torch.testing.assert_close(found.double(), attention(query, *kv_dequantize(cache)), rtol=2e-2, atol=2e-2)


def test_channels_of_zeros_and_equal_tokens_stay_finite():
    keys = torch.ones(1, 1, 6, 4)
    values = torch.zeros(1, 1, 6, 4)
    cache = kv_quantize(keys, values, some(1, 1, 6, 3))
    found_k, found_v = kv_dequantize(cache)
    assert torch.equal(found_k, keys) and torch.equal(found_v, values)


def test_the_operator_is_registered_properly():
    keys, values, _, cache = made()
    for counts in (None, torch.tensor([12, 5], dtype=torch.int32)):
        arguments = (random(2, 3, 2, 8), *cache.parts[0].tensors(), cache.value_channel, counts, 4, 4)
        torch.library.opcheck(attend_op, arguments)


def test_it_works_under_compile():
    cache = made()[3]
    query = random(2, 6, 1, 8, seed=2)
    compiled = torch.compile(lambda q: kv_attention(2 * q, cache), backend="aot_eager")
    torch.testing.assert_close(compiled(query), kv_attention(2 * query, cache))


def test_padding_is_not_stored_has_no_part_in_ranges_and_is_not_seen(path):
    """A sequence of 13 tokens behind 7 of padding, beside one of 20, against each alone; keys have one sequence's range."""
    keys, values = random(2, 3, 20, 8), random(2, 3, 20, 8, seed=1)
    keys[0] = keys[1]  # the same range whether alone or together
    values[0] = values[1]
    keys[1, :, :7] = values[1, :, :7] = 1e6
    present = torch.ones(2, 3, 20, dtype=torch.bool)
    present[1, :, :7] = False
    high = present & (torch.arange(20) % 3 == 0)
    cache = kv_quantize_parts(keys, values, [(high, 4, 2), (present & ~high, 2, 2)])
    found_k, found_v = kv_dequantize(cache)
    assert float(found_k[1, :, :7].abs().max()) == float(found_v[1, :, :7].abs().max()) == 0.0
    assert float(found_k.abs().max()) < 10
    query, recent = random(2, 6, 2, 8, seed=2), (random(2, 3, 3, 8, seed=3), random(2, 3, 3, 8, seed=4))
    visible = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool).expand(2, 2, 3)
    found = kv_attention(query, cache, recent, visible=visible)
    for sequence, first in ((0, 0), (1, 7)):
        for row in range(2):
            pick = slice(sequence, sequence + 1)
            k, v = (
                torch.cat([x[pick, :, first:], y[pick, :, : 2 + row]], 2)
                for x, y in zip((found_k, found_v), recent, strict=True)
            )
            expected = attention(query[pick, :, row : row + 1], k, v)
            torch.testing.assert_close(found[pick, :, row : row + 1].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key_scheme", ["channel", "token", "channel_separable"])
@pytest.mark.parametrize("value_scheme", ["channel", "token", "channel_separable"])
def test_every_scheme_attends_to_what_it_dequantizes_to(key_scheme, value_scheme, path):
    keys, values = random(2, 3, 30, 8), random(2, 3, 30, 8, seed=1)
    high = torch.arange(30).expand(2, 3, 30) % 2 == 0
    cache = kv_quantize_parts(keys, values, [(high, 8, 4), (~high, 8, 8)], key_scheme, value_scheme)
    found_k, found_v = kv_dequantize(cache)
    assert float((found_k - keys).abs().max()) < 0.03  # 256 levels over a range of about 6
    query = random(2, 3, 2, 8, seed=2)
    torch.testing.assert_close(
        kv_attention(query, cache).double(), attention(query, found_k, found_v), rtol=1e-4, atol=1e-5
    )


def test_caches_that_follow_one_another_are_attended_to_together(path):
    first, second = made()[3], made(length=33, count=5)[3]
    query = random(2, 3, 1, 8, seed=2)
    joined = [torch.cat(pair, 2) for pair in zip(kv_dequantize(first), kv_dequantize(second), strict=True)]
    found = kv_attention(query, [first, second])
    torch.testing.assert_close(found.double(), attention(query, *joined), rtol=1e-4, atol=1e-5)


def test_sequences_of_a_batch_can_be_chosen_anew():
    keys, values = random(3, 2, 20, 8), random(3, 2, 20, 8, seed=1)
    present = torch.arange(20) >= torch.tensor([0, 4, 9])[:, None, None].expand(3, 2, 1)
    cache = kv_quantize_parts(keys, values, [(present, 4, 4)])
    order = torch.tensor([2, 0, 0])
    for found, expected in zip(kv_dequantize(cache.select(order)), kv_dequantize(cache), strict=True):
        assert torch.equal(found, expected[order])


def test_parts_that_overlap_or_differ_between_heads_are_refused():
    x, every = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, dtype=torch.bool)
    uneven = every.clone()
    uneven[0, 0, 0] = False
    for parts, message in (
        ([(every, 4, 4), (every, 2, 2)], "a token is in two parts"),
        ([(uneven, 4, 4)], "heads of a sequence have different numbers of tokens"),
        ([(~every, 4, 4)], "no part has a token"),
    ):
        with pytest.raises(ValueError, match=message):
            kv_quantize_parts(x, x, parts)
    with pytest.raises(ValueError, match="key_scheme is 'group', expected one of"):
        kv_quantize_parts(x, x, [(every, 4, 4)], "group")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": torch.ones(1, 1, 3, 4).double()}, TypeError, "kv_quantize: keys is float64, expected float32"),
        ({"values": torch.ones(1, 1, 3, 8)}, ValueError, r"values has shape \(1, 1, 3, 8\), expected \(1, 1, 3, 4\)"),
        (
            {"keys": torch.ones(1, 1, 3, 6), "values": torch.ones(1, 1, 3, 6)},
            ValueError,
            "6 channels, expected a multiple of 4",
        ),
        ({"keys": torch.ones(1, 1, 0, 4), "values": torch.ones(1, 1, 0, 4)}, ValueError, "keys is empty"),
        ({"values": torch.full((1, 1, 3, 4), math.nan)}, ValueError, "values hold NaN or infinity"),
        ({"salient": torch.tensor([[[0, 3]]])}, ValueError, "salient has positions outside 0 to 2"),
        ({"salient": torch.tensor([[[1, 1]]])}, ValueError, "salient names a position twice"),
        ({"salient": torch.tensor([[0, 1]])}, ValueError, r"salient has shape \(1, 2\), expected \(1, 1, n\)"),
        ({"salient": torch.tensor([[[0.5]]])}, TypeError, "salient is float32, expected int64"),
        ({"bits": (4, 3)}, ValueError, "bits is 3, expected one of 2, 4, 8"),
        ({"bits": (4, 2.0)}, ValueError, "bits is 2.0, expected one of 2, 4, 8"),
        ({"bits": 4}, TypeError, "kv_quantize: bits is 4, expected two widths"),
        ({"bits": (4, 2, 2)}, TypeError, r"bits is \(4, 2, 2\), expected two widths"),
        (
            {name: torch.ones(1, 1, 3, 4, device="meta") for name in ("keys", "values")},
            ValueError,
            "salient is on meta|keys is on meta, expected a device that holds values",
        ),
    ],
)
def test_a_cache_that_cannot_be_made_is_refused(change, error, message):
    given = {"keys": torch.ones(1, 1, 3, 4), "values": torch.ones(1, 1, 3, 4), "salient": torch.tensor([[[0, 2]]])}
    with pytest.raises(error, match=message):
        kv_quantize(**{**given, **change})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (None, "parts is NoneType, expected a sequence"),
        (
            [(torch.ones(1, 1, 3, dtype=torch.bool), 4)],
            r"parts\[0\] is .*, expected tokens, width of keys, width of values",
        ),
        ([(torch.ones(1, 1, 3), 4, 4)], "tokens is float32, expected bool"),
        ([None], r"parts\[0\] is None, expected tokens"),
    ],
)
def test_parts_that_are_none_are_refused(parts, message):
    x = torch.ones(1, 1, 3, 4)
    with pytest.raises(TypeError, match=f"kv_quantize_parts: {message}"):
        kv_quantize_parts(x, x, parts)


def recent(keys=None, values=None):
    """Return a pair that fits `made`, with one or both replaced."""
    fits = torch.ones(2, 3, 5, 8)
    return {"recent": (fits if keys is None else keys, fits if values is None else values)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.ones(2, 4, 1, 8)}, ValueError, "query has 4 heads, expected a multiple of the cache's 3"),
        (
            {"query": torch.ones(2, 3, 1, 4)},
            ValueError,
            r"query has shape \(2, 3, 1, 4\), expected \(2, query heads, queries, 8\)",
        ),
        ({"query": torch.ones(2, 3, 0, 8)}, ValueError, "query is empty"),
        ({"query": None}, TypeError, "query is NoneType, expected a tensor"),
        ({"cache": None}, TypeError, "cache is NoneType, expected what kv_quantize returns"),
        ({"cache": []}, ValueError, "cache is an empty sequence, expected at least one cache"),
        ({"cache": [None]}, TypeError, r"cache\[0\] is NoneType, expected what kv_quantize returns"),
        (
            {"cache": [made()[3], made(heads=4)[3]]},
            ValueError,
            r"cache\[1\] has shape .*, expected \(2, 3, length, 8\)",
        ),
        (recent(torch.ones(2, 1, 5, 8)), ValueError, r"recent keys has shape \(2, 1, 5, 8\)"),
        (recent(values=torch.ones(2, 3, 4, 8)), ValueError, r"recent values has shape .*, expected \(2, 3, 5, 8\)"),
        (recent(torch.ones(2, 3, 5, 8).int()), TypeError, "recent keys is int32, expected float32, float16, bfloat16"),
        (recent(values=torch.ones(2, 3, 5, 8, device="meta")), ValueError, "recent values is on meta, query on cpu"),
        (recent(values="v"), TypeError, "recent values is str, expected a tensor"),
        ({"recent": torch.ones(2, 3, 5, 8)}, TypeError, "recent is Tensor, expected the pair of keys and values"),
        ({"recent": (torch.ones(2, 3, 5, 8),)}, TypeError, "recent is tuple, expected the pair of keys and values"),
        ({"scale": math.nan}, ValueError, "scale is nan, expected a finite number"),
        ({"scale": torch.ones(3)}, TypeError, r"scale is tensor\(.*\), expected a number"),
        ({"visible": torch.ones(2, 1, 5, dtype=torch.bool)}, ValueError, "visible is given without recent"),
        ({**recent(), "visible": torch.ones(2, 1, 5)}, TypeError, "visible is float32, expected bool"),
        (
            {**recent(), "visible": torch.ones(2, 1, 4, dtype=torch.bool)},
            ValueError,
            r"visible has shape \(2, 1, 4\), expected \(2, 1, 5\)",
        ),
        (
            {**recent(), "visible": torch.ones(2, 1, 5, dtype=torch.bool, device="meta")},
            ValueError,
            "visible is on meta, query on cpu",
        ),
    ],
)
def test_what_cannot_be_attended_to_is_refused(change, error, message):
    with pytest.raises(error, match=f"kv_attention: {message}"):
        kv_attention(**{"query": torch.ones(2, 3, 1, 8), "cache": made()[3], **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "x is NoneType, expected a tensor"),
        ({"x": torch.ones(1, 2, 3, 4).int()}, TypeError, "x is int32, expected float32"),
        ({"x": torch.ones(2, 3, 4)}, ValueError, r"x has shape \(2, 3, 4\), expected \(batch, heads, n, dim\)"),
        ({"x": torch.ones(1, 2, 0, 4)}, ValueError, "x is empty"),
        (
            {"x": torch.ones(1, 2, 3, 5)},
            ValueError,
            "x has 5 channels, expected a multiple of 2, so that codes fill bytes",
        ),
        (
            {"x": torch.full((1, 2, 3, 4), math.nan)},
            ValueError,
            "x has values from nan to nan, expected finite numbers",
        ),
        ({"bits": 3}, ValueError, "bits is 3, expected one of 2, 4, 8"),
        ({"by_token": 1}, TypeError, "by_token is 1, expected True or False"),
        ({"present": torch.ones(1, 3)}, TypeError, "present is float32, expected bool"),
        ({"present": torch.ones(1, 2, dtype=torch.bool)}, ValueError, r"present has shape \(1, 2\), expected \(1, 3\)"),
    ],
)
def test_what_cannot_be_quantized_is_refused(change, error, message):
    with pytest.raises(error, match=f"quantize: {message}"):
        quantize(**{"x": torch.ones(1, 2, 3, 4), "bits": 4, "by_token": True, **change})


def test_a_cache_is_needed_to_dequantize():
    with pytest.raises(TypeError, match="kv_dequantize: cache is list, expected what kv_quantize returns"):
        kv_dequantize([])


@pytest.mark.parametrize(
    ("sequences", "error", "message"),
    [
        ([0], TypeError, "sequences is list, expected a tensor of int64"),
        (torch.tensor([0.0]), TypeError, "sequences is float32, expected int64"),
        (torch.tensor(0), ValueError, r"sequences has shape \(\), expected \(k,\)"),
        (torch.tensor([0, 2]), ValueError, "sequences has values from 0 to 2, expected 0 to 1"),
    ],
)
def test_sequences_that_are_not_there_are_refused(sequences, error, message):
    with pytest.raises(error, match=f"QuantizedKV.select: {message}"):
        made()[3].select(sequences)
