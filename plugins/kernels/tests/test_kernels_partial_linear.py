"""partial_linear against autograd of a whole weight; what it keeps; the operator; bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from eff_kernels.partial_linear import partial_linear
from eff_kernels.partial_linear.bench import RANK, kept_bytes, peft_layer
from eff_kernels.partial_linear.library import partial_linear_op

# One product each: half dtypes round their results once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}


def arguments(shape=(3, 7), out=5, r=2, dtype=torch.float32, scale=1.0, seed=0, master=None):
    """Return x, weight, p, index, bias; the weight holds scale * p."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(out, shape[-1], generator=generator, dtype=torch.float64).to(dtype)
    index = torch.randperm(shape[-1], generator=generator)[:r]
    p = (weight[:, index].double() / scale).to(master or dtype)
    return (
        x.requires_grad_(),
        weight,
        p.requires_grad_(),
        index,
        torch.randn(out, generator=generator).to(dtype).requires_grad_(),
    )


def check(dtype, shape, out, r, scale=1.0, seed=0):
    x, weight, p, index, bias = arguments(shape, out, r, dtype, scale, seed)
    whole = weight.clone().requires_grad_()
    expected = F.linear(x, whole, bias)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = partial_linear(x, weight, p, index, bias, scale=scale)
    torch.testing.assert_close(y, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    dx, dw, db = torch.autograd.grad(expected, (x, whole, bias), dy)
    found = torch.autograd.grad(y, (x, p, bias), dy)
    for own, other in zip(found, (dx, scale * dw[:, index], db), strict=True):
        torch.testing.assert_close(own, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("path", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_gradients_are_those_of_the_columns_of_the_whole_weight(path, dtype, monkeypatch):
    monkeypatch.setenv("EFF_KERNELS", path)
    check(dtype, (4, 6, 9), 5, 3)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), out=st.integers(1, 6), scale=st.sampled_from([0.25, 1.0, 4.0]),
    data=st.data(),
)  # fmt: skip
def test_any_shape(shape, out, scale, data):
    check(torch.float64, tuple(shape), out, data.draw(st.integers(1, shape[-1])), scale, data.draw(st.integers(0, 99)))


def test_gradients_hold_numerically():
    """p enters through the weight alone, so the numerical check writes it there."""
    x, weight, p, index, bias = arguments(dtype=torch.float64)

    class Written(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, p, bias):
            return F.linear(x, weight.index_copy(1, index, p), bias)

    torch.autograd.gradcheck(lambda x, bias: partial_linear(x, weight, p, index, bias), (x, bias))
    y = partial_linear(x, weight, p, index, bias)
    dy = torch.randn_like(y)
    (dp,) = torch.autograd.grad(y, p, dy)
    for row, column in ((0, 0), (4, 1)):
        step = torch.zeros_like(p)
        step[row, column] = 1e-6
        difference = Written.apply(x, p + step, bias) - Written.apply(x, p - step, bias)
        assert float((difference * dy).sum().detach() / 2e-6) == pytest.approx(
            float(dp[row, column].detach()), rel=1e-6
        )


def test_only_the_chosen_columns_of_the_input_are_kept():
    x, weight, p, index, bias = arguments((100, 64), 32, 4)
    weight = torch.nn.Parameter(weight, requires_grad=False)
    assert kept_bytes(lambda: partial_linear(x, weight, p, index, bias), weight) == 100 * 4 * 4
    trained = torch.nn.Parameter(weight.clone())
    assert kept_bytes(lambda: F.linear(x, trained, bias), trained) == 100 * 64 * 4
    assert kept_bytes(lambda: partial_linear(x, weight, p.detach(), index), weight) == 0  # nothing is trained here


def test_lora_of_peft_keeps_the_whole_input_and_its_product():
    pytest.importorskip("peft", reason="needs peft")
    x, weight, *_ = arguments((100, 64), 32, 4)
    layer = peft_layer(weight)
    y = F.linear(x, weight)
    torch.testing.assert_close(layer(x), y)  # at the start
    assert kept_bytes(lambda: layer(x), weight, *layer.parameters()) == 100 * (64 + RANK) * 4


def test_a_weight_that_can_be_made_again_is_not_kept():
    x, weight, p, index, _ = arguments((10, 8), 6, 2)
    made = []

    def again():
        made.append(1)
        return weight.clone()

    assert kept_bytes(lambda: partial_linear(x, weight.clone(), p, index, again=again)) == 10 * 2 * 4
    one = torch.autograd.grad(partial_linear(x, weight, p, index, again=again).sum(), (x, p))
    two = torch.autograd.grad(partial_linear(x, weight, p, index).sum(), (x, p))
    assert made and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_p_may_have_more_bits_than_the_weight():
    x, weight, p, index, _ = arguments(dtype=torch.bfloat16, master=torch.float32)
    (dp,) = torch.autograd.grad(partial_linear(x, weight, p, index).sum(), p)
    assert dp.dtype == torch.float32


def test_a_weight_of_more_bits_is_converted_for_the_product():
    x, weight, p, index, bias = arguments(dtype=torch.float32)
    y = partial_linear(x.bfloat16(), weight, p, index, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, F.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))
    dx, dp, db = torch.autograd.grad(y.float().sum(), (x, p, bias))
    assert dx.dtype == dp.dtype == db.dtype == torch.float32


