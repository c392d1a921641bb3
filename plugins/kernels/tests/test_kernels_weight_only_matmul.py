"""weight_only_matmul against a float64 loop over levels, gradcheck, and torch's own 4-bit product."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eff_kernels.packing import ROW_BITS, pack_rows
from eff_kernels.weight_only_matmul import cpu, dequantize, prepack, reference, weight_only_matmul

# Of the largest result: sums in another order; half dtypes round the result (and weights, where the product runs in them).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PATHS = ["reference", "cpu"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setenv("EFF_KERNELS", request.param)
    return request.param


def inputs(m, n, k, groups, bits, *, dtype=torch.float32, with_zero=True, seed=0):
    """x, packed levels, scales and zero points."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator).to(dtype)
    packed = pack_rows(torch.randint(2**bits, (n, k), generator=generator), bits)
    scale = (0.1 + torch.rand(n, groups, generator=generator)).to(dtype)
    zero = (2**bits * torch.rand(n, groups, generator=generator)).to(dtype) if with_zero else None
    return x, packed, scale, zero


def close(found, expected, dtype):
    assert found.dtype == dtype and found.shape == expected.shape
    if expected.numel():
        assert (
            float((found.double() - expected.double()).abs().max() / expected.double().abs().max()) < TOLERANCE[dtype]
        )


