"""quant_zipcache: salience against a float64 loop, the cache against decoding by hand, models, files, bad input."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("transformers", reason="needs transformers (eff-core[text])")

from transformers import (  # noqa: E402
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from eff.errors import ConfigError, DataError, Problems, UnsupportedModelError  # noqa: E402
from eff.options import check_config  # noqa: E402
from eff.runner import apply  # noqa: E402
from eff.schemas import MethodUse, Recipe  # noqa: E402
from eff.use import UseRequest, evaluate, export_model, predict  # noqa: E402
from eff_quant_zipcache import claims, retrieval  # noqa: E402
from eff_quant_zipcache.attention import zip_attention  # noqa: E402
from eff_quant_zipcache.cache import ZipCache, ZipLayer  # noqa: E402
from eff_quant_zipcache.config import ZipCacheConfig  # noqa: E402
from eff_quant_zipcache.importance import Mask, Probes, choose_probes, importance, least  # noqa: E402
from eff_quant_zipcache.model import compress  # noqa: E402
from eff_quant_zipcache.report import divergence  # noqa: E402
from eff_quant_zipcache.storage import load_cache, save_cache  # noqa: E402

EFF_PLUGIN = "quant_zipcache"
VOCABULARY = 40


def test_contract(eff_contract_check):
    eff_contract_check()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def llama(dim=8, kv_heads=2, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4 * dim, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=dim, max_position_embeddings=256, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


MODELS = {"Llama, grouped queries": llama, "Llama, one key head": lambda: llama(kv_heads=1), "GPT-2": gpt2}
PRECISE = ZipCacheConfig(bits_salient=8, bits_other=8)


def ids(batch=2, length=30, seed=0):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


# --- salience


def by_loop(query, keys, visible, rows, used, scale, config):
    """The card's score in float64, one probe and one token after another."""
    query, keys = query.double().numpy(), keys.double().numpy()
    batch, heads, length, _ = keys.shape
    group = query.shape[1] // heads
    score = np.zeros((batch, heads, length))
    for b in range(batch):
        nnz = np.zeros(length)
        for n in range(rows.shape[1]):
            r = int(rows[b, n])
            if used[b, n]:
                nnz += visible[b, r].numpy()
                for q in range(query.shape[1]):
                    seen = [i for i in range(length) if visible[b, r, i]]
                    exponents = np.array([query[b, q, r] @ keys[b, q // group, i] * scale for i in seen])
                    weights = np.exp(exponents - exponents.max())
                    score[b, q // group, seen] += weights / weights.sum()
        if config.nnz == "full":
            nnz = visible[b].sum(0).numpy().astype(float)
        if config.metric == "normalized":
            with np.errstate(divide="ignore", invalid="ignore"):
                score[b] = np.where(nnz > 0, score[b] / nnz, np.inf)
    return torch.from_numpy(score)


@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(1, 12), padding=st.integers(0, 5), old=st.integers(0, 4), seed=st.integers(0, 99),
    metric=st.sampled_from(["normalized", "accumulated"]), nnz=st.sampled_from(["probe", "full"]),
)  # fmt: skip
def test_the_score_is_that_of_the_equations(length, padding, old, seed, metric, nnz):
    """Two sequences, the second padded on the left, grouped queries, some tokens compressed before."""
    config = ZipCacheConfig(metric=metric, nnz=nnz)
    present = torch.ones(2, length, dtype=torch.bool)
    present[1, : min(padding, length - 1)] = False
    stored = torch.ones(2, old, dtype=torch.bool)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = causal & present[:, None] & present[..., None]
    generator = torch.Generator().manual_seed(seed)
    probes = choose_probes(present, 0.3, 0.3, generator)
    query, keys = random(2, 4, length, 4, seed=seed), random(2, 2, old + length, 4, seed=seed + 1)
    found = importance(query, keys, Mask(stored, present, visible), probes, 0.5, config)
    whole = torch.cat([stored[:, None] & present[..., None], visible], 2)
    expected = by_loop(query, keys, whole, probes.rows, probes.used, 0.5, config)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_the_plain_causal_mask_is_that_of_a_square():
    present = torch.ones(1, 6, dtype=torch.bool)
    square = Mask(present[:, :2], present, torch.ones(1, 6, 6, dtype=torch.bool).tril())
    plain = Mask(present[:, :2], present)
    rows = torch.tensor([[5, 0, 3, 3]])
    assert torch.equal(plain.rows(rows), square.rows(rows))
    assert torch.equal(plain.per_column(), square.per_column())
    assert plain.per_column().tolist() == [[6, 6, 6, 5, 4, 3, 2, 1]]


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=3), recent=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    drawn=st.sampled_from([0.05, 0.5, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_probes_are_tokens_that_exist_the_newest_and_some_earlier_ones(counts, recent, drawn, seed):
    length = max(*counts, 1)
    present = torch.arange(length) >= length - torch.tensor(counts)[:, None]
    probes = choose_probes(present, recent, drawn, torch.Generator().manual_seed(seed))
    for count, rows, used in zip(counts, probes.rows, probes.used, strict=True):
        chosen = rows[used].tolist()
        newest = 0 if recent == 0 else min(count, max(1, int(recent * count)))
        assert chosen[:newest] == [length - 1 - i for i in range(newest)]
        earlier = count - newest
        assert len(chosen) == newest + (min(count, max(1, int(drawn * count))) if earlier else 0)
        assert all(length - count <= row < length - newest for row in chosen[newest:])


def test_a_prompt_of_one_token_asks_that_token():
    probes = choose_probes(torch.ones(1, 1, dtype=torch.bool), 0.05, 0.05, torch.Generator())
    assert probes.rows[probes.used].tolist() == [0]


def test_a_token_that_no_probe_sees_is_salient():
    present = torch.ones(1, 5, dtype=torch.bool)
    probes = Probes(torch.tensor([[2]]), torch.tensor([[True]]))
    score = importance(random(1, 1, 5, 4), random(1, 1, 5, 4), Mask(present[:, :0], present), probes, 1.0, PRECISE)
    assert score[0, 0].isinf().tolist() == [False, False, False, True, True]


def test_the_least_salient_are_int_of_the_share_per_head_without_padding():
    score = torch.tensor([[[0.5, 0.1, 0.4, 0.2, 0.3], [0.3, 0.2, 0.3, 0.4, 0.5]]]).repeat(2, 1, 1)
    present = torch.tensor([[True] * 5, [False, False, True, True, True]])
    assert least(score, present, 0.5, per_head=True).int().tolist() == [
        [[0, 1, 0, 1, 0], [1, 1, 0, 0, 0]],  # int(2.5) of five
        [[0, 0, 0, 1, 0], [0, 0, 1, 0, 0]],  # int(1.5) of three
    ]
    assert (
        least(score, present, 0.5, per_head=False)[0].int().tolist() == [[0, 1, 0, 1, 0]] * 2
    )  # means .4 .15 .35 .3 .4
    assert int(least(score, present, 0.0, True).sum()) == 0
    assert torch.equal(least(score, present, 1.0, True), present[:, None].expand(2, 2, 5))


# --- the cache


def decode_one_by_one(model, text, mask, first, config):
    """Prefill, then token after token, as generation does."""
    cache = ZipCache(config, 2)
    logits = [model(input_ids=text[:, :first], attention_mask=mask[:, :first], past_key_values=cache).logits]
    for end in range(first + 1, text.shape[1] + 1):
        step = {"input_ids": text[:, end - 1 : end], "attention_mask": mask[:, :end]}
        logits.append(model(**step, past_key_values=cache).logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("requantize_old", [False, True])
@pytest.mark.parametrize("padding", [0, 7])
@torch.inference_mode()
def test_reading_in_steps_is_decoding_one_by_one(requantize_old, padding):
    config = ZipCacheConfig(streaming_gap=9, requantize_old=requantize_old)
    model = compress(llama(), config)
    text, mask = ids(length=45), torch.ones(2, 45, dtype=torch.long)
    mask[1, :padding] = 0
    output = model(input_ids=text, attention_mask=mask)
    expected, cache = decode_one_by_one(model, text, mask, 22, config)
    torch.testing.assert_close(output.logits[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.logits[1, padding:], expected[1, padding:], rtol=1e-4, atol=1e-4)
    assert output.past_key_values.nbytes < cache.nbytes + 2 * 45 * 45  # the mask of the last step may be kept
    layer = output.past_key_values.layers[0]
    assert len(layer.segments) == (1 if requantize_old else 3)
    assert layer.length == 45 and layer.keys.shape[2] == 5  # 22, 9, 9 and 5 in float


@torch.inference_mode()
def test_a_decoding_step_is_attention_over_the_dequantized_cache():
    """By hand: rotate nothing, attend in float64 to what kv_dequantize gives and to the new token."""
    layer = ZipLayer(ZipCacheConfig())
    query, keys, values = random(2, 4, 40, 8), random(2, 2, 40, 8, seed=1), random(2, 2, 40, 8, seed=2)
    module = nn.Module()
    module.num_key_value_groups = 2
    noted, _ = layer.update(keys, values)
    first, _ = zip_attention(module, query, noted, values, None)
    exact = torch.softmax(
        (query @ keys.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(
            ~torch.ones(40, 40, dtype=torch.bool).tril(), -torch.inf
        ),
        -1,
    ) @ values.repeat_interleave(2, 1)
    torch.testing.assert_close(first, exact.transpose(1, 2), rtol=1e-4, atol=1e-5)  # the prompt is exact
    old_k, old_v = layer.dequantized()
    assert 0.01 < float((old_k - keys).abs().max()) < 1.5
    new_q, new_k, new_v = random(2, 4, 1, 8, seed=3), random(2, 2, 1, 8, seed=4), random(2, 2, 1, 8, seed=5)
    noted, _ = layer.update(new_k, new_v)
    found, _ = zip_attention(module, new_q, noted, new_v, None)
    k, v = (torch.cat(pair, 2).double().repeat_interleave(2, 1) for pair in ((old_k, new_k), (old_v, new_v)))
    expected = torch.softmax(new_q.double() @ k.mT * 8**-0.5, -1) @ v
    torch.testing.assert_close(found.double(), expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


def filled(config, length=50, batch=2, heads=2, dim=8):
    """Return a layer that read a prompt of random states."""
    layer = ZipLayer(config)
    layer.update(random(batch, heads, length, dim), random(batch, heads, length, dim, seed=1))
    layer.observe(random(batch, 2 * heads, length, dim, seed=2), None, 1.0)
    return layer


@pytest.mark.parametrize(("ratio_k", "ratio_v"), [(0.4, 0.4), (0.0, 0.0), (1.0, 1.0), (0.2, 0.6), (1.0, 0.0)])
def test_shares_and_widths_of_keys_and_values_are_those_asked_for(ratio_k, ratio_v):
    layer = filled(ZipCacheConfig(unsalient_ratio_k=ratio_k, unsalient_ratio_v=ratio_v))
    kept, few_k, few_v = layer._classes()
    assert bool(kept.all())
    assert few_k.sum(-1).unique().tolist() == [int(ratio_k * 50)]
    assert few_v.sum(-1).unique().tolist() == [int(ratio_v * 50)]
    assert not bool((few_k & ~few_v).any()) or not bool((few_v & ~few_k).any())  # the smaller set is in the larger
    keys, _ = layer.dequantized()
    error = (keys - random(2, 2, 50, 8)).abs().mean(-1)
    if 0 < ratio_k < 1:
        assert float(error[~few_k].mean()) < 0.5 * float(error[few_k].mean())


def test_bytes_count_codes_parameters_positions_and_tokens_in_float():
    layer = filled(ZipCacheConfig(), length=50)  # 20 tokens of 2 bits, 30 of 4
    codes = 2 * 2 * 2 * 8 * (30 * 4 + 20 * 2) // 8
    parameters = 4 * (2 * 2 * 2 * 8 + 2 * 8 + 2 * 2 * 50)  # keys per channel in two parts, c, values per token
    positions = 2 * 2 * 2 * 7  # a bit for each of 50 positions, in each head and part
    assert layer.nbytes == codes + parameters + positions
    assert layer.float_bytes() == 2 * 2 * 2 * 50 * 8 * 2
    layer.update(random(2, 2, 1, 8), random(2, 2, 1, 8))
    layer.observe(random(2, 4, 1, 8), None, 1.0)
    assert layer.nbytes == codes + parameters + positions + 4 * 2 * 8 * (2 + 2 + 4) + 2
    assert layer.float_bytes() == 2 * 2 * 2 * 51 * 8 * 2


@pytest.mark.parametrize("scheme", ["channel", "token", "channel_separable"])
def test_zero_channels_and_equal_tokens_stay_finite(scheme):
    layer = ZipLayer(ZipCacheConfig(key_scheme=scheme, value_scheme=scheme))
    states = torch.zeros(1, 1, 30, 8)
    states[:, :, 3] = 2.0
    layer.update(states, states)
    layer.observe(random(1, 1, 30, 8), None, 1.0)
    for found in layer.dequantized():
        torch.testing.assert_close(found, states)


def test_old_segments_stay_as_they_are_unless_asked():
    def grown(requantize_old):
        layer = filled(ZipCacheConfig(streaming_gap=10, requantize_old=requantize_old))
        before = layer.dequantized()[0]
        few = layer._classes()[1]
        layer.update(100 * random(2, 2, 10, 8, seed=7), random(2, 2, 10, 8, seed=8))
        layer.observe(random(2, 4, 10, 8, seed=9), None, 1.0)
        assert torch.equal(layer._classes()[1][..., :50], few)  # nobody changes the class
        return before, layer.dequantized()[0][:, :, :50]

    before, after = grown(False)
    assert torch.equal(before, after)
    before, after = grown(True)  # large new keys widen the range of old ones
    assert float((before - after).abs().max()) > 1.0


def test_the_seed_decides_on_the_probes():
    def few(seed):
        return filled(ZipCacheConfig(seed=seed, probe_random=0.3), length=80)._classes()[1]

    assert torch.equal(few(0), few(0)) and not torch.equal(few(0), few(1))


@torch.inference_mode()
def test_sequences_can_be_reordered_repeated_and_chosen():
    model = compress(llama(), ZipCacheConfig(streaming_gap=4))
    text = ids(batch=3, length=20)

    def after(change, order):
        cache = model.make_cache()
        model(input_ids=text[:, :14], past_key_values=cache)
        model(input_ids=text[:, 14:19], past_key_values=cache)
        model(input_ids=text[:, 19:], past_key_values=cache)
        reference = copy.deepcopy(cache)
        change(cache)
        new = ids(batch=3, length=1, seed=5)
        found = model(input_ids=new[order], past_key_values=cache).logits
        torch.testing.assert_close(found, model(input_ids=new, past_key_values=reference).logits[order])

    after(lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), torch.tensor([2, 2, 0]))
    after(lambda cache: cache.batch_select_indices(torch.tensor([1])), torch.tensor([1]))
    after(lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2]))
    cache = model.make_cache()
    with pytest.raises(NotImplementedError, match="a compressed cache cannot be cut"):
        cache.crop(-1)
    model(input_ids=text, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.layers[1].index == 1


# --- models


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@torch.inference_mode()
def test_eight_bits_are_nearly_the_float_cache_also_behind_padding(make):
    """Bits low enough to see, high enough to be near: also where another sequence is longer."""
    plain, model = make(), compress(make(), PRECISE)
    short, long = ids(1, 20), ids(1, 32, seed=1)
    text = torch.cat([torch.cat([torch.zeros(1, 12, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(text)
    mask[0, :12] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(input_ids=text, attention_mask=mask, position_ids=positions).logits
    for row, alone in ((found[0, 12:], short), (found[1], long)):
        expected = plain(input_ids=alone).logits[0]
        spread = float(expected.std())
        assert 0 < float((row - expected).abs().max()) < 0.15 * spread


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@torch.inference_mode()
def test_generate_goes_through_the_compressed_cache(make):
    model = compress(make(), ZipCacheConfig(streaming_gap=3))
    text, mask = ids(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[0, :6] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, "return_dict_in_generate": True}
    out = model.generate(text, do_sample=False, output_logits=True, **options)
    cache = out.past_key_values
    assert isinstance(cache, ZipCache) and cache.get_seq_length() == 31 and len(cache.layers[0].segments) == 3
    fresh = model.make_cache()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = [model(input_ids=text, attention_mask=mask, position_ids=positions, past_key_values=fresh).logits[:, -1]]
    for step in range(24, 31):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        position = mask.sum(1, keepdim=True) - 1
        new = out.sequences[:, step : step + 1]
        logits.append(
            model(input_ids=new, attention_mask=mask, position_ids=position, past_key_values=fresh).logits[:, -1]
        )
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(logits), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_half_precision_stays_half_precision():
    model, text = compress(llama(), PRECISE).to(torch.bfloat16), ids()
    output = model(input_ids=text)
    assert output.logits.dtype == torch.bfloat16 == output.past_key_values.layers[0].dequantized()[0].dtype
    exact = model(input_ids=text, use_cache=False).logits
    assert float((output.logits - exact).abs().mean()) < 0.05 * float(exact.float().std())


@torch.inference_mode()
def test_beam_search_takes_the_cache_along():
    model, text = compress(llama(), ZipCacheConfig(streaming_gap=3)), ids(2, 24)
    beams = model.generate(text, num_beams=2, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert beams.sequences.shape == (2, 29) and isinstance(beams.past_key_values, ZipCache)


@torch.inference_mode()
def test_generation_with_a_plain_cache_or_none_is_that_of_the_plain_model():
    plain, model, text = llama(), compress(llama(), ZipCacheConfig()), ids()
    expected = plain.generate(text, max_new_tokens=8, do_sample=False, pad_token_id=0)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(text, use_cache=False, **options), expected)
    plain_cache = DynamicCache(config=model.config)
    assert torch.equal(model.generate(text, past_key_values=plain_cache, **options), expected)
    torch.testing.assert_close(model(input_ids=text, use_cache=False).logits, plain(input_ids=text).logits)


@pytest.mark.parametrize("mode", [True, False])
def test_where_gradients_are_recorded_nothing_is_compressed(mode):
    plain, model, text = llama().train(mode), compress(llama(), ZipCacheConfig()).train(mode), ids()
    for item in (plain, model):
        item(input_ids=text, labels=text).loss.backward()
    torch.testing.assert_close(
        model.model.layers[0].self_attn.k_proj.weight.grad, plain.model.layers[0].self_attn.k_proj.weight.grad
    )


@torch.inference_mode()
def test_the_loss_with_labels_is_that_of_the_logits():
    model, text = compress(llama(), ZipCacheConfig()), ids()
    output = model(input_ids=text, labels=text)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@torch.inference_mode()
def test_text_that_ends_before_the_others_is_read_too():
    """Padding on the right: a step may hold nothing of a sequence, or of all."""
    model = compress(llama(), ZipCacheConfig(streaming_gap=4))
    text, mask = ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, 24:], mask[1, 31:] = 0, 0
    logits = model(input_ids=text, attention_mask=mask).logits
    shorter = model(input_ids=text[:, :31], attention_mask=mask[:, :31])
    assert bool(logits[1, :31].isfinite().all()) and bool(logits[0, :24].isfinite().all())
    assert shorter.past_key_values.layers[0].float_bytes() == 2 * 2 * 8 * (24 + 31) * 2


@torch.inference_mode()
def test_fewer_bits_are_further_from_the_float_cache():
    text, distance = ids(4, 100), []
    for low, high in ((2, 2), (2, 4), (4, 4), (8, 8)):
        model = compress(llama(), ZipCacheConfig(bits_other=low, bits_salient=high))
        exact = model(input_ids=text, use_cache=False).logits[:, 50:].flatten(0, 1)
        distance.append(divergence(exact, model(input_ids=text).logits[:, 50:].flatten(0, 1)))
    assert distance == sorted(distance, reverse=True) and distance[0] > 10 * distance[-1] > 0


def test_the_divergence_is_that_of_torch():
    exact, found = random(5, 7), random(5, 7, seed=1)
    expected = nn.functional.kl_div(
        found.double().log_softmax(-1), exact.double().log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert divergence(exact, found) == pytest.approx(float(expected))
    assert divergence(exact, exact) == 0.0


# --- files


@pytest.mark.parametrize(
    "config", [ZipCacheConfig(streaming_gap=6), ZipCacheConfig(key_scheme="token", unsalient_ratio_v=0.7)]
)
@torch.inference_mode()
def test_decoding_goes_on_from_a_file_as_from_the_cache(config, tmp_path):
    model, text, mask = compress(llama(), config), ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, :5] = 0
    cache = model.make_cache()
    for start, end in ((0, 20), (20, 29)):
        model(input_ids=text[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
    details = save_cache(cache, text[:, :29], tmp_path / "cache")
    loaded, known = load_cache(tmp_path / "cache")
    assert torch.equal(known, text[:, :29]) and loaded.config == config
    assert loaded.nbytes == cache.nbytes == details["cache_bytes"]
    last = {"input_ids": text[:, 29:], "attention_mask": mask}
    assert torch.equal(model(**last, past_key_values=loaded).logits, model(**last, past_key_values=cache).logits)


def test_a_file_that_is_no_cache_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"no tensors")
    with pytest.raises(DataError, match="is no cache that quant_zipcache wrote"):
        load_cache(tmp_path / "x")
    with pytest.raises(DataError, match="is no cache that quant_zipcache wrote"):
        load_cache(tmp_path / "missing")


def recipe(model="zoo:llama_tiny?dim=16&heads=2&kv_heads=1&hidden=32", options=None, **changes):
    use = MethodUse(name=EFF_PLUGIN, options=options or {"streaming_gap": 8})
    return Recipe(model=model, data="corpus?length=32&train=4&test=4", methods=(use,), device="cpu", **changes)


def test_a_run_measures_writes_a_cache_and_is_used_again(tmp_path):
    pytest.importorskip("eff_zoo", reason="needs eff-zoo")
    report = apply(recipe(), tmp_path / "run")
    values = report.after.metrics.values
    assert values["cache_kl"].value > 0 and values["compression_ratio"].value > values["ratio_with_recent"].value
    assert 50 < values["salience_recall"].value <= 100
    assert "cache_kl" not in report.before.metrics.values
    cache, text = load_cache(tmp_path / "run" / "model.kvcache")
    assert cache.get_seq_length() == text.shape[1] == 32
    request = UseRequest(str(tmp_path / "run"), device="cpu")
    assert evaluate(request).metrics.values["cache_kl"].value == pytest.approx(values["cache_kl"].value)
    (tmp_path / "prompt.txt").write_text("The import statement", encoding="utf-8")
    [said] = predict(request, [tmp_path / "prompt.txt"])
    assert "continuation" in said.rows[0]
    with pytest.raises(UnsupportedModelError, match="is no part of a onnx graph; export the model it was applied to"):
        export_model(request, ["onnx"], tmp_path / "exports")
    assert not list((tmp_path / "exports").glob("*"))


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits_other": 8}, "bits_other 8 is above bits_salient 4"),
        ({"bits_salient": 3}, "bits_salient"),
        ({"probe_recent": 0, "probe_random": 0}, "both 0; there would be no probe"),
        ({"unsalient_ratio_k": 1.5}, "unsalient_ratio_k"),
        ({"streaming_gap": 0}, "streaming_gap"),
        ({"metrik": "normalized"}, "option 'metrik' is unknown; did you mean 'metric'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises((ConfigError, Problems), match=message):
        check_config(EFF_PLUGIN, ZipCacheConfig, options)


def small(config, kind, **options):
    return kind(config(vocab_size=20, **options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(4, 4), "Linear is no language model of transformers"),
        (
            lambda: small(
                MistralConfig, MistralForCausalLM, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
            ),
            "has a sliding window of 8 tokens|has sliding_attention",
        ),
        (
            lambda: small(T5Config, T5ForConditionalGeneration, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
            "the attention of T5ForConditionalGeneration cannot be replaced",
        ),
        (lambda: llama(dim=6), "the heads of LlamaForCausalLM have 6 channels, codes of 2 bits fill whole bytes"),
        (lambda: compress(llama(), ZipCacheConfig()), "has a compressed cache already; apply it once"),
    ],
)  # fmt: skip
def test_a_model_whose_cache_cannot_be_compressed_is_refused(make, message):
    with pytest.raises(UnsupportedModelError, match=message):
        compress(make(), ZipCacheConfig())


def test_a_refused_model_ends_with_code_2_and_writes_nothing(tmp_path, capsys):
    from eff.cli import main

    pytest.importorskip("eff_zoo", reason="needs eff-zoo")
    wrong = "zoo:llama_tiny?dim=12&heads=2&kv_heads=1&hidden=16"
    command = ["apply", EFF_PLUGIN, wrong, "--data", "corpus?length=32&test=4", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--device", "cpu"])
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    assert "have 6 channels, codes of 2 bits fill whole bytes for multiples of 4" in capsys.readouterr().err


def test_attention_with_capped_scores_is_refused():
    layer = ZipLayer(ZipCacheConfig())
    noted, values = layer.update(random(1, 1, 4, 8), random(1, 1, 4, 8))
    with pytest.raises(UnsupportedModelError, match="uses attention with softcap"):
        zip_attention(nn.Module(), random(1, 1, 4, 8), noted, values, None, softcap=30.0)


# --- the claims, shortened


@pytest.mark.claim
def test_quantizers_and_scores_differ_as_the_paper_says_on_one_seed():
    errors = claims._quantizer_errors(0)
    assert errors["token_4bit"] > 5 * errors["separable_4bit"] and errors["separable_4bit"] < errors["group32_4bit"]
    recalls = [claims.planted_recall(seed) for seed in range(5)]
    gain = sum(recall["probes"] - recall["accumulated"] for recall in recalls) / 5
    assert gain > 0.1


@pytest.mark.claim
def test_retrieval_measures_every_cache_with_equal_bytes_for_both_scores():
    found = retrieval.measure(0, steps=3, count=20)
    assert {"fp", "normalized", "accumulated", "bits2", "bits4", "fp8_transformers"} <= found.keys()
    assert found["normalized_bytes"] == found["accumulated_bytes"] > found["bits2_bytes"]
    assert found["bits2_ratio"] > found["normalized_ratio"] > found["bits4_ratio"]


def test_strings_ask_for_keys_that_they_told():
    for row in retrieval.strings(20, 5, 3, torch.Generator().manual_seed(0)).tolist():
        told = dict(zip(row[1:11:2], row[2:11:2], strict=True))
        asked = dict(zip(row[11::2], row[12::2], strict=True))
        assert len(told) == 5 and len(asked) == 3 and asked.items() <= told.items()