def test_the_operator_is_registered_properly():
    x, weight, p, index, bias = arguments((2, 3, 7))
    torch.library.opcheck(partial_linear_op, (x, weight, p, index, bias, 0.5))
    torch.library.opcheck(partial_linear_op, (x.detach(), weight, p.detach(), index, None, 1.0))


def test_it_works_under_compile():
    x, weight, p, index, bias = arguments()

    def loss(x, p, bias):
        return partial_linear(x, weight, p, index, bias, scale=2.0).square().sum()

    compiled = torch.compile(loss, backend="aot_eager")
    for own, other in zip(
        torch.autograd.grad(compiled(x, p, bias), (x, p, bias)),
        torch.autograd.grad(loss(x, p, bias), (x, p, bias)),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 3).int()}, TypeError, "partial_linear: x is int32, expected float32"),
        ({"weight": torch.ones(4, 3).int()}, TypeError, "weight is int32, expected float32"),
        ({"weight": torch.ones(4, 5)}, ValueError, r"weight has shape \(4, 5\), expected \(out, 3\)"),
        ({"index": torch.tensor([0.0, 1.0])}, TypeError, "index is float32, expected int64"),
        ({"index": torch.tensor([0, 3])}, ValueError, "index has values from 0 to 3, expected 0 to 2"),
        ({"index": torch.tensor([-1, 1])}, ValueError, "index has values from -1 to 1, expected 0 to 2"),
        ({"index": torch.tensor([], dtype=torch.int64)}, ValueError, "index 0 entries, expected at least one"),
        ({"index": torch.tensor([2, 2])}, ValueError, "index has 2 twice, expected each entry once"),
        ({"scale": math.nan}, ValueError, "scale is nan, expected a finite number"),
        ({"scale": None}, TypeError, "scale is None, expected a number"),
        ({"again": torch.ones(4, 3)}, TypeError, "again is Tensor, expected a function that returns the weight"),
        ({"p": torch.ones(4, 3)}, ValueError, r"p has shape \(4, 3\), expected \(4, 2\)"),
        ({"bias": torch.ones(3)}, ValueError, r"bias has shape \(3,\), expected \(4,\)"),
        ({"bias": torch.ones(4).int()}, TypeError, "bias is int32, expected float32"),
        ({"bias": torch.ones(4, device="meta")}, ValueError, "bias is on meta, x on cpu; expected one device"),
        ({"p": torch.ones(4, 2, device="meta")}, ValueError, "p is on meta, x on cpu; expected one device"),
    ],
)
def test_wrong_arguments_are_refused(change, error, message):
    given = {"x": torch.ones(2, 3), "weight": torch.ones(4, 3), "p": torch.ones(4, 2), "index": torch.tensor([0, 2])}
    with pytest.raises(error, match=message):
        partial_linear(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"p": torch.ones(3, 2)}, ValueError, r"p has shape \(3, 2\), expected \(4, 2\)"),
        ({"weight": torch.ones(4, 5)}, ValueError, r"weight has shape \(4, 5\), expected \(out, 3\)"),
        ({"index": torch.tensor([0, 2], dtype=torch.int32)}, TypeError, "index is int32, expected int64"),
        ({"bias": torch.ones(3)}, ValueError, r"bias has shape \(3,\), expected \(4,\)"),
    ],
)
def test_compiling_checks_shapes_and_dtypes_too(change, error, message):
    given = {"x": torch.ones(2, 3), "weight": torch.ones(4, 3), "p": torch.ones(4, 2), "index": torch.tensor([0, 2])}
    with pytest.raises(error, match=f"partial_linear: {message}"):
        torch.compile(partial_linear, backend="eager")(**{**given, **change})
