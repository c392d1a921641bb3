"""quant_biadapter: codebooks against scipy, gradients against autograd's formula, placement, files, bad input."""

import copy

import pytest
import torch
from torch import nn

from eff.errors import ConfigError, RequestError, RunError, UnsupportedModelError
from eff.models import build_model, parse_source
from eff.options import check_config
from eff.run import Run
from eff.session import Plugins
from eff.tasks import Classification, ClassificationOptions
from eff_quant_biadapter.config import BiAdapterConfig
from eff_quant_biadapter.insert import BesideMLP, adapter_layers
from eff_quant_biadapter.plugin import BiAdapter
from eff_quant_biadapter.qlinear import EPS, QLinear, codebook
from eff_quant_biadapter.storage import dump, layer_bytes, load, payload_bytes, read_header

EFF_PLUGIN = "quant_biadapter"


def test_contract(eff_contract_check):
    eff_contract_check()


@pytest.fixture
def run():
    task = Classification(ClassificationOptions(input_shape=(1, 8, 8), classes=tuple("0123456789")))
    return Run(task, torch.device("cpu"))


@pytest.fixture
def vit(run):
    torch.manual_seed(0)
    return build_model(parse_source("zoo:vit_micro?depth=2&dim=16&heads=2"), run, Plugins()).eval()


def adapted(model, run, **options):
    method = BiAdapter(BiAdapterConfig(**{"dim": 4, **options}))
    return method.transform(model=copy.deepcopy(model), run=run).eval(), method


@pytest.mark.parametrize(("bits", "expected"), [(1, [0.6745]), (2, [0.3778, 1.2657])])
def test_small_codebooks_are_those_of_the_paper(bits, expected):
    values, borders = codebook(bits)
    torch.testing.assert_close(
        values[2 ** (bits - 1) :], torch.tensor(expected, dtype=torch.float64), rtol=2e-4, atol=0
    )
    torch.testing.assert_close(values, -values.flip(0))
    assert len(borders) == len(values) - 1
    assert float(codebook(4)[0][-1]) == pytest.approx(2.2655, abs=2e-3)
    assert float(codebook(1, "l2_normal")[0][-1]) == pytest.approx(0.7979, abs=1e-4)


@pytest.mark.parametrize(("kind", "power"), [("l1_normal", 1), ("l2_normal", 2)])
def test_no_other_two_bit_codebook_has_a_smaller_expected_error(kind, power):
    x = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    density = (-x.square() / 2).exp()

    def error(values):
        return float(((x[:, None] - values).abs().amin(1) ** power * density).sum())

    values = codebook(2, kind)[0]
    least = error(values)
    for index in range(4):
        for shift in (-0.02, 0.02):
            assert error(values + shift * torch.eye(4)[index]) > least


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_weight_is_the_formula_and_the_gradient_keeps_the_scale_term(bits):
    torch.manual_seed(0)
    layer = QLinear(6, 5, bits, "l1_normal", small=False).double()
    w = layer.weight.detach()
    mu, sd = w.mean(), w.std()
    z = (w - mu) / (sd + EPS)
    values = codebook(bits)[0]
    q = values[(z[..., None] - values).abs().argmin(-1)]
    torch.testing.assert_close(layer.effective().detach(), q * sd + mu)
    grad = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (layer.effective() * grad).sum().backward()
    d_sd = (w - mu) / (sd * (w.numel() - 1))
    expected = grad + (grad * (q - z)).sum() * d_sd
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-4, atol=1e-4)  # up to the 1e-5 beside sd


def test_one_bit_is_the_sign_and_naive_binarisation_the_mean_magnitude():
    layer = QLinear(6, 5, 1, "l1_normal", small=False)
    w = layer.weight.detach()
    expected = w.mean() + 0.6744898 * w.std() * (w - w.mean()).sign()
    torch.testing.assert_close(layer.effective().detach(), expected)
    layer.kind = "sign"
    torch.testing.assert_close(layer.effective().detach(), w.sign() * w.abs().mean())


def test_initial_weights_have_spread_and_a_float_adapter_starts_at_zero():
    small = QLinear(8, 8, 1, "l1_normal", small=True).weight
    small = small.detach()
    assert 0 < float(small.std()) < 0.002 and float(small.abs().max()) <= 0.002
    assert not QLinear(8, 8, 32, "l1_normal", small=True).weight.any()
    flat = QLinear(2, 2, 1, "l1_normal", small=False)
    nn.init.ones_(flat.weight)
    flat.name = "blocks.0.down"
    with pytest.raises(RunError, match="the weights of blocks.0.down are all equal"):
        flat.effective()


def test_adaptformer_reads_the_stream_before_the_norm(vit, run):
    model, method = adapted(vit, run, scale=10.0)
    assert method.structure == {"targets": ["blocks.0.mlp", "blocks.1.mlp"], "head": "head"}
    x = torch.randn(2, 1, 8, 8)
    block, original = model.blocks[0], vit.blocks[0]
    tokens = torch.randn(2, 5, 16)
    stream = tokens + original.attn(original.norm1(tokens))
    expected = stream + original.mlp(original.norm2(stream)) + block.mlp.adapter(stream)
    with torch.no_grad():
        torch.testing.assert_close(block(tokens), expected)
        assert not torch.allclose(model(x), vit(x))


