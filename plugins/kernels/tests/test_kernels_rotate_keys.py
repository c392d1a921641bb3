"""rotate_keys against rotation matrices in float64 and against keys that a model would rotate itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eff_kernels.rotate_keys import rotate_keys
from eff_kernels.rotate_keys.library import rotate_op

# A product and a sum per value; half dtypes round the result once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(params=["reference", "cpu"])
def path(request, monkeypatch):
    monkeypatch.setenv("EFF_KERNELS", request.param)
    return request.param


def frequencies(half, base=10_000.0):
    return base ** (-torch.arange(half, dtype=torch.float64) / half)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotated(x, positions, inv_freq, interleaved=False):
    """Rotate by 2x2 matrices, one pair after another: what a model does to a key at a position."""
    half, out = len(inv_freq), x.clone()
    for token, position in enumerate(positions):
        for u in range(half):
            i, j = (2 * u, 2 * u + 1) if interleaved else (u, u + half)
            angle = float(position) * float(inv_freq[u])
            matrix = torch.tensor(
                [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
            )
            out[..., token, [i, j]] = x[..., token, [i, j]] @ matrix.t()
    return out


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 11])  # all channels, or the first 8
def test_it_is_the_rotation_by_the_offset(path, dtype, interleaved, dim):
    keys, inv_freq = random(2, 3, 5, dim).to(dtype), frequencies(4)
    expected = rotated(keys.double(), [7] * 5, inv_freq, interleaved)
    found = rotate_keys(keys, 7, inv_freq, interleaved=interleaved)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(found[..., 8:], keys[..., 8:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_moved_keys_are_those_that_a_model_makes_at_the_new_positions(path, interleaved):
    raw, inv_freq = random(1, 2, 12, 6), frequencies(3)
    old = torch.arange(12)
    new = torch.cat([old[:4], old[4:9] + 5, old[9:] - 20])
    cached = rotated(raw, old, inv_freq, interleaved)
    found = rotate_keys(cached, [0, 5, -20], inv_freq, lengths=[4, 5, 3], interleaved=interleaved)
    torch.testing.assert_close(found, rotated(raw, new, inv_freq, interleaved))


def test_each_sequence_of_a_batch_moves_by_its_own_offsets(path):
    keys, inv_freq = random(2, 3, 6, 8), frequencies(4)
    offsets = torch.tensor([[1, -2], [3, 100]])
    found = rotate_keys(keys, offsets, inv_freq, lengths=[2, 4])
    for row in range(2):
        torch.testing.assert_close(
            found[row : row + 1], rotate_keys(keys[row : row + 1], offsets[row], inv_freq, lengths=[2, 4])
        )


@settings(max_examples=30, deadline=None)
@given(one=st.integers(-100_000, 100_000), two=st.integers(-100_000, 100_000), seed=st.integers(0, 99))
def test_shifts_add_up_keep_norms_and_go_back(one, two, seed):
    keys, inv_freq = random(1, 2, 3, 8, seed=seed), frequencies(4)
    there = rotate_keys(rotate_keys(keys, one, inv_freq), two, inv_freq)
    torch.testing.assert_close(there, rotate_keys(keys, one + two, inv_freq), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(there.norm(dim=-1), keys.norm(dim=-1))
    torch.testing.assert_close(rotate_keys(there, -one - two, inv_freq), keys, rtol=1e-9, atol=1e-9)


def test_an_offset_of_0_changes_no_bit(path):
    for dtype in TOLERANCE:
        keys = random(1, 2, 5, 8).to(dtype)
        assert torch.equal(rotate_keys(keys, 0, frequencies(4)), keys)


def test_a_thousand_shifts_drift_less_than_stated(path):
    keys, inv_freq = random(1, 2, 16, 64).float(), frequencies(32)
    steps = torch.randint(-50, 51, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    moved = keys
    for step in steps:
        moved = rotate_keys(moved, step, inv_freq)
    exact = rotate_keys(keys.double(), sum(steps), inv_freq)
    drift = float((moved.double() - exact).norm(dim=-1).div(keys.norm(dim=-1)).max())
    assert drift <= 1000 * 2.0**-22
    once = rotate_keys(keys, sum(steps), inv_freq)
    assert float((once.double() - exact).norm(dim=-1).div(keys.norm(dim=-1)).max()) <= 2.0**-22


def test_a_far_offset_has_the_angle_of_float64():
    keys = random(1, 1, 1, 2).float()
    found = rotate_keys(keys, 1_000_003, torch.ones(1))
    torch.testing.assert_close(found.double(), rotated(keys.double(), [1_000_003], torch.ones(1)), rtol=1e-6, atol=1e-6)


def test_pieces_of_any_size_give_the_same(monkeypatch):
    from eff_kernels.rotate_keys import cpu

    keys, inv_freq = random(2, 2, 9, 6), frequencies(2)
    whole = rotate_keys(keys, [1, 2], inv_freq, lengths=[4, 5])
    monkeypatch.setattr(cpu, "PIECE", 50)
    assert torch.equal(rotate_keys(keys, [1, 2], inv_freq, lengths=[4, 5]), whole)


def test_gradients_hold_numerically(path):
    keys = random(1, 2, 3, 6).requires_grad_()
    torch.autograd.gradcheck(lambda k: rotate_keys(k, [3, -1], frequencies(2), lengths=[1, 2]), (keys,))


def test_nan_stays_in_its_pair_and_nothing_is_written_into_the_input():
    keys = random(1, 1, 2, 4)
    keys[0, 0, 0, 1] = math.nan
    before = keys.clone()
    found = rotate_keys(keys, 1, frequencies(2))
    assert found.isnan().tolist() == [[[[False, True, False, True], [False] * 4]]]
    torch.testing.assert_close(keys, before, equal_nan=True)


def test_an_empty_cache_stays_empty(path):
    assert rotate_keys(torch.ones(1, 2, 0, 4), 3, frequencies(2)).shape == (1, 2, 0, 4)


def test_the_operator_is_registered_properly():
    cos, sin = torch.rand(2, 1, 2, 3)
    lengths = [1, 2]
    keys = torch.randn(2, 2, 3, 8, requires_grad=True)
    torch.library.opcheck(rotate_op, (keys, cos, sin, lengths, False))
    torch.library.opcheck(rotate_op, (keys.detach().transpose(0, 1), cos, sin, lengths, True))


def test_it_works_under_compile():
    keys, inv_freq = random(1, 2, 5, 8), frequencies(4)
    compiled = torch.compile(lambda k: rotate_keys(2 * k, 3, inv_freq), backend="aot_eager")
    torch.testing.assert_close(compiled(keys), rotate_keys(2 * keys, 3, inv_freq))


def test_it_is_what_transformers_models_do():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    raw, inv_freq = random(1, 2, 6, 8).float(), frequencies(4).float()

    def by_model(positions):
        angle = torch.outer(positions.float(), inv_freq).repeat(1, 2)[None]
        return llama.apply_rotary_pos_emb(raw, raw, angle.cos(), angle.sin())[1]

    moved = rotate_keys(by_model(torch.arange(6)), 9, inv_freq)
    torch.testing.assert_close(moved, by_model(torch.arange(6) + 9), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": torch.ones(1, 1, 2, 4).int()}, TypeError, "rotate_keys: keys is int32, expected float32"),
        ({"keys": torch.ones(2, 4)}, ValueError, r"keys has shape \(2, 4\), expected \(batch, heads, length, dim\)"),
        ({"inv_freq": torch.ones(3)}, ValueError, "inv_freq has 3 entries, expected 1 to 2 for 4 channels"),
        ({"inv_freq": torch.ones(0)}, ValueError, "inv_freq has 0 entries, expected 1 to 2"),
        (
            {"inv_freq": torch.tensor([math.inf])},
            ValueError,
            "inv_freq has values from inf|inv_freq is inf.*expected finite numbers",
        ),
        ({"offsets": None}, TypeError, "offsets is None, expected 64-bit integers"),
        ({"offsets": 2**70}, TypeError, "expected 64-bit integers"),
        ({"offsets": "left"}, TypeError, "offsets is 'left', expected 64-bit integers"),
        ({"lengths": 2}, TypeError, "lengths is 2, expected a sequence of counts"),
        ({"interleaved": 1}, TypeError, "interleaved is 1, expected True or False"),
        ({"offsets": 1.5}, TypeError, "offsets is float32, expected int64, int32"),
        ({"offsets": [1, 2]}, ValueError, r"offsets has shape \(2,\), expected \(1,\) or \(1, 1\)"),
        ({"lengths": [1, 2]}, ValueError, r"lengths are \[1, 2\], expected counts that add up to 2"),
        ({"lengths": [3, -1], "offsets": [0, 0]}, ValueError, r"lengths\[1\] is -1, expected at least 0"),
        ({"inv_freq": torch.ones(1, device="meta")}, ValueError, "inv_freq is on meta, keys on cpu"),
        (
            {"offsets": torch.ones(1, dtype=torch.int64, device="meta")},
            ValueError,
            "rotate_keys: offsets is on meta, keys on cpu",
        ),
        (
            {"offsets": [1, 2], "lengths": [1.0, 1.5]},
            TypeError,
            r"rotate_keys: lengths\[0\] is 1.0, expected an integer",
        ),
    ],
)
def test_wrong_arguments_are_refused(change, error, message):
    given = {"keys": torch.ones(1, 1, 2, 4), "offsets": 1, "inv_freq": torch.ones(2)}
    with pytest.raises(error, match=message):
        rotate_keys(**{**given, **change})
