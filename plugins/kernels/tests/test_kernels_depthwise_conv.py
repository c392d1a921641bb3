"""depthwise_conv against a float64 loop, scipy and autograd; the CPU's ways; memory formats; the operator; bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from eff_kernels.depthwise_conv import cpu, depthwise_conv, library, reference

# Relative to the largest value: float32 sums (and transforms) in another order; half dtypes are rounded once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FORMATS = [torch.contiguous_format, torch.channels_last]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(shape, kernel, dtype=torch.float32, memory_format=torch.contiguous_format, seed=0):
    """Return x, weight, bias, dy."""
    x, dy = (random(*shape, dtype=dtype, seed=seed + s).contiguous(memory_format=memory_format) for s in (0, 1))
    return x, random(shape[1], 1, kernel, kernel, dtype=dtype, seed=seed + 2), random(shape[1], dtype=dtype, seed=3), dy


def assert_near(found, expected, dtype):
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert float(error) <= TOLERANCE[dtype]


def check(shape, kernel, dilation=1, dtype=torch.float32, memory_format=torch.contiguous_format, seed=0):
    """Output and all gradients against torch's convolution in float64."""
    x, weight, bias, dy = arguments(shape, kernel, dtype, memory_format, seed)
    wide = [value.double().requires_grad_() for value in (x, weight, bias)]
    expected = F.conv2d(*wide, 1, dilation * (kernel // 2), dilation, shape[1])
    own = [value.clone().requires_grad_() for value in (x, weight, bias)]
    y = depthwise_conv(*own, dilation=dilation)
    assert y.dtype == dtype
    assert y.stride() == x.stride()
    assert_near(y, expected, dtype)
    for found, wanted in zip(
        torch.autograd.grad(y, own, dy), torch.autograd.grad(expected, wide, dy.double()), strict=True
    ):
        assert found.dtype == dtype
        assert_near(found, wanted, dtype)


@pytest.mark.parametrize("dilation", [1, 2])
def test_it_is_the_sum_over_taps(dilation):
    x, weight, bias, _ = arguments((2, 3, 5, 4), 3, torch.float64)
    expected = np.zeros(x.shape)
    for n, c, h, w in np.ndindex(expected.shape):
        expected[n, c, h, w] = bias[c]
        for i, j in np.ndindex(3, 3):
            row, column = h + dilation * (i - 1), w + dilation * (j - 1)
            if 0 <= row < 5 and 0 <= column < 4:
                expected[n, c, h, w] += float(weight[c, 0, i, j] * x[n, c, row, column])
    np.testing.assert_allclose(depthwise_conv(x, weight, bias, dilation=dilation), expected, rtol=1e-12, atol=1e-12)


def test_it_is_scipys_correlation():
    signal = pytest.importorskip("scipy.signal")
    x, weight, *_ = arguments((1, 2, 20, 23), 15)
    found = depthwise_conv(x, weight)
    for c in range(2):
        expected = signal.correlate2d(x[0, c].double(), weight[c, 0].double(), mode="same")
        assert_near(found[0, c], torch.from_numpy(expected), torch.float32)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("path", "dtype"),  # torch's own convolution in half precision rounds more than once
    [("reference", torch.float64), ("reference", torch.float32), *(("cpu", dtype) for dtype in TOLERANCE)],
)
def test_output_and_gradients_of_every_dtype(path, memory_format, dtype, monkeypatch):
    monkeypatch.setenv("EFF_KERNELS", path)
    check((2, 5, 9, 10), 7, 1, dtype, memory_format)
    check((2, 20, 9, 8), 13, 1, dtype, memory_format)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("kernel", [3, 5, 11, 13, 15, 31])
@pytest.mark.parametrize("dilation", [1, 2, 7])
def test_kernels_and_dilations(kernel, dilation, memory_format):
    check((2, 18, 12, 13), kernel, dilation, memory_format=memory_format)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 17), st.integers(1, 17)),
    kernel=st.integers(1, 15).map(lambda half: 2 * half + 1), dilation=st.integers(1, 6), last=st.booleans(),
    way=st.sampled_from([None, cpu.AS_IT_LIES, cpu.CHANNELS_LAST, cpu.WRITTEN_OUT, cpu.FOURIER]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_way_gives_the_same_for_any_shape(shape, kernel, dilation, last, way, seed):
    with pytest.MonkeyPatch.context() as patch:
        if way is not None:
            patch.setattr(cpu, "way", lambda *_: way)
        if way == cpu.FOURIER:
            patch.setattr(cpu, "FOURIER_WORK", 0)
        check(shape, kernel, dilation, memory_format=FORMATS[last], seed=seed)


@pytest.mark.parametrize(
    ("shape", "kernel", "dilation", "last", "way"),
    [
        ((8, 96, 28, 28), 7, 1, False, cpu.AS_IT_LIES),
        ((8, 96, 28, 28), 13, 1, False, cpu.AS_IT_LIES),
        ((8, 96, 28, 28), 13, 1, True, cpu.WRITTEN_OUT),
        ((8, 16, 28, 28), 13, 1, True, cpu.AS_IT_LIES),
        ((8, 96, 28, 28), 15, 1, False, cpu.CHANNELS_LAST),
        ((8, 96, 28, 28), 3, 2, False, cpu.CHANNELS_LAST),
        ((8, 96, 28, 28), 3, 7, False, cpu.CHANNELS_LAST),
        ((1, 8, 99, 99), 3, 20, False, cpu.CHANNELS_LAST),
        ((8, 96, 28, 28), 5, 5, False, cpu.WRITTEN_OUT),
        ((1, 16, 112, 112), 31, 1, False, cpu.FOURIER),
    ],
)
def test_the_way_for_a_shape(shape, kernel, dilation, last, way):
    x = torch.empty(shape).contiguous(memory_format=FORMATS[last])
    assert cpu.way(x, kernel, dilation) == way


@pytest.mark.parametrize("least", range(1, 200, 7))
def test_a_transforms_size_has_small_factors_only(least):
    size = cpu._fast_size(least)
    assert size >= least and 2**20 * 3**10 * 5**10 % size == 0


def test_other_layouts_other_strides_and_no_images():
    x, weight, bias, _ = arguments((2, 4, 9, 12), 5)
    view = x.transpose(2, 3)
    assert_near(depthwise_conv(view, weight, bias), reference.forward(view, weight, bias, 1), torch.float32)
    assert depthwise_conv(view, weight).is_contiguous()
    for stride in (2, 3):
        found = depthwise_conv(x, weight, bias, stride=stride, dilation=2)
        assert_near(found, F.conv2d(x, weight, bias, stride, 4, 2, 4), torch.float32)
        assert found.shape[2:] == (-(-9 // stride), -(-12 // stride))
    empty, w = torch.empty(0, 4, 9, 12, requires_grad=True), weight.clone().requires_grad_()
    y = depthwise_conv(empty, w)
    assert y.shape == empty.shape
    assert [gradient.abs().sum().item() for gradient in torch.autograd.grad(y.sum(), (empty, w))] == [0, 0]


def test_nan_is_seen_in_the_result_of_every_way(monkeypatch):
    x, weight, *_ = arguments((1, 2, 12, 12), 3)
    x[0, 0, 5, 5] = torch.nan
    for way in (cpu.AS_IT_LIES, cpu.CHANNELS_LAST, cpu.WRITTEN_OUT, cpu.FOURIER):
        monkeypatch.setattr(cpu, "way", lambda *_, way=way: way)
        y = depthwise_conv(x, weight)
        assert y[0, 0, 4:7, 4:7].isnan().all() and not y[0, 1].isnan().any(), way


def test_gradients_are_those_of_finite_differences():
    x, weight, bias, _ = (value.requires_grad_() for value in arguments((1, 2, 5, 4), 3, torch.float64))
    assert torch.autograd.gradcheck(lambda *values: depthwise_conv(*values, dilation=2), (x, weight, bias))


@pytest.mark.parametrize("trained", range(3))
def test_one_gradient_alone(trained):
    values = list(arguments((2, 3, 8, 8), 15))[:3]
    values[trained].requires_grad_()
    (found,) = torch.autograd.grad(depthwise_conv(*values).square().sum(), values[trained])
    (expected,) = torch.autograd.grad(reference.forward(*values, 1).square().sum(), values[trained])
    assert_near(found, expected, torch.float32)


def test_weight_and_bias_of_another_dtype_get_gradients_of_theirs():
    x, weight, bias, _ = arguments((1, 2, 6, 6), 7)
    weight.requires_grad_(), bias.requires_grad_()
    y = depthwise_conv(x.bfloat16(), weight, bias)
    y.float().sum().backward()
    assert (y.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_inputs_stay_as_they_are():
    values = arguments((2, 3, 8, 8), 15)
    before = [value.clone() for value in values]
    check((2, 3, 8, 8), 15)
    depthwise_conv(*values[:3])
    library.weight_gradient(values[3], values[0], 15, 1)
    assert all(torch.equal(value, old) for value, old in zip(values, before, strict=True))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_operators_are_registered_properly(memory_format):
    x, weight, bias, dy = arguments((2, 3, 7, 6), 5, memory_format=memory_format)
    values = [value.requires_grad_() for value in (x, weight, bias)]
    torch.library.opcheck(library.depthwise_conv_op, (*values, 1))
    torch.library.opcheck(library.depthwise_conv_op, (values[0], values[1], None, 2))
    torch.library.opcheck(library.depthwise_conv_weight_gradient_op, (dy, x.detach(), 5, 1))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_it_works_under_compile(memory_format):
    x, weight, bias, _ = arguments((2, 3, 8, 8), 15, memory_format=memory_format)
    values = [value.requires_grad_() for value in (x, weight, bias)]

    def loss(*values):
        return depthwise_conv(*values).square().sum()

    found = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*values), values)
    for own, other in zip(found, torch.autograd.grad(loss(*values), values), strict=True):
        assert_near(own, other, torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(1, 2, 4, 4, dtype=torch.int64)}, TypeError, "depthwise_conv: x is int64, expected float32"),
        ({"weight": torch.ones(2, 1, 3, 3, dtype=torch.int8)}, TypeError, "weight is int8"),
        ({"bias": torch.ones(2, dtype=torch.int32)}, TypeError, "bias is int32"),
        ({"x": torch.ones(2, 4, 4)}, ValueError, r"x has shape \(2, 4, 4\), expected \(N, C, H, W\)"),
        ({"x": torch.ones(1, 2, 0, 4)}, ValueError, "expected at least one channel, row and column"),
        ({"weight": torch.ones(3, 1, 3, 3)}, ValueError, r"weight has shape \(3, 1, 3, 3\), expected \(2, 1, k, k\)"),
        ({"weight": torch.ones(2, 1, 3, 5)}, ValueError, r"expected \(2, 1, 3, 3\)"),
        ({"weight": torch.ones(2, 1, 4, 4)}, ValueError, "kernel height is 4, expected one of 3, 5, 7"),
        ({"weight": torch.ones(2, 1, 33, 33)}, ValueError, "kernel height is 33, expected one of 3, 5, 7"),
        ({"weight": torch.ones(2, 1, 3, 3, device="meta")}, ValueError, "weight is on meta, x on cpu"),
        ({"bias": torch.ones(3)}, ValueError, r"bias has shape \(3,\), expected \(2,\)"),
        ({"stride": 0}, ValueError, "stride is 0, expected 1 to 2147483647"),
        ({"dilation": 0}, ValueError, "dilation is 0, expected 1 to 2147483647"),
        ({"stride": 1.5}, TypeError, "depthwise_conv: stride is 1.5, expected an integer"),
        ({"dilation": 1.5}, TypeError, "depthwise_conv: dilation is 1.5, expected an integer"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    values = {"x": torch.ones(1, 2, 4, 4), "weight": torch.ones(2, 1, 3, 3)} | change
    with pytest.raises(error, match=message):
        depthwise_conv(values.pop("x"), values.pop("weight"), values.pop("bias", None), **values)