def weight_by_hand(packed, scale, zero, bits):
    """Levels read bit by bit as the layout says, in Python integers."""
    rows = []
    for n, row in enumerate(packed.tolist()):
        stream = int.from_bytes(bytes(row), "little")
        k = len(row) * 8 // bits
        size = k // scale.shape[1]
        line = []
        for index in range(k):
            level = stream >> (index * bits) & (2**bits - 1)
            origin = 2 ** (bits - 1) if zero is None else float(zero[n, index // size])
            line.append((level - origin) * float(scale[n, index // size]))
        rows.append(line)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("bits", ROW_BITS)
@pytest.mark.parametrize("with_zero", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_it_multiplies_the_weight_that_the_layout_describes(path, bits, with_zero, dtype):
    x, packed, scale, zero = inputs(5, 7, 48, 3, bits, dtype=dtype, with_zero=with_zero)
    weight = weight_by_hand(packed, scale, zero, bits)
    close(weight_only_matmul(x, packed, scale, bits=bits, zero_point=zero), x.double() @ weight.t(), dtype)
    close(dequantize(packed, scale, bits=bits, zero_point=zero, dtype=dtype), weight, dtype)


def test_by_hand():
    # 4-bit levels 1, 15, 0, 8, 8, 8, 8, 8, symmetric: -7, 7, -8, 0, ... times 0.5
    packed = pack_rows(torch.tensor([[1, 15, 0, 8, 8, 8, 8, 8]]), 4)
    assert packed.tolist() == [[0xF1, 0x80, 0x88, 0x88]]
    y = weight_only_matmul(torch.eye(8), packed, torch.tensor([[0.5]]), bits=4)
    assert y.flatten().tolist() == [-3.5, 3.5, -4, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("bits", ROW_BITS)
@pytest.mark.parametrize("m", [0, 1, 31, 32, 33])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_cpu_equals_the_reference(bits, m, dtype):
    x, packed, scale, zero = inputs(m, 9, 64, 2, bits, dtype=dtype)
    close(cpu.forward(x, packed, scale, zero, bits), reference.forward(x, packed, scale, zero, bits), dtype)
    grad = torch.ones(m, 9, dtype=dtype)
    close(cpu.backward(grad, packed, scale, zero, bits), reference.backward(grad, packed, scale, zero, bits), dtype)


@pytest.mark.parametrize("piece", [1, 64, 65, 64 * 9, 64 * 10])
@pytest.mark.parametrize("with_zero", [False, True])
def test_pieces_change_nothing(monkeypatch, piece, with_zero):
    arguments = inputs(3, 9, 64, 4, 3, with_zero=with_zero)
    monkeypatch.setattr(cpu, "PIECE", piece)
    close(cpu.forward(*arguments, 3), reference.forward(*arguments, 3), torch.float32)
    grad = torch.ones(3, 9)
    close(cpu.backward(grad, *arguments[1:], 3), reference.backward(grad, *arguments[1:], 3), torch.float32)
    assert torch.equal(
        cpu.dequantize(*arguments[1:], 3, torch.float32), reference.dequantize(*arguments[1:], 3, torch.float32)
    )


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from(ROW_BITS), m=st.integers(1, 5), n=st.integers(1, 6), groups=st.integers(1, 4),
    eights=st.integers(1, 5), with_zero=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape_agrees_with_the_dequantized_product(bits, m, n, groups, eights, with_zero, seed):
    x, packed, scale, zero = inputs(m, n, 8 * groups * eights, groups, bits, with_zero=with_zero, seed=seed)
    weight = weight_by_hand(packed, scale, zero, bits)
    close(weight_only_matmul(x, packed, scale, bits=bits, zero_point=zero), x.double() @ weight.t(), torch.float32)


def test_it_agrees_with_torch_int4pack():
    x, packed, scale, _ = inputs(3, 64, 128, 4, 4, dtype=torch.bfloat16, with_zero=False)
    levels = reference.unpack_bits(packed, 4, 64 * 128).view(64, 128)
    theirs = torch._convert_weight_to_int4pack_for_cpu(levels, 2)
    scales = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()
    close(
        weight_only_matmul(x, packed, scale, bits=4), torch._weight_int4pack_mm_for_cpu(x, theirs, 32, scales), x.dtype
    )


@pytest.mark.parametrize("bits", ROW_BITS)
def test_the_gradient_of_x_is_right(path, bits):
    x, packed, scale, zero = inputs(3, 5, 32, 2, bits, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda v: weight_only_matmul(v, packed, scale, bits=bits, zero_point=zero), (x.requires_grad_(),)
    )


def test_scales_may_have_another_dtype_than_x(path):
    x, packed, scale, zero = inputs(2, 5, 32, 2, 4, dtype=torch.bfloat16)
    y = weight_only_matmul(x, packed, scale.float(), bits=4, zero_point=zero.half())
    close(y, x.double() @ weight_by_hand(packed, scale, zero.half(), 4).t(), torch.bfloat16)


def test_leading_dimensions_and_strides_of_x_do_not_matter(path):
    x, packed, scale, _ = inputs(6, 5, 16, 1, 4)
    flat = weight_only_matmul(x, packed, scale, bits=4)
    strided = torch.stack([x, x], -1)[..., 0].view(2, 3, 16)
    torch.testing.assert_close(weight_only_matmul(strided, packed, scale, bits=4), flat.view(2, 3, 5))
    torch.testing.assert_close(weight_only_matmul(x[0], packed, scale, bits=4), flat[0])


def test_nan_reaches_the_results_it_belongs_to(path):
    x, packed, scale, zero = inputs(2, 3, 16, 2, 2)
    scale[1, 0] = torch.nan
    y = weight_only_matmul(x, packed, scale, bits=2, zero_point=zero)
    assert y.isnan().tolist() == [[False, True, False]] * 2
    x[0, 3] = torch.nan
    assert weight_only_matmul(x, packed, scale, bits=2).isnan().tolist() == [[True] * 3, [False, True, False]]


def test_inputs_are_not_written_to(path):
    arguments = inputs(2, 3, 16, 2, 8)
    kept = [t.clone() for t in arguments]
    weight_only_matmul(arguments[0].requires_grad_(), *arguments[1:3], bits=8, zero_point=arguments[3]).sum().backward()
    assert all(torch.equal(one, other) for one, other in zip(kept, arguments, strict=True))


@pytest.mark.parametrize("with_zero", [False, True])
def test_opcheck_accepts_the_registration(with_zero):
    x, packed, scale, zero = inputs(2, 3, 16, 2, 4, with_zero=with_zero)
    torch.library.opcheck(torch.ops.eff.weight_only_matmul.default, (x.requires_grad_(), packed, scale, zero, 4))
    torch.library.opcheck(torch.ops.eff.weight_only_dequantize.default, (packed, scale, zero, 4, torch.bfloat16))
    torch.library.opcheck(
        torch.ops.eff.weight_only_matmul_backward.default, (x.detach()[:, :3], packed, scale, zero, 4)
    )


def test_it_compiles_into_one_graph():
    x, packed, scale, zero = inputs(2, 3, 16, 2, 4)

    def loss(v):
        return weight_only_matmul(v, packed, scale, bits=4, zero_point=zero).square().sum()

    x.requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(found, expected)


X, P, S, Z = inputs(2, 3, 48, 3, 4)
VALID = {"x": X, "packed": P, "scale": S, "bits": 4, "zero_point": Z}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X.int()}, TypeError, "weight_only_matmul: x is int32, expected float32"),
        ({"x": X[0, 0]}, ValueError, r"x has no dimensions, expected \(..., K\)"),
        ({"x": X[:, :40]}, ValueError, r"packed has shape \(3, 24\), expected \(N, 20\)"),
        ({"x": X[:, :47], "bits": 4}, ValueError, r"packed has shape \(3, 24\), expected \(N, 23\)"),
        ({"x": torch.ones(2, 49)}, ValueError, "x has 49 columns, expected 48 as packed has"),
        ({"bits": 5}, ValueError, "bits is 5, expected one of 2, 3, 4, 8"),
        ({"bits": 4.0}, ValueError, "bits is 4.0, expected one of 2, 3, 4, 8"),
        ({"bits": torch.tensor(4)}, ValueError, r"bits is tensor\(4\), expected one of 2, 3, 4, 8"),
        ({"scale": None}, TypeError, "scale is NoneType, expected a tensor of float32"),
        ({"x": X.to_sparse()}, TypeError, "x is sparse_coo, expected a dense tensor"),
        ({"packed": P.int()}, TypeError, "packed is int32, expected uint8"),
        ({"packed": P[0]}, ValueError, r"packed has shape \(24,\), expected \(N, bytes\)"),
        ({"packed": P[:0]}, ValueError, r"packed is empty, shape \(0, 24\)"),
        ({"packed": P.t().contiguous().t()}, ValueError, "packed has strides .*call .contiguous"),
        ({"packed": P[:, :22].contiguous()}, ValueError, "packed has 22 bytes a row, expected a multiple of 4"),
        ({"scale": S[:2]}, ValueError, r"scale has shape \(2, 3\), expected \(3, groups\)"),
        ({"scale": S[:, :0]}, ValueError, "scale is empty"),
        ({"scale": S.int()}, TypeError, "scale is int32, expected float32"),
        ({"scale": S.repeat(1, 4)}, ValueError, "scale has 12 groups for 48 levels a row, expected groups of a multiple of 8"),
        ({"scale": S.to("meta")}, ValueError, "scale is on meta, packed on cpu"),
        ({"packed": P.to("meta"), "scale": S.to("meta"), "zero_point": None}, ValueError, "packed is on meta, x on cpu"),
        ({"zero_point": Z[:, :1]}, ValueError, r"zero_point has shape \(3, 1\), expected \(3, 3\)"),
        ({"scale": S.clone().requires_grad_()}, ValueError, "scale asks for a gradient, which only x gets"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        weight_only_matmul(**{**VALID, **change})


def test_an_integer_weight_is_not_made():
    with pytest.raises(TypeError, match="dequantize: dtype is torch.int8, expected a floating-point dtype"):
        dequantize(P, S, bits=4, dtype=torch.int8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("with_zero", [False, True])
def test_a_prepacked_weight_gives_the_same_product(bits, with_zero):
    groups = 1 if bits == 8 else 3
    x, packed, scale, zero = inputs(
        4, 32, 64 * groups, groups, bits, dtype=torch.bfloat16, with_zero=with_zero and bits < 8
    )
    made = prepack(packed, scale, bits=bits, zero_point=zero)
    expected = x.double() @ weight_by_hand(packed, scale, zero, bits).t()
    found = weight_only_matmul(x, packed, scale, bits=bits, zero_point=zero, prepacked=made)
    assert made is not None and (found - expected).abs().max() <= 2e-2 * expected.abs().max()
    nonsense = made._replace(grid=torch.zeros_like(made.grid))
    assert not weight_only_matmul(x, packed, scale, bits=bits, zero_point=zero, prepacked=nonsense).any()


def test_more_rows_other_dtypes_and_gradients_take_the_packed_weight():
    x, packed, scale, zero = inputs(33, 32, 64, 1, 4, dtype=torch.bfloat16)
    made = prepack(packed, scale, bits=4, zero_point=zero)
    nonsense = made._replace(grid=torch.zeros_like(made.grid))
    for one in (x, x[:2].float(), x[:2].detach().requires_grad_()):
        found = weight_only_matmul(one, packed, scale, bits=4, zero_point=zero, prepacked=nonsense)
        assert torch.equal(found, weight_only_matmul(one, packed, scale, bits=4, zero_point=zero))


@pytest.mark.parametrize("bits", ROW_BITS)
@pytest.mark.parametrize("with_zero", [False, True])
def test_products_of_bfloat16_are_put_together_from_blocks(bits, with_zero, monkeypatch):
    monkeypatch.setattr(cpu, "PIECE", 5 * 64)
    monkeypatch.setattr(cpu, "PRODUCT", 14 * 64)  # 32 rows: two blocks of 14 and one of 4, each of pieces of 5
    x, packed, scale, zero = inputs(cpu.BFLOAT16_ROWS, 32, 64, 2, bits, dtype=torch.bfloat16, with_zero=with_zero)
    expected = x.double() @ weight_by_hand(packed, scale, zero, bits).t()
    found = weight_only_matmul(x, packed, scale, bits=bits, zero_point=zero)
    assert cpu.product_dtype(len(x), x.dtype) == found.dtype == torch.bfloat16
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()


@pytest.mark.parametrize("bits", ROW_BITS)
@pytest.mark.parametrize("m", [1, 3, 16])
@pytest.mark.parametrize("n", [1, 9, 33])
def test_one_scale_a_row_multiplies_bytes(bits, m, n, monkeypatch):
    monkeypatch.setattr(cpu, "PIECE", 5 * 64)
    x, packed, scale, _ = inputs(m, n, 64, 1, bits, dtype=torch.bfloat16)
    lowest, highest = (128, 128) if bits == 8 else (0, 2**bits - 1)
    edges = torch.full_like(scale, lowest)
    edges[::2] = highest
    for zero in (None, edges):
        assert cpu.takes_bytes(x, scale, zero, bits)
        expected = x.double() @ weight_by_hand(packed, scale, zero, bits).t()
        found = weight_only_matmul(x, packed, scale, bits=bits, zero_point=zero)
        assert (found - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize("zero", [-1, 0.5, 16, torch.nan])
def test_a_zero_point_beside_the_levels_takes_floats(zero):
    x, packed, scale, _ = inputs(2, 9, 64, 1, 4, dtype=torch.bfloat16)
    zero = torch.full_like(scale, zero)
    assert not cpu.takes_bytes(x, scale, zero, 4)
    found = weight_only_matmul(x, packed, scale, bits=4, zero_point=zero)
    expected = x.double() @ weight_by_hand(packed, scale, zero, 4).t()
    assert torch.allclose(found.double(), expected, rtol=2e-2, atol=0.2, equal_nan=True)


def test_a_scale_is_not_rounded_for_the_sake_of_bytes():
    x, _, scale, _ = inputs(2, 9, 64, 1, 4, dtype=torch.bfloat16)
    assert not cpu.takes_bytes(x, scale.float(), None, 4) and not cpu.takes_bytes(x.float(), scale, None, 4)
    assert not cpu.takes_bytes(x.repeat(9, 1), scale, None, 4) and not cpu.takes_bytes(x, scale.repeat(1, 2), None, 4)


def test_a_prepacked_weight_is_refused_beside_any_other_weight():
    x, packed, scale, zero = inputs(2, 32, 64, 1, 4, dtype=torch.bfloat16)
    made = prepack(packed, scale, bits=4, zero_point=zero)

    def product(packed=packed, scale=scale, zero=zero, bits=4, prepacked=made, x=x):
        return weight_only_matmul(x, packed, scale, bits=bits, zero_point=zero, prepacked=prepacked)

    for rows in (x, x.repeat(50, 1)):  # also where it would not be taken
        with pytest.raises(
            ValueError, match=r"weight_only_matmul: prepacked is of another weight \(32, 32\) in 4 bits"
        ):
            product(packed=packed.clone(), x=rows)
    eight = prepack(packed, scale, bits=8)
    for change in (
        {"scale": scale * 2},
        {"zero": None},
        {"zero": zero + 1},
        {"prepacked": prepack(*inputs(1, 48, 64, 1, 4)[1:3], bits=4)},
        {"prepacked": prepack(*inputs(1, 32, 128, 1, 4)[1:3], bits=4)},
        {"prepacked": eight},
    ):
        with pytest.raises(ValueError, match="prepacked is of another weight"):
            product(**change)
    with pytest.raises(TypeError, match="prepacked is tuple, expected what prepack returns"):
        product(prepacked=(packed,))


def test_a_prepacked_weight_stays_that_of_its_copy_and_of_views():
    x, packed, scale, zero = inputs(2, 32, 64, 1, 4, dtype=torch.bfloat16)
    kept = {"packed": packed, "scale": scale, "zero_point": zero}
    kept["prepacked"] = prepack(packed, scale, bits=4, zero_point=zero)
    expected = weight_only_matmul(x, bits=4, **kept)
    copied = copy.deepcopy(kept)
    assert torch.equal(weight_only_matmul(x, bits=4, **copied), expected)
    seen = {**kept, "packed": packed.view(32, 32), "scale": scale.detach()}
    assert torch.equal(weight_only_matmul(x, bits=4, **seen), expected)


@pytest.mark.parametrize(
    ("n", "k", "groups", "bits", "with_zero"),
    [(33, 64, 1, 4, True), (32, 48, 3, 4, True), (32, 64, 2, 8, False), (32, 64, 1, 8, True)],
)
def test_weights_that_torch_has_no_layout_for_are_not_prepacked(n, k, groups, bits, with_zero):
    _, packed, scale, zero = inputs(1, n, k, groups, bits, with_zero=with_zero)
    assert prepack(packed, scale, bits=bits, zero_point=zero) is None
