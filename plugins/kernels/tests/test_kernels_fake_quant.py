"""fake_quant against hand-worked numbers, autograd of the paper's detach form, and a float64 loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eff_kernels.fake_quant import cpu, fake_quant, reference

PATHS = ["reference", "cpu"]
SUM_ATOL = 2e-2  # float32 sums of up to 2e5 terms, added in another order


def detach_form(x, scale, q_min, q_max, offset, grad_scale, shape):
    """The card's autograd formulation."""
    s = scale.view(shape)
    s = (s - s * grad_scale).detach() + s * grad_scale
    beta = offset.view(shape)
    beta = (beta - beta * grad_scale).detach() + beta * grad_scale
    clipped = ((x - beta) / s).clamp(q_min, q_max)
    return ((clipped.round() - clipped).detach() + clipped) * s + beta


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setenv("EFF_KERNELS", request.param)
    return request.param


@pytest.mark.parametrize(
    ("v", "value", "dv", "ds"),
    # below, above, inside, inside, tie to even, on the upper border, on the lower border
    [
        (-9.0, -8, 0, -8),
        (9.0, 7, 0, 7),
        (0.3, 0, 1, -0.3),
        (2.6, 3, 1, 0.4),
        (2.5, 2, 1, -0.5),
        (7.0, 7, 1, 7),
        (-8.0, -8, 1, -8),
    ],
)
def test_values_and_gradients_are_those_of_the_paper(path, v, value, dv, ds):
    x = torch.tensor(v, requires_grad=True)
    s = torch.tensor(1.0, requires_grad=True)
    out = fake_quant(x, s, -8, 7)
    out.backward()
    assert out.item() == value
    assert x.grad.item() == dv
    assert s.grad.item() == pytest.approx(ds)


def test_a_value_just_beyond_the_clip_gets_no_gradient(path):
    """torch's learnable op masks the rounded value and lets 7.4 pass."""
    x = torch.tensor(7.4, requires_grad=True)
    fake_quant(x, torch.tensor(1.0), -8, 7).backward()
    assert x.grad.item() == 0.0


@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1])
@pytest.mark.parametrize("with_offset", [False, True])
def test_gradients_equal_autograd_of_the_detach_form(path, axis, with_offset):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 6, dtype=torch.float64, generator=generator)
    channels = 1 if axis is None else x.shape[axis]
    shape = [1, 1, 1]
    if axis is not None:
        shape[axis] = channels
    scale = 0.1 + torch.rand(channels, dtype=torch.float64, generator=generator)
    offset = (
        torch.randn(channels, dtype=torch.float64, generator=generator)
        if with_offset
        else torch.zeros(channels, dtype=torch.float64)
    )
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    mine = [t.clone().requires_grad_() for t in (x, scale, offset)]
    theirs = [t.clone().requires_grad_() for t in (x, scale, offset)]
    own_shape = (lambda t: t.reshape(())) if axis is None else (lambda t: t)
    out = fake_quant(
        mine[0],
        own_shape(mine[1]),
        -4,
        3,
        offset=own_shape(mine[2]) if with_offset else None,
        axis=axis,
        grad_scale=0.3,
    )
    expected = detach_form(theirs[0], theirs[1], -4, 3, theirs[2], 0.3, shape)
    torch.testing.assert_close(out, expected)
    out.backward(upstream)
    expected.backward(upstream)
    pairs = list(zip(mine, theirs, strict=True))[: 3 if with_offset else 2]
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad)


def test_values_equal_a_float64_loop(path):
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)
    expected = [float(np.rint(min(max(v / 0.37, -4), 3)) * 0.37) for v in x.tolist()]
    torch.testing.assert_close(
        fake_quant(x, torch.tensor(0.37, dtype=torch.float64), -4, 3), torch.tensor(expected, dtype=torch.float64)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [0, 1, 1023, 1025])
