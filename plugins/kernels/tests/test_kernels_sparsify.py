"""sparsify against numpy's sort and the card's procedure step by step; error feedback as identities; bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eff_kernels.sparsify import cpu, densify, dgc_step, dgc_step_, reference, sparsify
from eff_kernels.sparsify.library import accumulate_op, sparsify_op
from eff_kernels.sparsify.plan import make_plan

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ARGUMENTS = {"upper": 1.3, "lower": 0.8, "max_iterations": 10, "resample": True}


@pytest.fixture(params=["reference", "cpu"])
def path(request, monkeypatch):
    monkeypatch.setenv("EFF_KERNELS", request.param)
    return request.param


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_card(v, ratio, start, upper=1.3, lower=0.8, iterations=10, resample=True, sample_ratio=0.01):
    """The card's procedure in numpy."""
    flat = np.abs(v.double().numpy().ravel())
    n, keep = len(flat), math.ceil(v.numel() * ratio)
    least = max(math.ceil(n * sample_ratio), math.ceil(2 / ratio))
    stride = math.ceil(n / least / 32) * 32 + 1
    while n // stride < least:
        stride -= 8
    samples = np.sort(flat[start::stride])[::-1]
    threshold = samples[math.ceil(len(samples) * ratio) - 1]
    for _ in range(iterations):
        found = np.flatnonzero(flat >= threshold)
        if len(found) > upper * keep:
            if resample:
                return set(found[np.argsort(-flat[found], kind="stable")[:keep]])
            threshold *= upper
        elif len(found) < lower * keep:
            threshold *= lower
        else:
            break
    return set(np.flatnonzero(flat >= threshold)[:keep])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("resample", [True, False])
@pytest.mark.parametrize(("size", "ratio"), [(40_000, 0.01), (100_000, 0.002), (30_001, 0.05)])
def test_the_entries_are_those_of_the_card(path, size, ratio, resample, seed):
    v = random(size, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    start = make_plan(size, ratio, 0.01, torch.Generator().manual_seed(seed)).start
    values, indices = sparsify(v, ratio, resample=resample, generator=generator)
    assert set(indices.tolist()) == by_card(v, ratio, start, resample=resample)
    assert torch.equal(values, v[indices])
    assert len(indices) <= math.ceil(size * ratio)


def test_heavy_tails_make_the_threshold_adapt(path):
    """Samples that miss the few large entries give a threshold that far too many pass, and the reverse."""
    for v in (random(50_000) ** 7, torch.where(torch.arange(50_000) % 33 == 0, 10.0, 1.0) * random(50_000)):
        v = v.double()
        for resample in (True, False):
            found = sparsify(v, 0.01, resample=resample)[1]
            assert set(found.tolist()) == by_card(v, 0.01, 0, resample=resample)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 19, 20])
def test_small_tensors_give_exactly_the_largest(path, size, dtype):
    v = random(size, dtype=dtype)
    values, indices = sparsify(v, 0.1)
    keep = math.ceil(0.1 * size)
    assert len(indices) == keep
    assert values.abs().double().sort().values.tolist() == v.abs().double().sort().values[-keep:].tolist()


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 3000), ratio=st.sampled_from([0.01, 0.03, 0.2, 1.0]), seed=st.integers(0, 99))
def test_the_cpu_path_is_the_reference(size, ratio, seed):
    v = random(size, seed=seed).round(decimals=1)  # ties
    plan = make_plan(size, ratio, 0.01, torch.Generator().manual_seed(seed))
    arguments = (plan.keep, plan.stride, plan.start, plan.share, *ARGUMENTS.values())
    for own, other in zip(cpu.sparsify(v, *arguments), reference.sparsify(v, *arguments), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_entries_pass_at_a_ratio_of_1_and_of_a_tensor_of_equals(path, dtype):
    v = random(5000, dtype=dtype)
    assert torch.equal(densify(*sparsify(v, 1.0), v.shape), v)
    values, indices = sparsify(torch.ones(20_000, dtype=dtype), 0.01, resample=False, max_iterations=0)
    assert indices.tolist() == list(range(200)) and values.eq(1).all()  # a surplus is cut off by place


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99), nesterov=st.booleans(), masking=st.booleans(), momentum=st.sampled_from([0.0, 0.5, 0.9])
)
def test_what_is_sent_and_what_stays_is_what_was_there(seed, nesterov, masking, momentum):
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.zeros(3, 700, dtype=torch.float64), torch.zeros(3, 700, dtype=torch.float64)
    for step in range(4):
        gradient = random(3, 700, seed=10 * seed + step).double()
        new_u = momentum * (u + gradient) if nesterov else momentum * u + gradient
        before = v + new_u + gradient if nesterov else v + new_u
        values, indices = dgc_step_(
            gradient, u, v, 0.01, momentum=momentum, nesterov=nesterov, masking=masking, generator=generator
        )
        assert torch.equal(densify(values, indices, v.shape) + v, before)
        assert v.view(-1)[indices].eq(0).all()
        expected = new_u.clone()
        if masking:
            expected.view(-1)[indices] = 0
        assert torch.equal(u, expected)


