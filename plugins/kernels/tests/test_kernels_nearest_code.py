"""nearest_code against all distances in float64 and scipy's tree; ties, blocks, the operator, bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eff_kernels.nearest_code import cpu, nearest_code, nearest_code_distance, reference
from eff_kernels.nearest_code.library import nearest_code_op

# Of squared distances of about 2 d <= 40; half dtypes are widened before anything is computed.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 1e-4, torch.bfloat16: 1e-4}


@pytest.fixture(params=["reference", "cpu"])
def path(request, monkeypatch):
    monkeypatch.setenv("EFF_KERNELS", request.param)
    return request.param


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def excess(x, words, codes):
    """How much farther than the nearest the found entries are, in squared distances."""
    exact = (x.double()[:, None] - words.double()[None]).square().sum(2)
    return float((exact.gather(1, codes[:, None])[:, 0] - exact.min(1).values).max())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_codes_are_those_of_all_distances(path, dtype):
    x, words = normal(50, 8, dtype=dtype), normal(70, 8, dtype=dtype, seed=1)
    codes, squared = nearest_code_distance(x, words)
    assert codes.dtype == torch.int64 and excess(x, words, codes) <= TOLERANCE[dtype]
    expected = (x.double() - words.double()[codes]).square().sum(1)
    torch.testing.assert_close(squared.double(), expected, rtol=1e-5, atol=1e-6)


def test_codes_are_those_of_scipys_tree(path):
    spatial = pytest.importorskip("scipy.spatial")
    x, words = normal(200, 3, dtype=torch.float64), normal(500, 3, dtype=torch.float64, seed=1)
    np.testing.assert_array_equal(nearest_code(x, words), spatial.cKDTree(words.numpy()).query(x.numpy())[1])


@settings(max_examples=40, deadline=None)
@given(
    vectors=st.integers(0, 30), entries=st.integers(1, 50), d=st.integers(1, 20), block=st.integers(1, 300),
    columns=st.integers(0, 60), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_size_of_a_block_does_not_matter(vectors, entries, d, block, columns, seed):
    x, words = (
        normal(vectors, d, dtype=torch.float64, seed=seed),
        normal(entries, d, dtype=torch.float64, seed=seed + 1),
    )
    assert torch.equal(cpu.nearest_code(x, words, block, columns), reference.nearest_code(x, words, block, columns))


@pytest.mark.parametrize("columns", [1, 2, 3, 0])
def test_the_first_of_equal_entries_is_taken_across_blocks(path, columns):
    words = torch.tensor([[5.0, 0.0], [1.0, 1.0], [1.0, 1.0], [5.0, 0.0], [1.0, 1.0]])
    assert nearest_code(words, words, 4, columns).tolist() == [0, 1, 1, 0, 1]


def test_points_far_from_zero_keep_their_neighbours(path):
    x, words = normal(40, 8) + 1000, normal(60, 8, seed=1) + 1000
    assert excess(x, words, nearest_code(x, words)) <= 1e-3  # float32 holds 6e-5 at 1000


def test_the_operator_is_registered_properly():
    torch.library.opcheck(nearest_code_op, (normal(5, 3), normal(4, 3), 64, 0))
    torch.library.opcheck(
        nearest_code_op, (normal(5, 3, dtype=torch.bfloat16), normal(4, 3, dtype=torch.bfloat16), 64, 2)
    )


def test_it_works_under_compile():
    x, words = normal(9, 4), normal(11, 4, seed=1)
    compiled = torch.compile(lambda value: nearest_code(2 * value, words), backend="aot_eager")
    assert torch.equal(compiled(x), nearest_code(2 * x, words))


@pytest.mark.parametrize(
    ("x", "words", "error", "message"),
    [
        (torch.ones(2, 3).int(), torch.ones(4, 3).int(), TypeError, "nearest_code: x is int32, expected float32"),
        (torch.ones(2, 3), torch.ones(4, 3).half(), TypeError, "codebook is float16, expected float32"),
        (torch.ones(3), torch.ones(4, 3), ValueError, r"x has shape \(3,\), expected \(vectors, d\)"),
        (torch.ones(2, 3), torch.ones(4, 2), ValueError, r"codebook has shape \(4, 2\), expected \(entries, 3\)"),
        (torch.ones(2, 3), torch.ones(0, 3), ValueError, "codebook is empty"),
        (torch.full((2, 3), math.nan), torch.ones(4, 3), ValueError, "x has values from nan .*expected finite numbers"),
        (torch.ones(2, 3), torch.full((4, 3), math.inf), ValueError, "codebook is inf, expected finite numbers"),
    ],
)
def test_what_does_not_fit_is_refused(x, words, error, message):
    with pytest.raises(error, match=message):
        nearest_code(x, words)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"block": 0}, ValueError, "block is 0, expected 1 to"),
        ({"block": 2.5}, TypeError, "block is 2.5, expected an integer"),
        ({"block": None}, TypeError, "block is None, expected an integer"),
        ({"columns": -1}, ValueError, "columns is -1, expected 0 to"),
        ({"columns": True}, TypeError, "columns is True, expected an integer"),
    ],
)
def test_sizes_of_a_block_are_counts(sizes, error, message):
    with pytest.raises(error, match=message):
        nearest_code(torch.ones(2, 3), torch.ones(4, 3), **sizes)
