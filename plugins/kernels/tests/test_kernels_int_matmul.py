"""int_matmul against Python integers and numpy's int64, and dyadic against exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eff_kernels.int_matmul import cpu, dyadic, int_matmul, longest_sum, reference, scaled_int_matmul

RANGES = [(-128, 127), (0, 255), (-8, 7), (0, 15)]
PATHS = {"reference": reference, "cpu": cpu}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setenv("EFF_KERNELS", request.param)
    return request.param


def inputs(m, n, k, dtype=torch.int8, ratio=1e-3, seed=0):
    """Codes of the full range, dyadic scales around `ratio`, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (-128, 128) if dtype == torch.int8 else (0, 256)
    x = torch.randint(low, high, (m, k), dtype=dtype, generator=generator)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    bias = torch.randint(-20_000, 20_000, (n,), dtype=torch.int32, generator=generator)
    scales = dyadic(ratio * (0.1 + torch.rand(n, generator=generator, dtype=torch.float64)))
    return x, weight, *scales, bias


def exact(x, weight, multiplier, shift, bias, q_min, q_max, half_even):
    """The definition in Python integers and fractions, which neither overflow nor round."""
    sums = x.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    rows = []
    for row in sums.tolist():
        levels = []
        for total, m, e, b in zip(row, multiplier.tolist(), shift.tolist(), bias.tolist(), strict=True):
            value = Fraction((total + b) * m, 2**e)
            level = round(value) if half_even else (2 * value.numerator + value.denominator) // (2 * value.denominator)
            levels.append(min(max(level, q_min), q_max))
        rows.append(levels)
    return rows


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("ratio", [1e-2, 1e-5, 1e-9])  # shifts of about 37, 47 (int64 on the CPU) and 60
@pytest.mark.parametrize("half_even", [False, True])
def test_it_equals_exact_fractions(path, dtype, ratio, half_even):
    x, weight, multiplier, shift, bias = inputs(5, 7, 40, dtype, ratio)
    for q_min, q_max in RANGES:
        found = int_matmul(
            x, weight, multiplier, shift, q_min=q_min, q_max=q_max, bias=bias,
            rounding="half_even" if half_even else "half_up",
        )  # fmt: skip
        assert found.tolist() == exact(x, weight, multiplier, shift, bias, q_min, q_max, half_even)


@pytest.mark.parametrize(
    ("total", "half_up", "half_even"),
    [(1, 1, 0), (3, 2, 2), (5, 3, 2), (-1, 0, 0), (-3, -1, -2), (-5, -2, -2), (2, 1, 1)],
)
def test_ties_go_as_the_rounding_says(path, total, half_up, half_even):
    half = dyadic(torch.tensor([0.5]))
    for rounding, expected in (("half_up", half_up), ("half_even", half_even)):
        found = int_matmul(
            torch.tensor([[total]], dtype=torch.int8), torch.ones(1, 1, dtype=torch.int8), *half,
            q_min=-128, q_max=127, rounding=rounding,
        )  # fmt: skip
        assert found.item() == expected


@pytest.mark.parametrize(("m", "n"), [(0, 3), (1, 1), (1, 300_000), (3, 131_072), (700, 400), (257, 1023)])
@pytest.mark.parametrize("q", RANGES)
@pytest.mark.parametrize("half_even", [False, True])
def test_pieces_on_the_cpu_change_nothing(m, n, q, half_even):
    arguments = inputs(m, n, 3, ratio=1e-2)
    assert torch.equal(cpu.forward(*arguments, *q, half_even), reference.forward(*arguments, *q, half_even))


@pytest.mark.parametrize("half_even", [False, True])
def test_float64_is_exact_up_to_the_largest_shift_it_is_used_for(half_even):
    # Sums whose result lies one unit of 2^-44 beside a tie, or on it: the hardest cases for 53 bits.
    multiplier, shift = torch.tensor([2**31 - 1], dtype=torch.int32), torch.tensor([cpu.EXACT_SHIFT], dtype=torch.int32)
    halves = torch.arange(-2 * 260, 2 * 260)
    middle = (halves * 2 ** (cpu.EXACT_SHIFT - 1)) // (2**31 - 1)
    total = (middle[:, None] + torch.arange(-3, 4)).view(-1, 1)
    for q in RANGES:
        found = cpu.requantized(total.int(), multiplier, shift, None, *q, half_even)
        assert torch.equal(found, reference.requantize(total, multiplier, shift, None, *q, half_even))


