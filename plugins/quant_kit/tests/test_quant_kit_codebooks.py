"""Codebooks: search, k-means, packed indices, and files that hold them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eff_quant_kit.codebook_layers import CodebookLinear
from eff_quant_kit.codebooks import (
    centroids,
    decode,
    index_bits,
    kmeans,
    nearest,
    nearest_codes,
    pack_indices,
    plus_plus_seeds,
    reseed_empty,
    unpack_indices,
)
from eff_quant_kit.layers import QuantLayer
from eff_quant_kit.packed import Packed, in_half_precision, pack_state, packed_codes, packed_fixed, sizes, unpack_state
from eff_quant_kit.quantizer import Quantizer


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 22])
@pytest.mark.parametrize("count", [1, 3])
def test_the_search_finds_what_all_distances_say_whatever_the_block(block, count):
    x, codebook = normal(33, 4, dtype=torch.float64), normal(20, 4, seed=1, dtype=torch.float64)
    distances, codes = nearest(x, codebook, count, block)
    expected = torch.cdist(x, codebook).sort(1)
    assert torch.equal(codes, expected.indices[:, :count])
    torch.testing.assert_close(distances, expected.values[:, :count])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("columns", [None, 3, 7, 100])
def test_codes_without_distances_are_those_of_the_search_whatever_a_block_is(count, columns):
    x, codebook = normal(30, 4), normal(40, 4, seed=1)
    expected = torch.cdist(x, codebook).topk(count, largest=False).indices
    found = nearest_codes(x, codebook, count, block=50, columns=columns)
    assert torch.equal(found.sort(1).values, expected.sort(1).values)


def test_on_a_tie_the_lower_code_wins():
    codebook = torch.tensor([[1.0], [-1.0], [1.0]])
    for block in (1, 1 << 22):
        assert nearest(torch.tensor([[0.0], [1.0]]), codebook, 1, block)[1].tolist() == [[0], [0]]
        assert nearest(torch.tensor([[0.0], [1.0]]), codebook, 3, block)[1].tolist() == [[0, 1, 2], [0, 2, 1]]


def test_a_hundred_thousand_codewords_need_one_small_block_at_a_time():
    codebook = normal(100_000, 4)
    x = codebook[::5000] + 1e-4
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            sizes.extend(value.numel() for value in [result] if isinstance(value, torch.Tensor))
            return result

    with Watch():
        codes = nearest(x, codebook, block=1 << 16)[1]
    assert codes[:, 0].tolist() == list(range(0, 100_000, 5000))
    assert max(sizes) <= max(1 << 16, codebook.numel())


@pytest.mark.parametrize(
    ("x", "codebook", "count", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(2, 4),
            1,
            r"need x \(N, d\) and a codebook \(k, d\), got \(2, 3\) and \(2, 4\)",
        ),
        (torch.zeros(2, 3), torch.zeros(2, 3), 3, "count must be between 1 and the 2 codewords, got 3"),
        (torch.full((2, 3), torch.nan), torch.zeros(2, 3), 1, "hold NaN or infinity"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(x, codebook, count, message):
    with pytest.raises(ValueError, match=message):
        nearest(x, codebook, count)


def test_seeds_follow_the_squared_distance():
    x = torch.tensor([[0.0], [1.0], [3.0]])
    second = [
        float(seeds[1])
        for seed in range(3000)
        if float((seeds := plus_plus_seeds(x, 2, torch.Generator().manual_seed(seed)))[0]) == 0.0
    ]
    assert second.count(0.0) == 0
    assert second.count(3.0) / len(second) == pytest.approx(0.9, abs=0.03)  # 9 to 1; 1000 draws: sd 0.01


def test_kmeans_is_no_worse_than_scikit_learn_from_the_same_seeds():
    cluster = pytest.importorskip("sklearn.cluster", reason="the independent k-means is scikit-learn's")
    x = normal(600, 3, dtype=torch.float64)
    codebook, codes = kmeans(x, 12, 100, torch.Generator().manual_seed(3))
    seeds = plus_plus_seeds(x, 12, torch.Generator().manual_seed(3))
    theirs = cluster.KMeans(12, init=seeds.numpy(), n_init=1, max_iter=100, tol=0).fit(x.numpy())
    np.testing.assert_allclose(codebook.numpy(), theirs.cluster_centers_, atol=1e-8)
    assert codes.tolist() == theirs.labels_.tolist()


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), d=st.integers(1, 4), k=st.integers(1, 12), seed=st.integers(0, 99))
def test_more_rounds_never_raise_the_error_and_codes_are_nearest(n, d, k, seed):
    x, k = normal(n, d, seed=seed, dtype=torch.float64), min(k, n)
    errors = []
    for rounds in (0, 1, 5, 50):
        codebook, codes = kmeans(x, k, rounds, torch.Generator().manual_seed(seed))
        assert torch.equal(codes, nearest(x, codebook)[1][:, 0])
        errors.append(float((x - decode(codes, codebook)).square().sum()))
    assert all(after <= before + 1e-9 for before, after in zip(errors, errors[1:], strict=False))


def test_a_codeword_without_members_moves_to_the_worst_sub_vector():
    x = torch.tensor([[0.0], [0.1], [9.0]])
    codebook = torch.tensor([[0.0], [5.0], [100.0]])
    distances, codes = nearest(x, codebook)
    assert reseed_empty(x, codes[:, 0], distances[:, 0], codebook).tolist() == [[0.0], [5.0], [9.0]]


def test_equal_sub_vectors_do_not_break_seeding_or_centroids():
    codebook, codes = kmeans(torch.ones(8, 2), 3, 10, torch.Generator().manual_seed(0))
    assert codebook.tolist() == [[1.0, 1.0]] * 3 and codes.tolist() == [0] * 8
    kept = centroids(torch.ones(2, 1), torch.tensor([0, 0]), torch.tensor([[5.0], [7.0]]))
    assert kept.tolist() == [[1.0], [7.0]]


@pytest.mark.parametrize(("k", "bits"), [(1, 1), (2, 1), (3, 2), (16, 4), (17, 5), (256, 8), (257, 9), (100_000, 17)])
def test_a_code_takes_the_bits_that_k_needs(k, bits):
    codes = torch.arange(k).repeat(2)[: 2 * k - 1]
    packed = pack_indices(codes, k)
    assert index_bits(k) == bits
    assert abs(packed.numel() - len(codes) * bits / 8) < 1 + bits // 8
    assert torch.equal(unpack_indices(packed, k, len(codes)), codes)


def test_codes_outside_the_codebook_are_refused_when_packed_and_when_read():
    with pytest.raises(ValueError, match=r"codes must be in \[0, 2\], got 0 to 3"):
        pack_indices(torch.tensor([0, 3]), 3)
    with pytest.raises(ValueError, match="a code is 3, but the codebook has 3 codewords"):
        unpack_indices(torch.tensor([3], dtype=torch.uint8), 3, 1)


class Coded(nn.Module):
    """A weight as codes of a codebook."""

    def __init__(self, k=5, d=2):
        super().__init__()
        self.register_buffer("codes", torch.randint(k, (3, 4), generator=torch.Generator().manual_seed(0)).short())
        self.codebook = nn.Parameter(in_half_precision(normal(k, d)))
        self.bias = nn.Parameter(torch.zeros(3))

    def packed(self, prefix):
        return {f"{prefix}codes": packed_codes(self.codes, 5, {f"{prefix}codebook": self.codebook})}


def test_a_module_says_how_it_is_packed_beside_quantized_layers():
    quantizer = Quantizer(4, True)
    quantizer.set_scale(torch.tensor(0.1))
    model = nn.ModuleDict({"coded": Coded(), "levels": QuantLayer(nn.Linear(6, 2), quantizer, None)})
    state, details = pack_state(model)
    assert {key: item["kind"] for key, item in details.items()} == {
        "coded.codes": "codebook",
        "levels.layer.weight": "levels",
    }
    assert state["coded.codebook"].dtype == torch.float16
    size = sizes(model)
    assert size["code_bytes"] == -(-12 * 3 // 8) + 6
    assert size["scale_bytes"] >= 5 * 2 * 2 + 4 and sum(size.values()) == sum(
        value.numel() * value.element_size() for value in state.values()
    )
    back = unpack_state(state, details)
    for key, value in model.state_dict().items():
        if key != "levels.layer.weight":
            assert back[key].dtype == value.dtype and torch.equal(back[key], value), key


def test_a_file_without_kinds_holds_levels_and_an_unknown_kind_is_named():
    quantizer = Quantizer(4, True)
    quantizer.set_scale(torch.tensor(0.1))
    model = nn.Sequential(QuantLayer(nn.Linear(6, 2), quantizer, None))
    state, details = pack_state(model)
    old = {key: {name: value for name, value in item.items() if name != "kind"} for key, item in details.items()}
    assert torch.equal(unpack_state(state, old)["0.layer.weight"], unpack_state(state, details)["0.layer.weight"])
    with pytest.raises(
        ValueError, match=r"'0.layer.weight' is packed as 'wavelets', which is none of levels, fixed, codebook"
    ):
        unpack_state(state, {"0.layer.weight": {"kind": "wavelets"}})


def test_a_codebook_beyond_float16_is_refused():
    with pytest.raises(ValueError, match="'c' holds values beyond float16"):
        packed_codes(torch.zeros(2, dtype=torch.uint8), 2, {"c": torch.tensor([[1e6], [0.0]])})
    assert isinstance(packed_codes(torch.zeros(2, dtype=torch.uint8), 2, {"c": torch.ones(2, 1)}), Packed)


@pytest.mark.parametrize(("k", "columns"), [(16, 4), (16, 3), (32, 4), (300, 2)])
@pytest.mark.parametrize("rank", [None, 2])
def test_a_linear_layer_of_codes_multiplies_with_its_weight_and_survives_the_file(k, columns, rank):
    d = 3
    codes = torch.randint(k, (5, columns), generator=torch.Generator().manual_seed(0))
    projection = None if rank is None else in_half_precision(normal(rank, d, seed=2))
    layer = CodebookLinear(codes, in_half_precision(normal(k, rank or d)), normal(5, seed=1), projection)
    words = layer.codebook if projection is None else layer.codebook @ projection
    x = normal(2, 4, columns * d)
    torch.testing.assert_close(layer(x), x @ words[codes].flatten(1).t() + layer.bias)
    layer(x).square().sum().backward()
    assert layer.codebook.grad is not None and layer.bias.grad is not None
    state, details = pack_state(nn.Sequential(layer))
    back = nn.Sequential(CodebookLinear.empty((5, columns * d), k, d, rank=rank))
    back.load_state_dict(unpack_state(state, details))
    assert torch.equal(back(x), layer(x))
    assert sizes(nn.Sequential(layer))["code_bytes"] == pack_indices(codes, k).numel()


@pytest.mark.parametrize("bits", [2, 7, 8, 9, 16, 24])
def test_fixed_point_numbers_come_back_as_they_were(bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 7), generator=torch.Generator().manual_seed(bits))
    part = packed_fixed(codes, bits, -9, torch.float32)
    assert part.data.numel() == -(-35 * min(bits, 8) // 8) + (-(-35 * max(0, min(bits - 8, 8)) // 8)) + (
        -(-35 * max(0, bits - 16) // 8)
    )
    assert torch.equal(unpack_state({"w": part.data}, {"w": part.details})["w"], codes * 2.0**-9)


@pytest.mark.parametrize("bits", [5, 13, 32])
def test_sparse_fixed_point_numbers_take_a_bit_per_place_and_their_codes(bits):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1, 2 ** (bits - 1), (16, 10), generator=generator)
    codes[torch.rand(16, 10, generator=generator) < 0.8] = 0
    part = packed_fixed(codes, bits, 0, torch.float64)
    count = int((codes != 0).sum())
    assert part.data.numel() <= 20 + (count * bits + 7) // 8 + 3 < 160 * bits // 8
    assert torch.equal(unpack_state({"w": part.data}, {"w": part.details})["w"], codes.double())