def test_cpu_path_equals_the_reference_exactly(dtype, size):
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    s = torch.tensor(0.3, dtype=reference.wide_dtype(x))
    assert torch.equal(cpu.forward(x, s, None, -8, 7, -1), reference.forward(x, s, None, -8, 7, -1))
    for own, other in zip(
        cpu.backward(g, x, s, s * 0.1, -8, 7, -1), reference.backward(g, x, s, s * 0.1, -8, 7, -1), strict=True
    ):
        torch.testing.assert_close(own, other)


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32, allow_subnormal=False), min_size=1, max_size=20),
    scale=st.floats(2**-7, 10, width=32),
    bits=st.integers(2, 8),
    signed=st.booleans(),
)
def test_levels_are_bounded_integers_and_quantizing_twice_changes_nothing(values, scale, bits, signed):
    q_min, q_max = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    x, s = torch.tensor(values), torch.tensor(scale)
    once = fake_quant(x, s, q_min, q_max)
    levels = once / s
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)  # float32 division of up to 255 levels
    assert levels.min() >= q_min - 1e-3 and levels.max() <= q_max + 1e-3
    assert torch.equal(fake_quant(once, s, q_min, q_max), once)


def test_nan_stays_and_gets_no_gradient(path):
    x = torch.tensor([float("nan"), 1.0], requires_grad=True)
    s = torch.tensor(1.0, requires_grad=True)
    out = fake_quant(x, s, -8, 7)
    out.sum().backward()
    assert out[0].isnan() and out[1] == 1.0
    assert x.grad.tolist() == [0.0, 1.0]
    assert s.grad.isnan()


def test_inputs_are_not_written_to(path):
    x, s = torch.randn(100), torch.tensor(0.1)
    kept = x.clone()
    fake_quant(x.requires_grad_(), s.requires_grad_(), -8, 7).sum().backward()
    assert torch.equal(x, kept) and s.item() == pytest.approx(0.1)


@pytest.mark.parametrize("axis", [None, 1])
def test_opcheck_accepts_the_registration(axis):
    x = torch.randn(2, 3, 4, requires_grad=True)
    s = torch.rand(() if axis is None else (3,)) + 0.1
    args = (x, s.requires_grad_(), None, -8, 7, -1 if axis is None else axis, 0.5)
    torch.library.opcheck(torch.ops.eff.fake_quant.default, args)