def test_without_momentum_nothing_is_lost():
    u, v, sent, total = (torch.zeros(2000, dtype=torch.float64) for _ in range(4))
    for step in range(10):
        gradient = random(2000, seed=step).double()
        total += gradient
        sent += densify(*dgc_step_(gradient, u, v, 0.02, momentum=0.0), (2000,))
    torch.testing.assert_close(sent + v, total)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [dgc_step, dgc_step_])
def test_a_gradient_that_is_not_finite_changes_nothing(path, step, value):
    """It would stay in the momentum for good; left out, the next step is as if it had not been."""
    u, v, gradient = random(3, 700), random(3, 700, seed=1), random(3, 700, seed=2)
    kept = u.clone(), v.clone()
    gradient[1, 5] = value
    with pytest.raises(
        ValueError, match="gradient holds NaN or infinity, expected finite numbers; nothing was changed"
    ):
        step(gradient, u, v, 0.01)
    assert torch.equal(u, kept[0]) and torch.equal(v, kept[1])


def test_the_step_that_returns_new_tensors_is_the_one_in_place():
    u, v, gradient = random(3, 700), random(3, 700, seed=1), random(3, 700, seed=2)
    kept = u.clone(), v.clone()
    values, indices, new_u, new_v = dgc_step(gradient, u, v, 0.01, momentum=0.5, nesterov=True)
    assert torch.equal(u, kept[0]) and torch.equal(v, kept[1])
    expected = dgc_step_(gradient, u, v, 0.01, momentum=0.5, nesterov=True)
    for found, wanted in zip((values, indices, new_u, new_v), (*expected, u, v), strict=True):
        assert torch.equal(found, wanted)
    transposed = dgc_step(gradient.t(), new_u.t(), new_v.t(), 0.01)
    assert transposed[2].is_contiguous()


def test_densify_adds_what_several_workers_send():
    values, indices = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3, 0, 3])
    assert densify(values, indices, (2, 2)).tolist() == [[2.0, 0.0], [0.0, 5.0]]


def test_the_start_of_the_sample_is_drawn_from_the_generator():
    starts = {make_plan(100_000, 0.01, 0.01, torch.Generator().manual_seed(seed)).start for seed in range(20)}
    assert len(starts) > 10
    plan = make_plan(100_000, 0.01, 0.01)
    assert plan.start == 0 and plan.stride % 2 == 1 and 100_000 // plan.stride >= 1000


def test_the_operators_are_registered_properly():
    v = random(3000)
    plan = make_plan(3000, 0.01, 0.1)
    arguments = (plan.keep, plan.stride, plan.start, plan.share, *ARGUMENTS.values())
    torch.library.opcheck(sparsify_op, (v, *arguments))
    torch.library.opcheck(accumulate_op, (v, v.clone(), v.clone(), 0.9, True))