@settings(max_examples=40, deadline=None)
@given(
    ratio=st.floats(2**-40, 2**20), total=st.lists(st.integers(-(2**30), 2**30), min_size=1, max_size=20),
    bias=st.integers(-(2**31), 2**31 - 1), q=st.sampled_from(RANGES), half_even=st.booleans(),
)  # fmt: skip
def test_requantization_never_overflows_or_rounds_wrongly(ratio, total, bias, q, half_even):
    multiplier, shift = dyadic(torch.tensor([ratio], dtype=torch.float64))
    sums, added = torch.tensor(total, dtype=torch.int32)[:, None], torch.tensor([bias], dtype=torch.int32)
    expected = []
    for one in total:
        value = Fraction((one + bias) * int(multiplier), 2 ** int(shift))
        level = round(value) if half_even else (value + Fraction(1, 2)).__floor__()
        expected.append([min(max(level, q[0]), q[1])])
    for function in (cpu.requantized, reference.requantize):
        assert function(sums, multiplier, shift, added, *q, half_even).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_the_longest_sum_of_the_largest_codes_is_exact(path, dtype):
    k = longest_sum(dtype)
    x = torch.full((1, k), -128 if dtype == torch.int8 else 255, dtype=dtype)
    total = k * int(x[0, 0]) * -128
    found = int_matmul(
        x,
        torch.full((2, k), -128, dtype=torch.int8),
        *dyadic(torch.full((2,), 100 / abs(total))),
        q_min=-128,
        q_max=127,
    )
    expected = 100 if total > 0 else -100
    assert found.tolist() == [[expected, expected]] and abs(total) <= 2**30


def test_processors_without_8_bit_products_get_the_same(monkeypatch):
    arguments = (*inputs(9, 17, 100), -128, 127, False)
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: False)
    assert torch.equal(cpu.forward(*arguments), reference.forward(*arguments))


def test_leading_dimensions_and_strides_of_x_do_not_matter(path):
    x, weight, multiplier, shift, bias = inputs(12, 5, 8)
    flat = int_matmul(x, weight, multiplier, shift, q_min=0, q_max=255, bias=bias)
    assert flat.dtype == torch.uint8
    strided = torch.stack([x, x], -1)[..., 0].view(3, 4, 8)
    assert torch.equal(int_matmul(strided, weight, multiplier, shift, q_min=0, q_max=255, bias=bias).view(12, 5), flat)
    one = int_matmul(x[0], weight, multiplier, shift, q_min=0, q_max=255, bias=bias)
    assert torch.equal(one, flat[0])


@settings(max_examples=100, deadline=None)
@given(ratio=st.floats(2**-31, 2**29))
def test_dyadic_is_within_half_a_unit_of_31_bits(ratio):
    m, e = (int(t) for t in dyadic(torch.tensor(ratio, dtype=torch.float64)))
    assert 2**30 <= m < 2**31 and 1 <= e <= 62
    assert abs(Fraction(m, 2**e) - Fraction(ratio)) <= Fraction(ratio) / 2**31


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (1.0, (2**30, 30)), (0.75, (3 * 2**29, 31)), (1 - 2.0**-40, (2**30, 30)),  # the last fraction rounds to 1
        (2.0**-40, (2**22, 62)), (2.0**-62, (1, 62)), (2.0**-63, (1, 62)), (2.0**29, (2**30, 1)),
    ],
)  # fmt: skip
def test_dyadic_by_hand(ratio, expected):
    m, e = dyadic(torch.tensor([ratio], dtype=torch.float64))
    assert (int(m), int(e)) == expected and m.dtype == e.dtype == torch.int32


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0.0, r"dyadic: ratio\[1\] is 0, a dead scale; expected 2\^-63 to below 2\^30"),
        (-1.0, r"dyadic: ratio\[1\] is -1, not a scale"), (float("nan"), r"ratio\[1\] is nan, not a scale"),
        (float("inf"), r"ratio\[1\] is inf"), (2.0**30, r"ratio\[1\] is 1.07374e\+09"), (2.0**-70, "a dead scale"),
        (2.0**30 - 0.125, r"ratio\[1\] is 1.07374e\+09"),  # its fraction rounds to 1, which needs a shift of 0
    ],
)  # fmt: skip
def test_ratios_that_no_pair_stands_for_are_refused(ratio, message):
    with pytest.raises(ValueError, match=message):
        dyadic(torch.tensor([1.0, ratio], dtype=torch.float64))


def test_ratios_that_are_no_floating_point_tensor_with_values_are_refused():
    with pytest.raises(TypeError, match="dyadic: ratio is int64, expected float32"):
        dyadic(torch.tensor([1]))
    with pytest.raises(TypeError, match="dyadic: ratio is float, expected a tensor"):
        dyadic(0.5)
    with pytest.raises(ValueError, match="dyadic: ratio is on meta, expected a device that holds values"):
        dyadic(torch.ones(1, device="meta"))


def test_the_longest_sum_of_another_dtype_is_refused():
    with pytest.raises(TypeError, match="longest_sum: dtype is torch.int32, expected torch.int8 or torch.uint8"):
        longest_sum(torch.int32)