def test_it_compiles_into_one_graph():
    def loss(x, s):
        return (fake_quant(x, s, -8, 7, grad_scale=0.5) ** 2).sum()

    x, s = torch.randn(8, 8, requires_grad=True), torch.tensor(0.2, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(x, s).backward()
    found = x.grad.clone(), s.grad.clone()
    x.grad = s.grad = None
    loss(x, s).backward()
    torch.testing.assert_close(found, (x.grad, s.grad))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_min": 3, "q_max": 3}, "fake_quant: q_min and q_max are 3 and 3, expected q_min below q_max"),
        ({"axis": 5}, "fake_quant: axis is 5, expected a dimension of x, which has 2"),
        ({"scale": torch.ones(2)}, r"fake_quant: scale has shape \(2,\), expected \(\)"),
        ({"axis": 1, "scale": torch.ones(2)}, r"fake_quant: scale has shape \(2,\), expected \(3,\)"),
        ({"offset": torch.ones(2)}, r"fake_quant: offset has shape \(2,\), expected \(\)"),
        ({"scale": torch.ones((), device="meta")}, "fake_quant: scale is on meta, x on cpu"),
        ({"offset": torch.ones((), device="meta")}, "fake_quant: offset is on meta, x on cpu"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"x": torch.ones(2, 3), "scale": torch.tensor(1.0), "q_min": -8, "q_max": 7, **change}
    with pytest.raises(ValueError, match=message):
        fake_quant(**arguments)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="fake_quant: x is int64, expected float32"):
        fake_quant(torch.ones(2, dtype=torch.int64), torch.tensor(1.0), -8, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3).to(torch.float8_e4m3fn)}, "x is float8_e4m3fn, expected float32"),
        ({"x": [1.0]}, "x is list, expected a tensor of float32"),
        ({"scale": torch.tensor(1)}, "scale is int64, expected float32"),
        ({"scale": 0.1}, "scale is float, expected a tensor"),
        ({"offset": torch.tensor(1)}, "offset is int64, expected float32"),
        ({"q_min": -8.5}, "q_min is -8.5, expected an integer"),
        ({"q_max": float("nan")}, "q_max is nan, expected an integer"),
        ({"axis": 1.0}, "axis is 1.0, expected an integer"),
        ({"q_max": True}, "q_max is True, expected an integer"),
        ({"scale": None}, "scale is NoneType, expected a tensor"),
        ({"grad_scale": None}, "grad_scale is None, expected a number"),
        ({"grad_scale": torch.tensor(1.0)}, r"grad_scale is tensor\(1.\), expected a number"),
        ({"x": torch.ones(2, 3).to_sparse()}, "x is sparse_coo, expected a dense tensor"),
    ],
)
def test_wrong_types_are_named(change, message):
    arguments = {"x": torch.ones(2, 3), "scale": torch.tensor(1.0), "q_min": -8, "q_max": 7, **change}
    with pytest.raises(TypeError, match=f"fake_quant: {message}"):
        fake_quant(**arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_offset_and_a_gradient_scale_are_finite(path, value):
    x, scale = torch.ones(2, 3), torch.tensor(1.0)
    with pytest.raises(ValueError, match=rf"fake_quant: offset is {value}, expected finite numbers"):
        fake_quant(x, scale, -8, 7, offset=torch.tensor(value))
    with pytest.raises(ValueError, match=rf"fake_quant: grad_scale is {value}, expected a finite number"):
        fake_quant(x, scale, -8, 7, grad_scale=value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf"), 1e-60])
def test_a_scale_that_is_no_step_is_refused(path, value, dtype):
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"fake_quant: scale is .*, expected above 0 and finite"):
        fake_quant(x, torch.tensor(value, dtype=dtype), -8, 7)
    with pytest.raises(ValueError, match=r"fake_quant: scale (is|has values from) .*, expected above 0 and finite"):
        fake_quant(x, torch.tensor([1.0, value], dtype=dtype), -8, 7, axis=0)


@pytest.mark.parametrize(
    ("shape", "axis"), [((200_000,), None), ((300, 700), 0), ((1, 200_000), 0), ((4, 3, 160, 160), 1)]
)
@pytest.mark.parametrize("with_offset", [False, True])
def test_a_tensor_of_many_pieces_has_the_reference_gradients(shape, axis, with_offset):
    generator = torch.Generator().manual_seed(2)
    x, g = (torch.randn(shape, generator=generator) for _ in range(2))
    channels = () if axis is None else (shape[axis],)
    s, beta = (0.1 + torch.rand(channels, generator=generator) for _ in range(2))
    arguments = (s, beta if with_offset else None, -8, 7, -1 if axis is None else axis)
    own, exact = cpu.backward(g, x, *arguments), reference.backward(g, x, *arguments)
    assert torch.equal(own[0], exact[0])
    for mine, other in list(zip(own, exact, strict=True))[1 : 3 if with_offset else 2]:
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=SUM_ATOL)


@pytest.mark.parametrize("size", [4, 200_000])
def test_an_infinite_gradient_of_a_clipped_value_does_not_reach_x(path, size):
    x, g = torch.zeros(size), torch.ones(size)
    x[1], g[1], x[2] = 9.0, float("inf"), float("nan")
    found = (
        reference.backward(g, x, torch.tensor(1.0), None, -8, 7, -1)
        if path == "reference"
        else cpu.backward(g, x, torch.tensor(1.0), None, -8, 7, -1)
    )
    assert found[0][:4].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_zeros_pass_the_gradient_when_the_range_starts_at_zero(path):
    x = torch.tensor([0.0, -1e-6, 15.0, 15.001], requires_grad=True)
    fake_quant(x, torch.tensor(1.0), 0, 15).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded"])
