"""quant_dfp: the format against exact fractions, products against int64, layers against autograd, and bad input."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eff.errors import ConfigError, RequestError, RunError, UnsupportedModelError
from eff.options import check_config
from eff.run import Run
from eff.tasks import Classification, ClassificationOptions
from eff_quant_dfp.config import DFPConfig
from eff_quant_dfp.fixed import Fixed, add, down_convert, multiply, quantize, shift_right
from eff_quant_dfp.layers import DFPLayer, dfp_layers, insert
from eff_quant_dfp.plugin import DFPTraining
from eff_quant_dfp.product import product
from eff_quant_kit.packed import pack_state, unpack_state

EFF_PLUGIN = "quant_dfp"
FLOATS = st.floats(-1e6, 1e6, width=32)
OFF = {"forward": False, "backward_data": False, "backward_weight": False}


def test_contract(eff_contract_check):
    eff_contract_check()


@settings(max_examples=200, deadline=None)
@given(values=st.lists(FLOATS, min_size=1, max_size=8), bits=st.integers(4, 16))
def test_every_element_is_within_half_a_step_and_the_largest_uses_the_range(values, bits):
    x = torch.tensor(values)
    found = quantize(x, bits)
    step = Fraction(2) ** found.exponent
    largest = max(abs(Fraction(v)) for v in x.tolist())
    if largest == 0:
        assert found.exponent == 0 and not found.codes.any()
        return
    limit = 2 ** (bits - 1) - 1
    assert Fraction(2) ** (found.exponent + bits - 2) <= largest < Fraction(2) ** (found.exponent + bits - 1)
    for value, code in zip(x.tolist(), found.codes.tolist(), strict=True):
        exact = Fraction(value) / step
        assert abs(code - max(-limit, min(limit, exact))) <= Fraction(1, 2) and abs(code) <= limit


@pytest.mark.parametrize("largest", [1.0, 2.0**-149, 3.4e38, 2.0**-126, math.nextafter(2.0, 0.0)])
@pytest.mark.parametrize("bits", [4, 16])
def test_extreme_tensors_stay_finite_and_exact_multiples_survive(largest, bits):
    x = torch.tensor([largest, -largest / 2 if largest > 1e-40 else 0.0, 0.0])
    found = quantize(x, bits)
    back = found.float()
    assert torch.isfinite(back).all()
    tolerance = 2.0 ** -(bits - 2) * largest
    assert (back.double() - x.double()).abs().max() <= tolerance


def test_multiples_of_the_step_convert_without_error():
    codes = torch.randint(-32767, 32768, (1000,), generator=torch.Generator().manual_seed(0))
    codes[0] = 32767
    for exponent in (-130, -20, 0, 60):
        x = torch.ldexp(codes.double(), torch.tensor(float(exponent))).float()
        found = quantize(x)
        assert torch.equal(found.float(), x)


def test_head_room_and_roundings():
    x = torch.tensor([1.0, -0.3, 0.3, 0.0001])
    assert quantize(x, 8, pre_shift=2).codes.tolist() == [16, -5, 5, 0]
    assert quantize(x, 8, rounding="truncate").codes.tolist() == [64, -19, 19, 0]
    assert quantize(x, 8).flushed == 0.25
    generator = torch.Generator().manual_seed(0)
    many = quantize(
        torch.cat([torch.ones(1), torch.full((200_000,), 0.3)]), 6, rounding="stochastic", generator=generator
    )
    assert set(many.codes[1:].tolist()) == {4, 5} and abs(float(many.float()[1:].mean()) - 0.3) < 1e-3


@settings(max_examples=100, deadline=None)
@given(
    a=st.integers(-32767, 32767), b=st.integers(-32767, 32767), e=st.integers(-20, 20), f=st.integers(-20, 20),
)  # fmt: skip
def test_primitives_against_fractions(a, b, e, f):
    one, other = (Fixed(torch.tensor([code], dtype=torch.int16), power) for code, power in ((a, e), (b, f)))
    assert int(multiply(one, other).codes) == a * b and multiply(one, other).exponent == e + f
    total = add(one, other)
    exact = Fraction(a) * Fraction(2) ** e + Fraction(b) * Fraction(2) ** f
    assert abs(Fraction(int(total.codes)) * Fraction(2) ** total.exponent - exact) <= Fraction(2) ** total.exponent / 2
    wide = Fixed(torch.tensor([a * b], dtype=torch.int32), e)
    short = down_convert(wide)
    assert short.codes.dtype == torch.int16 and abs(int(short.codes)) <= 32767
    error = abs(Fraction(int(short.codes)) * Fraction(2) ** short.exponent - Fraction(a * b) * Fraction(2) ** e)
    assert error <= Fraction(2) ** short.exponent  # half a step of rounding, half of clipping 2^15
    assert int(shift_right(torch.tensor([-3]), 1)) == -1 and int(shift_right(torch.tensor([3]), 1)) == 2


def operands(kind, k=37, m=5, n=6, groups=2, largest=32767):
    generator = torch.Generator().manual_seed(k)
    a = torch.randint(-largest, largest + 1, (groups, m, k), generator=generator)
    b = torch.randint(-largest, largest + 1, (groups, k, n), generator=generator)
    if kind == "full":
        a, b = torch.full_like(a, largest), torch.full_like(b, largest)
    if kind == "opposite":
        a, b = torch.full_like(a, -largest), torch.full_like(b, largest)
    return a.to(torch.int16), b.to(torch.int16)


def chains_by_hand(a, b, chain, exponent):
    """Chains in Python integers, float32 sums in order."""
    out = np.zeros((a.shape[0], a.shape[1], b.shape[2]), np.float32)
    for start in range(0, a.shape[2], chain):
        part = a[..., start : start + chain].numpy().astype(object) @ b[:, start : start + chain].numpy().astype(object)
        assert max(abs(int(v)) for v in part.flat) < 2**31
        out += part.astype(np.float32)
    return out * np.float32(2.0**exponent)


@pytest.mark.parametrize("kind", ["random", "full", "opposite"])
@pytest.mark.parametrize("pre_shift", [0, 1, 2, 3])
def test_guaranteed_chains_never_wrap_even_on_full_scale_operands(kind, pre_shift):
    config = DFPConfig(pre_shift=pre_shift)
    assert config.products == [2, 8, 32, 128][pre_shift]
    a, b = operands(kind, k=130, largest=config.largest)
    found, overflows = product(Fixed(a, -3), Fixed(b, 1), config.products)
    assert overflows == 0
    np.testing.assert_array_equal(found.numpy(), chains_by_hand(a, b, config.products, -2))
    assert product(Fixed(a, 0), Fixed(b, 0), config.products, "checked")[1] == 0


@pytest.mark.parametrize("bits", range(4, 17))
def test_the_guaranteed_chain_is_the_longest_even_one(bits):
    config = DFPConfig(bits=bits)
    chain, product_ = config.guaranteed_chain, config.largest**2
    assert chain * product_ <= 2**31 - 1 < (chain + 2) * product_


def test_a_chain_longer_than_the_sum_costs_no_memory():
    config = DFPConfig(bits=4)
    a, b = operands("random", k=9, largest=config.largest)
    found, _ = product(Fixed(a, 0), Fixed(b, 0), config.products)
    assert config.products > 10**7 and torch.equal(found, (a.long() @ b.long()).float())


def test_longer_chains_wrap_as_int32_does_and_are_noticed():
    a, b = operands("full", k=8)
    found, overflows = product(Fixed(a, 0), Fixed(b, 0), 4, "wrap")
    with np.errstate(over="ignore"):
        part = (np.int32(32767) * np.int32(32767) * np.array([4], np.int64)).astype(np.int32).astype(np.float32)
    assert overflows == 2 * 2 * 5 * 6 and (found == 2 * float(part[0])).all()
    with pytest.raises(RunError, match="fc1: 120 partial sums of 4 products left 32 bits; use a shorter chain"):
        product(Fixed(a, 0), Fixed(b, 0), 4, "checked", "fc1")
    saturated, hit = product(Fixed(a, 0), Fixed(b, 0), 4, "saturate")
    assert hit == 120 and (saturated == 2 * float(np.float32(2**31 - 1))).all()
    random = operands("random", k=2000)
    assert product(*(Fixed(one, 0) for one in random), 4, "wrap")[1] > 0


def test_pieces_change_nothing(monkeypatch):
    a, b = operands("random", k=65)
    whole, _ = product(Fixed(a, 0), Fixed(b, 0), 2)
    monkeypatch.setattr("eff_quant_dfp.product.PIECE", 1)
    assert torch.equal(whole, product(Fixed(a, 0), Fixed(b, 0), 2)[0])


LAYERS = {
    "linear": (nn.Linear(12, 5), (3, 4, 12)),
    "conv": (nn.Conv2d(4, 6, 3, 2, 1), (2, 4, 7, 8)),
    "groups, dilation": (nn.Conv2d(4, 6, (3, 2), 1, (2, 0), 2, 2, bias=False), (2, 4, 9, 8)),
    "reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 6, 6)),
}


def gradients(layer, x, weight):
    x = x.clone().requires_grad_()
    weight.grad = None
    y = layer(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    return y.detach(), x.grad, weight.grad.clone()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("options", "tolerance"), [(OFF, 1e-5), ({}, 1e-3), ({"bits": 12}, 2e-2)])
def test_layers_and_gradients_are_those_of_torch(name, options, tolerance):
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = gradients(layer, x, layer.weight)
    found = gradients(DFPLayer(layer, DFPConfig(**options)), x, layer.weight)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def test_the_bias_gradient_is_the_sum_of_unquantized_gradients():
    layer = DFPLayer(nn.Linear(3, 2), DFPConfig(bits=4))
    grad = torch.tensor([[1.0, 1e-4]] * 8)
    layer(torch.ones(8, 3)).backward(grad)
    assert torch.equal(layer.layer.bias.grad, grad.sum(0)) and layer.seen["dy"].flushed == 0.5


def test_each_tensor_is_quantized_once_and_its_integers_serve_both_backward_products(monkeypatch):
    layer = DFPLayer(nn.Linear(6, 4), DFPConfig(bits=8))
    roles = []
    original = layer.fixed
    monkeypatch.setattr(layer, "fixed", lambda x, role: roles.append(role) or original(x, role))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = layer(x)
    grad = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    y.backward(grad)
    assert roles == ["x", "w", "dy"]
    qx, qw, qg = (quantize(v.detach(), 8).float().double() for v in (x, layer.layer.weight, grad))
    torch.testing.assert_close(x.grad.double(), qg @ qw, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer.layer.weight.grad.double(), qg.t() @ qx, rtol=1e-6, atol=1e-7)


def test_single_products_can_stay_in_float():
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(6, 4)
    exact = gradients(layer, x, layer.weight)
    for index, key in enumerate(("forward", "backward_data", "backward_weight")):
        found = gradients(DFPLayer(layer, DFPConfig(bits=4, **{key: False})), x, layer.weight)
        same = [torch.allclose(one, other, atol=1e-6) for one, other in zip(found, exact, strict=True)]
        assert same == [place == index for place in range(3)]


def test_small_updates_reach_the_master_copy():
    model = insert(nn.Sequential(nn.Linear(4, 4, bias=False)), DFPConfig(bits=4))
    weight = model[0].layer.weight
    with torch.no_grad():
        weight.fill_(1.5)
    before = model[0].fixed(weight.detach(), "w").codes
    with torch.no_grad():
        weight.sub_(1e-4)  # far below a step of 4 bits
    assert torch.equal(model[0].fixed(weight.detach(), "w").codes, before) and float(weight[0, 0]) != 1.5


def test_the_packed_file_holds_the_integers_and_gives_the_same_outputs():
    model = insert(nn.Sequential(nn.Linear(10, 4)), DFPConfig(bits=12))
    tensors, details = pack_state(model)
    assert tensors["0.layer.weight"].numel() == 40 + 20  # 12 bits: a byte and a nibble each
    again = insert(nn.Sequential(nn.Linear(10, 4)), DFPConfig(bits=12))
    again.load_state_dict(unpack_state(tensors, details))
    x = torch.randn(3, 10)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 17}, "bits must be between 4 and 16, got 17"),
        ({"chain": 4}, "chain is 4, at most 2 products are safe with bits=16 and pre_shift=0"),
        ({"chain": 0}, "chain must be at least 1, got 0"),
        ({"bits": 4, "pre_shift": 3}, "bits=4 less pre_shift=3 leaves no magnitude"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_config("quant_dfp", DFPConfig, options)


@pytest.fixture
def run():
    task = Classification(ClassificationOptions(input_shape=(1, 4, 4), classes=("a", "b")))
    return Run(task, torch.device("cpu"))


def test_unfit_models_and_requests_are_refused(run):
    with pytest.raises(UnsupportedModelError, match="0 has float16 weights; the master copy must be float32"):
        DFPTraining().transform(model=nn.Sequential(nn.Linear(2, 2).half()), run=run)
    with pytest.raises(UnsupportedModelError, match=r"0 is a Conv1d that is not supported .*exempt=0"):
        DFPTraining().transform(model=nn.Sequential(nn.Conv1d(2, 2, 1)), run=run)
    with pytest.raises(ConfigError, match="exempt 'head' fits no layer"):
        DFPTraining(DFPConfig(exempt=("head",))).transform(model=nn.Sequential(nn.Linear(2, 2)), run=run)
    run.precision = "bf16"
    with pytest.raises(RequestError, match="--precision bf16 would round"):
        DFPTraining().transform(model=nn.Sequential(nn.Linear(2, 2)), run=run)


def test_nan_names_the_tensor():
    model = insert(nn.Sequential(nn.Linear(2, 2)), DFPConfig())
    with pytest.raises(RunError, match=r"0\.x holds NaN or infinity"):
        model(torch.tensor([[float("nan"), 1.0]]))
    with pytest.raises(RunError, match="fc holds NaN or infinity"):
        quantize(torch.tensor([float("inf")]), name="fc")


def test_odd_chains_lose_one_product_with_a_note_and_exempt_layers_stay(run):
    config = DFPConfig(overflow="checked", chain=5, exempt=("2",))
    model = DFPTraining(config).transform(model=nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), run=run)
    assert list(dfp_layers(model)) == ["0"] and config.products == 4
    assert any("chain=5 becomes 4" in line for line in run.log.warnings)