def test_lora_touches_query_and_value_alone(vit, run):
    model, method = adapted(vit, run, placement="lora", scale=100.0)
    assert method.structure["targets"] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        change = model.blocks[0].attn.qkv(x) - vit.blocks[0].attn.qkv(x)
    query, key, value = change.chunk(3, -1)
    assert not key.any() and query.any() and value.any()


def test_adapters_and_head_train_and_nothing_else(vit, run):
    model, _ = adapted(vit, run)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {f"{name}.weight" for name in adapter_layers(model)}
    assert trained == adapters | {"head.weight", "head.bias"} and len(adapters) == 4
    binary, _ = adapted(vit, run, binary_head=True)
    assert isinstance(binary.head, QLinear) and binary.head.bits == 1
    float_start, _ = adapted(vit, run, bits=32)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(float_start(x), vit(x))


def test_evaluation_computes_with_quantized_weights(vit, run):
    model, _ = adapted(vit, run)
    layer = next(iter(adapter_layers(model).values()))
    assert len(layer.effective().unique()) == 2 and len(layer.weight.unique()) > 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 2},
        {"bits": 4, "dim": 3},
        {"bits": 32},
        {"codebook": "sign"},
        {"binary_head": True},
        {"placement": "lora"},
    ],
)
def test_a_file_has_the_bytes_of_the_formula_and_gives_the_same_outputs(vit, run, tmp_path, options):
    model, method = adapted(vit, run, **options)
    path = tmp_path / "task.bin"
    path.write_bytes(dump(model, "head", method.config))
    bits, dim = options.get("bits", 1), options.get("dim", 4)
    widths = [(16, dim), (dim, 16)] * (4 if options.get("placement") == "lora" else 2)
    expected = sum(4 * a * b if bits == 32 else -(-a * b * bits // 8) + 8 for a, b in widths)
    expected += 160 // 8 + 8 if options.get("binary_head") else 4 * (160 + 10)
    assert len(read_header(path)[1]) == payload_bytes(model, "head") == expected
    again, _ = adapted(vit, run, **options, load=str(path))
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=1e-5)
    assert dump(again, "head", method.config) == path.read_bytes()


def test_the_first_weight_lies_in_the_lowest_bits():
    layer = QLinear(4, 1, 2, "l1_normal", small=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-2.0, -0.1, 0.1, 2.0]]))
    holder = nn.Module()
    holder.down, holder.head = layer, nn.Linear(1, 1)
    raw = dump(holder, "head", BiAdapterConfig(bits=2))
    assert layer_bytes(layer) == 9 and raw[-17] == 0b11100100


def test_files_of_other_models_and_damaged_files_change_nothing(vit, run, tmp_path):
    model, method = adapted(vit, run)
    path = tmp_path / "task.bin"
    whole = dump(model, "head", method.config)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def refused(raw, message, target=model, config=method.config):
        path.write_bytes(raw)
        with pytest.raises(RequestError, match=message):
            load(target, path, "head", config)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    refused(whole[:-1], "bytes of weights, expected")
    refused(b"zip", "is no adapter file")
    refused(whole.replace(b'"version": 1', b'"version": 7'), "has version 7, this reads 1")
    refused(whole[:20], "the header of .* is damaged")
    refused(whole, "has bits=1; give -o bits=1", config=BiAdapterConfig(bits=2))
    wider, _ = adapted(vit, run, dim=8)
    refused(whole, r"does not fit the model at blocks\.0\.mlp\.adapter\.down", target=wider)
    other = copy.deepcopy(vit)
    nn.init.normal_(other.blocks[0].attn.proj.weight)
    refused(whole, "was trained on another base model", target=adapted(other, run)[0])
    with pytest.raises(RequestError, match="cannot read"):
        load(model, tmp_path / "none", "head", method.config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits: input should be 1, 2, 4, 8 or 32, got 3"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"bits": 2, "codebook": "sign"}, "codebook=sign has 1 bit, bits is 2"),
        ({"epochs": 5}, "warmup is 10, above epochs, which is 5"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_config("quant_biadapter", BiAdapterConfig, options)


def test_what_is_not_there_is_named_with_candidates(vit, run):
    with pytest.raises(ConfigError, match=r"target 'layers\.\*' fits nothing; candidates: blocks\.0\.mlp"):
        adapted(vit, run, targets=("layers.*",))
    with pytest.raises(ConfigError, match="head 'classifier' is no linear layer"):
        adapted(vit, run, head="classifier")
    with pytest.raises(UnsupportedModelError, match="has no MLPs called mlp, ffn"):
        adapted(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), run)


def test_other_blocks_are_found_by_pattern(run):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64))
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            x = x.flatten(1)
            return self.head(x + self.body(x))

    model, _ = adapted(Net(), run, targets=("body",))
    assert isinstance(model.body, BesideMLP) and model.body._tap == [None]
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