def test_output_strides_are_those_promised_to_the_compiler(path, layout):
    base = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x = {
        "channels_last": base.to(memory_format=torch.channels_last), "transposed": base.transpose(1, 3),
        "sliced": base[..., ::2], "expanded": base[:1].expand(5, 3, 4, 4),
    }[layout].detach().requires_grad_()  # fmt: skip
    s = torch.full((x.shape[1],), 0.2, requires_grad=True)
    out = fake_quant(x, s, -8, 7, axis=1)
    assert out.stride() == torch.empty_like(x).stride()
    torch.library.opcheck(torch.ops.eff.fake_quant.default, (x, s, None, -8, 7, 1, 1.0), test_utils="test_faketensor")


def test_eager_and_registered_operator_give_the_same_gradients(path):
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    s = torch.tensor(0.2, requires_grad=True)
    eager = torch.autograd.grad(fake_quant(x, s, -8, 7, grad_scale=0.5).sum(), (x, s))
    registered = torch.autograd.grad(torch.ops.eff.fake_quant(x, s, None, -8, 7, -1, 0.5).sum(), (x, s))
    assert all(torch.equal(one, other) for one, other in zip(eager, registered, strict=True))


def test_differentiating_twice_is_refused():
    x = torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad(fake_quant(x, torch.tensor(0.2), -8, 7).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_levels_that_float32_cannot_round_are_refused():
    with pytest.raises(ValueError, match=r"are 0 and 16777216, expected q_min below q_max, both within \+-4194304"):
        fake_quant(torch.ones(2), torch.tensor(1.0), 0, 2**24)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float32, "the tensor is on the CPU; set TRITON_INTERPRET=1"),
        (torch.float64, "no Triton kernel of fake_quant for torch.float64"),
    ],
)
def test_forcing_triton_where_it_cannot_run_says_why(monkeypatch, dtype, message):
    pytest.importorskip("triton")
    monkeypatch.setenv("EFF_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        fake_quant(torch.ones(2, dtype=dtype), torch.tensor(1.0), -8, 7)


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize(("shape", "group"), [((3, 12), 4), ((2, 5, 6), 3), ((8,), 8), ((4, 6), 1), ((700, 256), 128)])
def test_groups_are_tensors_of_their_own(path, shape, group, with_offset):
    """Each run of `group` elements has the values and gradients of that run alone with its scale."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    many = (*shape[:-1], shape[-1] // group)
    scale = (0.1 + torch.rand(many, generator=generator, dtype=torch.float64)).requires_grad_()
    offset = torch.randn(many, generator=generator, dtype=torch.float64).requires_grad_() if with_offset else None
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    out = fake_quant(x, scale, -8, 7, offset=offset, group_size=group, grad_scale=0.5)
    (out * weights).sum().backward()
    runs, d_scale = x.detach().view(-1, group), scale.grad.view(-1)
    for index in range(0, len(runs), max(1, len(runs) // 20)):
        alone = [t.detach().view(-1)[index].clone().requires_grad_() for t in (scale, offset) if t is not None]
        run = runs[index].clone().requires_grad_()
        one = fake_quant(run, alone[0], -8, 7, offset=alone[1] if with_offset else None, grad_scale=0.5)
        torch.testing.assert_close(out.view(-1, group)[index], one)
        (one * weights.view(-1, group)[index]).sum().backward()
        torch.testing.assert_close(x.grad.view(-1, group)[index], run.grad)
        torch.testing.assert_close(d_scale[index], alone[0].grad)
        if with_offset:
            torch.testing.assert_close(offset.grad.view(-1)[index], alone[1].grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 2}, "group_size is 2, expected a divisor of the last dimension of"),
        ({"group_size": 0}, "group_size is 0, expected a divisor"),
        ({"group_size": 3, "axis": 0}, "axis 0 and group_size 3 are both given"),
        ({"group_size": 3}, r"fake_quant: scale has shape \(\), expected \(2, 1\)"),
    ],
)
def test_groups_that_do_not_fit_are_refused(change, message):
    arguments = {"x": torch.ones(2, 3), "scale": torch.tensor(1.0), "q_min": -8, "q_max": 7, **change}
    with pytest.raises(ValueError, match=message):
        fake_quant(**arguments)