def test_it_works_under_compile():
    def compress(v):
        values, indices = sparsify(v * 2, 0.01)
        return densify(values, indices, tuple(v.shape))

    v = random(3000)
    torch.testing.assert_close(torch.compile(compress, backend="aot_eager")(v), compress(v))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"v": torch.ones(5).int()}, TypeError, "sparsify: v is int32, expected float32"),
        ({"v": torch.ones(0)}, ValueError, r"v is empty, shape \(0,\)"),
        ({"v": torch.tensor([1.0, math.nan])}, ValueError, "v holds NaN, expected numbers"),
        ({"v": torch.cat([torch.ones(9999), torch.tensor([math.nan])])}, ValueError, "v holds NaN, expected numbers"),
        ({"ratio": 0.0}, ValueError, "ratio is 0.0, expected above 0 and at most 1"),
        ({"ratio": math.nan}, ValueError, "ratio is nan"),
        ({"ratio": 2.0}, ValueError, "ratio is 2.0"),
        ({"sample_ratio": 0.001}, ValueError, "sample_ratio is 0.001, expected 0.01 to 1"),
        ({"lower": 1.2}, ValueError, "expected 0 <= lower <= 1 <= upper"),
        ({"ratio": None}, TypeError, "ratio is None, expected a number"),
        ({"ratio": True}, TypeError, "ratio is True, expected a number"),
        ({"upper": math.inf}, ValueError, "upper is inf, expected a finite number"),
        ({"max_iterations": -1}, ValueError, "max_iterations is -1, expected 0 to"),
        ({"max_iterations": 2.5}, TypeError, "max_iterations is 2.5, expected an integer"),
        ({"resample": "no"}, TypeError, "resample is 'no', expected True or False"),
        ({"generator": 3}, TypeError, "generator is int, expected a torch.Generator"),
        ({"v": torch.ones(5, device="meta")}, ValueError, "v is on meta, expected a device that holds values"),
    ],
)
def test_wrong_arguments_are_refused(path, change, error, message):
    with pytest.raises(error, match=message):
        sparsify(**{"v": torch.ones(5), "ratio": 0.5, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gradient": torch.ones(3)}, ValueError, r"dgc_step_: gradient has shape \(3,\), expected \(2, 2\)"),
        ({"u": torch.ones(2, 2).half()}, TypeError, "u is float16, expected float32"),
        ({"v": torch.ones(2, 4)[:, ::2]}, ValueError, r"v has strides \(4, 2\), expected a contiguous tensor"),
        ({"momentum": 1.0}, ValueError, "momentum is 1.0, expected at least 0 and below 1"),
        ({"momentum": None}, TypeError, "momentum is None, expected a number"),
        ({"nesterov": 1}, TypeError, "nesterov is 1, expected True or False"),
        ({"max_iterations": -1}, ValueError, "dgc_step_: max_iterations is -1, expected 0 to"),
        ({"u": torch.ones(2, 2).requires_grad_()}, ValueError, "u asks for a gradient .*no_grad"),
        ({"u": torch.ones(2, 2, device="meta")}, ValueError, "u is on meta, v on cpu"),
    ],
)
def test_a_wrong_step_is_refused_before_anything_changes(change, error, message):
    given = {"gradient": torch.ones(2, 2), "u": torch.ones(2, 2), "v": torch.ones(2, 2), "ratio": 0.5, **change}
    with pytest.raises(error, match=message):
        dgc_step_(**given)
    assert given["v"].eq(1).all()


@pytest.mark.parametrize(
    ("values", "indices", "message"),
    [
        (torch.ones(2), torch.zeros(3, dtype=torch.int64), r"indices has shape \(3,\), expected \(2,\)"),
        (torch.ones(2, 1), torch.zeros(2, dtype=torch.int64), r"values has shape \(2, 1\), expected \(k,\)"),
        (torch.ones(1), torch.zeros(1, dtype=torch.int64, device="meta"), "densify: indices is on meta, values on cpu"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(values, indices, message):
    with pytest.raises(ValueError, match=message):
        densify(values, indices, (5,))


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        (5, TypeError, "densify: shape is 5, expected a tuple of sizes"),
        ((2.0,), TypeError, r"shape\[0\] is 2.0, expected an integer"),
        ((1, -1), ValueError, r"shape\[1\] is -1, expected at least 0"),
    ],
)
def test_a_shape_that_is_none_is_refused(shape, error, message):
    with pytest.raises(error, match=message):
        densify(torch.ones(1), torch.tensor([0]), shape)


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_outside_the_shape_is_named(index):
    with pytest.raises(IndexError, match=f"densify: indices has values from {index} to {index}, expected 0 to 4"):
        densify(torch.ones(1), torch.tensor([index]), (5,))
