"""adamp_step_ against a float64 loop written from the paper's equations; both paths, many shapes, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eff_kernels.adamp_step import adamp_step_, cpu, reference
from eff_kernels.adamp_step.library import adamp_step_op

OPTIONS = {
    "lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "delta": 0.1, "wd_ratio": 0.1, "nesterov": False,
}  # fmt: skip
SHAPES = ((6, 3, 3, 3), (6,), (5, 36), (1, 40), (40, 1), (3,), (300, 260), (0, 4))
# One step: float32 rounding of m, v, w and of sums of up to 78000 terms; half precision of what is stored.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def state(dtype=torch.float32, shapes=SHAPES, seed=0, orthogonal=False):
    """Return weights, gradients, m, v and counts; gradients without a part along the weight where asked for."""
    generator = torch.Generator().manual_seed(seed)
    params, grads = (
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(2)
    )
    if orthogonal:
        for w, g in zip(params, grads, strict=True):
            if not w.numel():
                continue
            flat_w, flat_g = w.view(len(w), -1), g.view(len(w), -1)
            flat_g -= flat_w * ((flat_g * flat_w).sum(1) / flat_w.square().sum(1))[:, None]
    first = [0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    second = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    lists = [[tensor.to(dtype) for tensor in tensors] for tensors in (params, grads, first, second)]
    return [*lists, [3.0 + index for index in range(len(shapes))]]


def copied(lists):
    return [[tensor.clone() for tensor in tensors] for tensors in lists[:4]] + [lists[4]]


def by_loop(params, grads, first, second, counts, *, lr, betas, eps, weight_decay, delta, wd_ratio, nesterov):
    """The card's procedure in float64, row by row."""
    found = []
    for w, g, m, v, t in zip(params, grads, first, second, counts, strict=True):
        w, g, m, v = (tensor.double() for tensor in (w, g, m, v))
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        u = (betas[0] * m + (1 - betas[0]) * g if nesterov else m) / (v.sqrt() / math.sqrt(1 - betas[1] ** t) + eps)
        ratio = 1.0
        for rows in (len(w), 1) if w.ndim > 1 and w.numel() else ():
            views = [tensor.reshape(rows, -1) for tensor in (w, g, u)]
            cosines = [
                abs(float(a @ b)) / (max(float(a.norm()), eps) * max(float(b.norm()), eps))
                for a, b in zip(*views[:2], strict=True)
            ]
            if max(cosines) < delta / math.sqrt(views[0].shape[1]):
                parts = [
                    c - a / (a.norm() + eps) * float(a / (a.norm() + eps) @ c) for a, _, c in zip(*views, strict=True)
                ]
                u, ratio = torch.stack(parts).reshape(w.shape), wd_ratio
                break
        found.append((w * (1 - lr * weight_decay * ratio) - lr / (1 - betas[0] ** t) * u, m, v, ratio))
    return found