X, W, M, E, B = inputs(2, 3, 4)
VALID = {"x": X, "weight": W, "multiplier": M, "shift": E, "q_min": -128, "q_max": 127}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X.float()}, TypeError, "int_matmul: x is float32, expected int8, uint8"),
        ({"x": X[0, 0]}, ValueError, r"int_matmul: x has no dimensions, expected \(..., 4\)"),
        ({"weight": W.int()}, TypeError, "weight is int32, expected int8"),
        ({"weight": W[:, :3]}, ValueError, r"weight has shape \(3, 3\), expected \(N, 4\)"),
        ({"weight": W[:0]}, ValueError, r"weight is empty, shape \(0, 4\)"),
        ({"weight": W.t().contiguous().t()}, ValueError, "weight has strides .*call .contiguous"),
        ({"weight": W.to("meta")}, ValueError, "weight is on meta, x on cpu"),
        ({"multiplier": M.long()}, TypeError, "multiplier is int64, expected int32"),
        ({"shift": E[:2]}, ValueError, r"shift has shape \(2,\), expected \(3,\)"),
        ({"bias": B.to("meta")}, ValueError, "bias is on meta, x on cpu"),
        ({"q_max": 255}, ValueError, r"q_min and q_max are -128 and 255, expected a range in \[-128, 127\] or \[0, 255\]"),
        ({"q_min": 3, "q_max": 3}, ValueError, "q_min and q_max are 3 and 3"),
        ({"rounding": "down"}, ValueError, "rounding is 'down', expected one of 'half_up', 'half_even'"),
        (
            {"x": torch.zeros(1, 65537, dtype=torch.int8), "weight": torch.zeros(3, 65537, dtype=torch.int8)},
            ValueError, "K is 65537, expected at most 65536 so that sums cannot overflow",
        ),
        ({"q_min": -1.5}, TypeError, "int_matmul: q_min is -1.5, expected an integer"),
        ({"q_max": float("nan")}, TypeError, "int_matmul: q_max is nan, expected an integer"),
        ({"shift": torch.zeros_like(E)}, ValueError, "int_matmul: shift is 0, expected 1 to 62"),
        ({"shift": torch.full_like(E, -1)}, ValueError, "int_matmul: shift is -1, expected 1 to 62"),
        ({"shift": torch.full_like(E, 63)}, ValueError, "int_matmul: shift is 63, expected 1 to 62"),
        ({"shift": torch.tensor([1, 70, 2]).int()}, ValueError, "int_matmul: shift has values from 1 to 70"),
        ({"multiplier": torch.zeros_like(M)}, ValueError, "int_matmul: multiplier is 0, expected at least 1"),
        ({"multiplier": torch.tensor([1, -5, 2]).int()}, ValueError, "int_matmul: multiplier has values from -5 to 2"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        int_matmul(**{**VALID, **change})


@pytest.mark.parametrize("q_max", [127, 255])
def test_opcheck_accepts_the_registration(q_max):
    torch.library.opcheck(torch.ops.eff.int_matmul.default, (X, W, M, E, B, 0, q_max, False))


def test_it_compiles_into_one_graph():
    compiled = torch.compile(int_matmul, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**VALID), int_matmul(**VALID))


def test_inputs_are_not_written_to(path):
    kept = [t.clone() for t in (X, W, M, E, B)]
    int_matmul(X, W, M, E, q_min=0, q_max=255, bias=B)
    assert all(torch.equal(one, other) for one, other in zip(kept, (X, W, M, E, B), strict=True))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("with_bias", [True, False])
def test_scaled_sums_are_those_of_numpy(path, dtype, with_bias):
    x, weight, *_ = inputs(30, 7, 300, dtype)
    scale, bias = torch.rand(2, 7, generator=torch.Generator().manual_seed(1))
    expected = (x.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T) * scale.numpy().astype(np.float64)
    expected = expected + (bias.numpy() if with_bias else 0)
    found = scaled_int_matmul(x.view(5, 6, 300), weight, scale, bias if with_bias else None)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.view(30, 7).numpy(), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X.float()}, TypeError, "scaled_int_matmul: x is float32, expected int8, uint8"),
        ({"scale": torch.ones(3).double()}, TypeError, "scaled_int_matmul: scale is float64, expected float32"),
        ({"scale": torch.ones(2)}, ValueError, r"scale has shape \(2,\), expected \(3,\)"),
        ({"bias": torch.ones(4)}, ValueError, r"bias has shape \(4,\), expected \(3,\)"),
        ({"scale": None}, TypeError, "scale is NoneType, expected a tensor of float32"),
        ({"scale": torch.ones(3).requires_grad_()}, ValueError, "scale asks for a gradient, .* expected it detached"),
        ({"bias": torch.ones(3).to_sparse()}, TypeError, "bias is sparse_coo, expected a dense tensor"),
    ],
)
def test_wrong_arguments_of_the_scaled_product_are_named(change, error, message):
    with pytest.raises(error, match=message):
        scaled_int_matmul(**{"x": X, "weight": W, "scale": torch.ones(3), "bias": torch.zeros(3), **change})


def test_the_scaled_product_is_registered_and_compiles():
    arguments = (X, W, torch.ones(3), torch.zeros(3))
    torch.library.opcheck(torch.ops.eff.scaled_int_matmul.default, arguments)
    compiled = torch.compile(scaled_int_matmul, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), scaled_int_matmul(*arguments))
