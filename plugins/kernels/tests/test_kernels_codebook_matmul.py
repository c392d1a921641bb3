"""codebook_matmul against a lookup written as Python loops, gradcheck, and autograd of an embedding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from eff_kernels.codebook_matmul import codebook_matmul, cpu, decode, pack_codes, reference, unpack_codes
from eff_kernels.packing import unpack_bits

# Of the largest result: sums in another order; half dtypes round the result (and the sums of a product in them).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PATHS = ["reference", "cpu"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setenv("EFF_KERNELS", request.param)
    return request.param


def inputs(m, n, codes_per_row, dim, bits, *, entries=None, dtype=torch.float32, seed=0):
    """x, codes, packed codes and a codebook."""
    generator = torch.Generator().manual_seed(seed)
    entries = entries or min(2**bits, 300)
    codes = torch.randint(entries, (n, codes_per_row), generator=generator)
    x = torch.randn(m, codes_per_row * dim, generator=generator).to(dtype)
    return x, codes, pack_codes(codes, bits), torch.randn(entries, dim, generator=generator).to(dtype)


def close(found, expected, dtype):
    assert found.dtype == dtype and found.shape == expected.shape
    if expected.numel():
        assert (
            float((found.double() - expected.double()).abs().max() / expected.double().abs().max()) < TOLERANCE[dtype]
        )


def weight_by_hand(codes, codebook):
    table = codebook.double().tolist()
    return torch.tensor([[v for code in row for v in table[code]] for row in codes.tolist()], dtype=torch.float64)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_it_multiplies_the_looked_up_weight(path, bits, dim, dtype):
    x, codes, packed, codebook = inputs(5, 7, 6, dim, bits, dtype=dtype)
    weight = weight_by_hand(codes, codebook)
    assert torch.equal(decode(packed, codebook, bits=bits).double(), weight)
    close(codebook_matmul(x, packed, codebook, bits=bits), x.double() @ weight.t(), dtype)


def test_by_hand(path):
    codebook = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    packed = torch.tensor([[0b0001_0000]], dtype=torch.uint8)  # codes 0, 1: the low half comes first
    assert decode(packed, codebook, bits=4).tolist() == [[1, 2, 10, 20]]
    assert codebook_matmul(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), packed, codebook, bits=4).tolist() == [[33]]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_codes_come_back_and_share_the_bit_order_of_packing(bits):
    codes = torch.randint(2**bits, (3, 8), generator=torch.Generator().manual_seed(0))
    codes[0, 0], codes[0, 1] = 0, 2**bits - 1
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, bits) and torch.equal(unpack_codes(packed, bits).long(), codes)
    if bits < 16:
        assert torch.equal(unpack_bits(packed.flatten(), bits, 24).view(3, 8).long(), codes)
    else:
        assert packed[0, :4].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("m", [0, 1, 31, 32, 33])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("piece", [1, 48, 49, 1 << 19])
def test_cpu_equals_the_reference(monkeypatch, m, dtype, piece):
    monkeypatch.setattr(cpu, "PIECE", piece)
    monkeypatch.setattr(cpu, "PRODUCT", piece)
    x, _, packed, codebook = inputs(m, 9, 12, 4, 8, dtype=dtype)
    close(cpu.forward(x, packed, codebook, 8), reference.forward(x, packed, codebook, 8), dtype)
    grad = torch.randn(m, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    close(cpu.backward_x(grad, packed, codebook, 8), reference.backward_x(grad, packed, codebook, 8), dtype)
    if m:
        arguments = (grad, x, packed, len(codebook), 8)
        close(cpu.backward_codebook(*arguments), reference.backward_codebook(*arguments), dtype)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("m", [1, 2, 8])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_few_rows_look_products_up(monkeypatch, bits, m, dtype):
    monkeypatch.setattr(cpu, "PIECE", 5 * 6)  # 5 of 33 rows at a time
    x, codes, packed, codebook = inputs(m, 33, 6, 8, bits, entries=16, dtype=dtype)
    assert cpu.takes_table(x, packed, codebook)
    expected = x.double() @ weight_by_hand(codes, codebook).t()
    close(codebook_matmul(x, packed, codebook, bits=bits), expected, dtype)


def test_the_table_is_for_few_rows_long_entries_and_small_codebooks():
    x, packed, codebook = torch.ones(4, 24), torch.zeros(32, 6, dtype=torch.uint8), torch.ones(16, 4)
    assert cpu.takes_table(x, packed, codebook)
    assert not cpu.takes_table(torch.ones(5, 24), packed, codebook)
    assert not cpu.takes_table(x, packed, torch.ones(16, 3))
    assert not cpu.takes_table(x, packed, torch.ones(17, 4))


def test_a_code_beyond_the_table_is_an_error_too():
    x, _, packed, codebook = inputs(2, 33, 6, 8, 8, entries=5)
    assert cpu.takes_table(x, packed, codebook)
    packed[32, 5] = 5
    with pytest.raises(IndexError, match="codebook_matmul: packed has the code 5, expected 0 to 4"):
        codebook_matmul(x, packed, codebook, bits=8)


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from([4, 8, 16]), m=st.integers(1, 5), n=st.integers(1, 6), pairs=st.integers(1, 5),
    dim=st.integers(1, 9), entries=st.integers(1, 16), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape_agrees_with_the_lookup(bits, m, n, pairs, dim, entries, seed):
    x, codes, packed, codebook = inputs(m, n, 2 * pairs, dim, bits, entries=entries, seed=seed)
    close(codebook_matmul(x, packed, codebook, bits=bits), x.double() @ weight_by_hand(codes, codebook).t(), x.dtype)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_gradients_are_right(path, bits):
    x, _, packed, codebook = inputs(3, 5, 4, 3, bits, entries=6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda v, c: codebook_matmul(v, packed, c, bits=bits), (x.requires_grad_(), codebook.requires_grad_())
    )


@pytest.mark.parametrize("wanted", ["x", "codebook", "both"])
def test_gradients_are_those_of_an_embedding(path, wanted):
    x, codes, packed, codebook = inputs(40, 30, 10, 4, 8, entries=7)
    leaves = {"x": [x], "codebook": [codebook], "both": [x, codebook]}[wanted]
    for leaf in leaves:
        leaf.requires_grad_()
    found = torch.autograd.grad(codebook_matmul(x, packed, codebook, bits=8).sin().sum(), leaves)
    expected = torch.autograd.grad(F.linear(x, F.embedding(codes, codebook).flatten(1)).sin().sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        close(one, other, torch.float32)


def test_unused_entries_get_no_gradient(path):
    x, _, packed, codebook = inputs(2, 3, 4, 2, 8, entries=3)
    wide = torch.cat([codebook, torch.ones(2, 2)]).requires_grad_()
    codebook_matmul(x, packed, wide, bits=8).sum().backward()
    assert wide.grad[3:].tolist() == [[0, 0], [0, 0]]


def test_a_code_that_the_codebook_lacks_is_an_error(path):
    x, _, packed, codebook = inputs(2, 3, 4, 2, 8, entries=5)
    packed[1, 2] = 5
    with pytest.raises(IndexError, match="codebook_matmul: packed has the code 5, expected 0 to 4"):
        codebook_matmul(x, packed, codebook, bits=8)
    with pytest.raises(IndexError, match="decode: packed has the code 5, expected 0 to 4"):
        decode(packed, codebook, bits=8)


def test_nan_reaches_the_results_it_belongs_to(path):
    x, codes, packed, codebook = inputs(2, 3, 4, 2, 8, entries=5)
    codebook[int(codes[1, 0])] = torch.nan
    expected = [(row == codes[1, 0]).any().item() for row in codes]
    assert codebook_matmul(x, packed, codebook, bits=8).isnan().tolist() == [expected] * 2


def test_leading_dimensions_and_strides_of_x_do_not_matter(path):
    x, _, packed, codebook = inputs(6, 5, 4, 2, 4)
    flat = codebook_matmul(x, packed, codebook, bits=4)
    strided = torch.stack([x, x], -1)[..., 0].view(2, 3, 8)
    torch.testing.assert_close(codebook_matmul(strided, packed, codebook, bits=4), flat.view(2, 3, 5))
    torch.testing.assert_close(codebook_matmul(x[0], packed, codebook.t().contiguous().t(), bits=4), flat[0])


def test_inputs_are_not_written_to(path):
    x, _, packed, codebook = inputs(2, 3, 4, 2, 4)
    kept = [t.clone() for t in (x, packed, codebook)]
    codebook_matmul(x.requires_grad_(), packed, codebook.requires_grad_(), bits=4).sum().backward()
    assert all(torch.equal(one, other) for one, other in zip(kept, (x, packed, codebook), strict=True))


def test_opcheck_accepts_the_registration():
    x, _, packed, codebook = inputs(2, 3, 4, 2, 4)
    torch.library.opcheck(
        torch.ops.eff.codebook_matmul.default, (x.requires_grad_(), packed, codebook.requires_grad_(), 4)
    )
    x, codebook, grad = x.detach(), codebook.detach(), torch.ones(2, 3)
    torch.library.opcheck(torch.ops.eff.codebook_decode.default, (packed, codebook, 4))
    torch.library.opcheck(torch.ops.eff.codebook_matmul_backward_x.default, (grad, packed, codebook, 4))
    torch.library.opcheck(torch.ops.eff.codebook_matmul_backward_codebook.default, (grad, x, packed, 16, 4))


def test_it_compiles_into_one_graph():
    x, _, packed, codebook = inputs(2, 3, 4, 2, 4)
    leaves = (x.requires_grad_(), codebook.requires_grad_())

    def loss(v, c):
        return codebook_matmul(v, packed, c, bits=4).square().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    torch.testing.assert_close(found, expected)


X, _, P, C = inputs(2, 3, 4, 2, 8, entries=5)
VALID = {"x": X, "packed": P, "codebook": C, "bits": 8}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X.int()}, TypeError, "codebook_matmul: x is int32, expected float32"),
        ({"x": X[0, 0]}, ValueError, r"x has no dimensions, expected \(..., K\)"),
        ({"x": X[:, :7]}, ValueError, r"x has shape \(2, 7\), expected \(..., 8\)"),
        ({"x": X[:, :0]}, ValueError, r"x has shape \(2, 0\), expected \(..., 8\)"),
        ({"bits": 3}, ValueError, "bits is 3, expected one of 4, 8, 16"),
        ({"packed": P.int()}, TypeError, "packed is int32, expected uint8"),
        ({"packed": P[0]}, ValueError, r"packed has shape \(4,\), expected \(N, bytes\)"),
        ({"packed": P[:0]}, ValueError, r"packed is empty, shape \(0, 4\)"),
        ({"packed": P.t().contiguous().t()}, ValueError, "packed has strides .*call .contiguous"),
        ({"packed": P[:, :3].contiguous(), "bits": 16}, ValueError, "packed has 3 bytes a row, expected a multiple of 2"),
        ({"packed": P.to("meta"), "codebook": C.to("meta")}, ValueError, "packed is on meta, x on cpu"),
        ({"codebook": C.half()}, TypeError, "codebook is float16, expected float32"),
        ({"codebook": C[0]}, ValueError, r"codebook has shape \(2,\), expected \(entries, dim\)"),
        ({"codebook": C[:0]}, ValueError, "entries of the codebook is 0, expected 1 to 256"),
        ({"codebook": torch.ones(257, 2)}, ValueError, "entries of the codebook is 257, expected 1 to 256"),
        ({"codebook": torch.ones(5, 65)}, ValueError, "dim of the codebook is 65, expected 1 to 64"),
        ({"codebook": C.to("meta")}, ValueError, "codebook is on meta, packed on cpu"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        codebook_matmul(**{**VALID, **change})


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(2, 3).int(), 4, r"pack_codes: codes has shape \(2, 3\), expected \(N, J\), J even for 4 bits"),
        (torch.zeros(4).int(), 8, r"codes has shape \(4,\)"), (torch.zeros(2, 2), 5, "bits is 5, expected one of 4, 8, 16"),
        (torch.full((1, 2), 16), 4, "pack_codes: codes has values from 16 to 16, expected 0 to 15"),
        (torch.zeros(2, 2).int(), 4.0, "bits is 4.0, expected one of 4, 8, 16"),
        (torch.zeros(2, 2, device="meta").int(), 4, "pack_codes: codes is on meta, expected a device that holds values"),
        (torch.full((1, 2), 65536), 16, "pack_codes: codes has values from 65536 to 65536, expected 0 to 65535"),
    ],
)  # fmt: skip
def test_codes_that_cannot_be_packed_are_refused(codes, bits, message):
    with pytest.raises(ValueError, match=message):
        pack_codes(codes, bits)


@pytest.mark.parametrize(
    ("packed", "bits", "error", "message"),
    [
        (None, 8, TypeError, "unpack_codes: packed is NoneType, expected a tensor of uint8"),
        (torch.zeros(2, 2), 8, TypeError, "packed is float32, expected uint8"),
        (torch.zeros(2, dtype=torch.uint8), 8, ValueError, r"packed has shape \(2,\), expected \(N, bytes\)"),
        (torch.zeros(2, 3, dtype=torch.uint8), 16, ValueError, "packed has 3 bytes a row, expected a multiple of 2"),
        (torch.zeros(2, 4, dtype=torch.uint8).t(), 16, ValueError, "packed has strides .*call .contiguous"),
        (torch.zeros(2, 2, dtype=torch.uint8), 2, ValueError, "bits is 2, expected one of 4, 8, 16"),
    ],
)
def test_what_cannot_be_unpacked_is_refused(packed, bits, error, message):
    with pytest.raises(error, match=message):
        unpack_codes(packed, bits)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_codes_in_float_are_refused_and_not_cut_off(bits):
    with pytest.raises(TypeError, match="pack_codes: codes is float32, expected uint8"):
        pack_codes(torch.ones(1, 2), bits)


def test_codes_of_16_bits_may_come_in_bytes():
    assert unpack_codes(pack_codes(torch.tensor([[200, 3]], dtype=torch.uint8), 16), 16).tolist() == [[200, 3]]