@pytest.mark.parametrize("path", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("nesterov", "orthogonal"), [(False, False), (True, True), (False, True)])
def test_a_step_is_the_papers(path, dtype, nesterov, orthogonal, monkeypatch):
    monkeypatch.setenv("EFF_KERNELS", path)
    lists = state(dtype, orthogonal=orthogonal)
    options = {**OPTIONS, "nesterov": nesterov}
    expected = by_loop(*copied(lists), **options)
    adamp_step_(*lists, **options)
    for w, m, v, row in zip(lists[0], lists[2], lists[3], expected, strict=True):
        for found, wanted in zip((w, m, v), row, strict=False):
            torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    projected = [row[3] < 1 for row in expected]
    assert any(projected) or not orthogonal
    assert not all(projected)  # weights of one dimension never are


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 12), length=st.integers(1, 40), piece=st.integers(1, 100), seed=st.integers(0, 50))
def test_pieces_of_any_size_give_the_reference(rows, length, piece, seed):
    before = cpu.PIECE
    cpu.PIECE = piece
    try:
        lists = state(torch.float64, ((rows, length),), seed, orthogonal=bool(seed % 2))
        expected = copied(lists)
        reference.adamp_step_(*expected, *OPTIONS.values())
        cpu.adamp_step_(*lists, *OPTIONS.values())
    finally:
        cpu.PIECE = before
    for found, wanted in zip(lists[:4], expected[:4], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_a_gradient_that_is_orthogonal_as_a_whole_only_is_projected_as_a_whole():
    w = torch.ones(2, 300, 300)
    g = torch.cat([w[:1], -w[1:]])
    lists = [[w], [g], [torch.zeros_like(w)], [torch.zeros_like(w)], [1.0]]
    expected = copied(lists)
    reference.adamp_step_(*expected, *OPTIONS.values())
    cpu.adamp_step_(*lists, *OPTIONS.values())
    torch.testing.assert_close(lists[0], expected[0])
    assert float((lists[0][0] - 1 + 0.01 * 0.1 * 0.1).abs().max()) > 0.005


def test_weights_that_are_not_contiguous_step_as_the_others():
    lists = state(shapes=((300, 260), (8, 4, 3, 3)))
    strided = copied(lists)
    strided[0] = [
        tensor.t().contiguous().t() if tensor.ndim == 2 else tensor.to(memory_format=torch.channels_last)
        for tensor in strided[0]
    ]
    adamp_step_(*lists, **OPTIONS)
    adamp_step_(*strided, **OPTIONS)
    torch.testing.assert_close(strided[0], lists[0], rtol=1e-5, atol=1e-6)


def test_the_operator_is_registered_properly():
    lists = state(shapes=((4, 5), (3,)))
    options = [0.01, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.1, False]
    torch.library.opcheck(adamp_step_op, (*lists, *options))
    eager = copied(lists)
    adamp_step_op(*lists, *options)
    adamp_step_(*eager, **OPTIONS)
    torch.testing.assert_close(lists[0], eager[0])


def test_it_works_under_compile():
    lists = state(shapes=((4, 5), (3,)))
    eager = copied(lists)
    torch.compile(lambda *tensors: adamp_step_(*tensors, **OPTIONS), backend="aot_eager")(*lists)
    adamp_step_(*eager, **OPTIONS)
    torch.testing.assert_close(lists[0], eager[0])


@pytest.mark.parametrize("path", ["reference", "cpu"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_weights(path, value, monkeypatch):
    """One entry of one row; nothing is projected then, as a comparison with NaN is false."""
    monkeypatch.setenv("EFF_KERNELS", path)
    lists = state(shapes=((300, 260), (4, 5), (3,)), orthogonal=True)
    for grad in lists[1]:
        grad.view(-1)[0] = value
    expected = by_loop(*copied(lists), **OPTIONS)
    adamp_step_(*lists, **OPTIONS)
    for w, row in zip(lists[0], expected, strict=True):
        assert w.view(-1)[0].isnan() and w.isnan().sum() == 1 and row[3] == 1.0
        torch.testing.assert_close(w.double(), row[0], rtol=2e-5, atol=2e-5, equal_nan=True)


def test_without_a_kernel_no_weight_is_waited_for():
    """On such a device the host must not decide anything: on "meta" a decision would raise."""
    meta = [[tensor.to("meta") for tensor in tensors] for tensors in state()[:4]]
    adamp_step_(*meta, [1.0] * len(SHAPES), **OPTIONS)


def test_a_rate_may_be_a_tensor():
    lists = state()
    expected = copied(lists)
    adamp_step_(*lists, **{**OPTIONS, "lr": torch.tensor(0.01, dtype=torch.float64)})
    adamp_step_(*expected, **OPTIONS)
    assert all(torch.equal(found, wanted) for found, wanted in zip(lists[0], expected[0], strict=True))


def test_nothing_to_do_is_no_error():
    adamp_step_([], [], [], [], [], lr=0.1)


def one(**change):
    w = torch.ones(2, 3)
    lists = {"params": [w], "grads": [w.clone()], "exp_avgs": [w.clone()], "exp_avg_sqs": [w.clone()], "counts": [1.0]}
    return {**lists, "lr": 0.1, **change}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grads": []}, ValueError, "adamp_step: grads has 0 entries, expected 1 as params"),
        ({"counts": []}, ValueError, "adamp_step: counts has 0 entries, expected 1"),
        ({"grads": [torch.ones(3, 2)]}, ValueError, r"grads\[0\] has shape \(3, 2\), expected \(2, 3\)"),
        ({"exp_avgs": [torch.ones(2, 3).half()]}, TypeError, r"exp_avgs\[0\] is float16, expected float32"),
        ({"params": [torch.ones(2, 3).int()]}, TypeError, r"params\[0\] is int32, expected float32, float16"),
        (
            {"exp_avg_sqs": [torch.ones(2, 3, device="meta")]},
            ValueError,
            r"exp_avg_sqs\[0\] is on meta, params\[0\] on cpu",
        ),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] is 1.0, expected at least 0 and below 1"),
        ({"wd_ratio": 2.0}, ValueError, "wd_ratio is 2.0, expected 0 to 1"),
        ({"eps": 0.0}, ValueError, "eps is 0.0, expected above 0"),
        ({"delta": math.nan}, ValueError, "delta is nan, expected a finite number"),
        ({"lr": -1.0}, ValueError, "lr is -1.0, expected at least 0"),
        ({"lr": torch.tensor(math.nan)}, ValueError, "lr is nan, expected a finite number"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay is -0.1, expected at least 0"),
        ({"lr": math.inf}, ValueError, "lr is inf, expected a finite number"),
        ({"lr": "fast"}, TypeError, "lr is 'fast', expected a number"),
        ({"lr": torch.ones(2)}, ValueError, r"lr has shape \(2,\), expected one number"),
        ({"lr": True}, TypeError, "lr is True, expected a number"),
        ({"eps": None}, TypeError, "eps is None, expected a number"),
        ({"betas": 0.9}, TypeError, "betas is 0.9, expected two numbers"),
        ({"betas": (0.9, None)}, TypeError, r"betas\[1\] is None, expected a number"),
        ({"nesterov": "no"}, TypeError, "nesterov is 'no', expected True or False"),
        ({"grads": torch.ones(1, 2, 3)}, TypeError, "grads is Tensor, expected a list or tuple"),
        ({"grads": [None]}, TypeError, r"grads\[0\] is NoneType, expected a tensor of float32"),
        ({"grads": [torch.ones(2, 3).to_sparse()]}, TypeError, r"grads\[0\] is sparse_coo, expected a dense tensor"),
        ({"counts": [None]}, TypeError, r"counts\[0\] is None, expected a number"),
        ({"params": [torch.ones(2, 3).requires_grad_()]}, ValueError, r"params\[0\] asks for a gradient .*no_grad"),
        ({"exp_avgs": [torch.zeros(2, 1).expand(2, 3)]}, ValueError, r"exp_avgs\[0\] is expanded, strides \(1, 0\)"),
        ({"counts": [0.0]}, ValueError, r"counts\[0\] is 0.0, expected at least 1: this step is counted"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_changes(change, error, message):
    arguments = one(**change)
    with pytest.raises(error, match=message):
        adamp_step_(**arguments)
    assert arguments["params"][0].device.type == "meta" or arguments["params"][0].eq(1).all()
