"""PaCA: the layer, the choice of columns, packed bases, whole runs."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from eff.errors import ConfigError, ModelError, PluginError, UnsupportedModelError
from eff.log import Log
from eff.models import make_task
from eff.run import Run
from eff.runner import apply
from eff.schemas import CORE_TRAINING, MethodUse, Recipe, TaskSpec, TrainOptions
from eff.session import Chosen, Plugins
from eff.training import Training
from eff.use import UseRequest, evaluate
from eff_kernels.partial_linear import partial_linear
from eff_peft_kit.delta import apply_delta, matrix, read_delta, remove_delta
from eff_peft_paca.config import PaCAConfig
from eff_peft_paca.diagnostics import gradient_error, record_kept
from eff_peft_paca.layer import PartialLayer, partial_layers
from eff_peft_paca.packed import BLOCK, NF4_LEVELS, PackedLinear, pack, unpack
from eff_peft_paca.plugin import PaCA
from eff_peft_paca.selection import choose_columns, column_norms
from eff_peft_paca.sentences import TEMPLATES, TEST, TRAIN, make_sentences

EFF_PLUGIN = "peft_paca"


def test_contract(eff_contract_check):
    eff_contract_check()


CLASSES = 3


class Mlp(nn.Module):
    """Two hidden layers and a head, on flattened 4 x 4 images."""

    def __init__(self, num_classes: int = CLASSES, in_channels: int = 1):
        super().__init__()
        self.fc1 = nn.Linear(16 * in_channels, 12)
        self.fc2 = nn.Linear(12, 8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(F.gelu(self.fc2(F.gelu(self.fc1(x.flatten(1))))))


class Samples:
    """Gaussian images around one centre per class."""

    def __init__(self, count: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(CLASSES, 1, 4, 4, generator=torch.Generator().manual_seed(9))
        self.labels = torch.arange(count) % CLASSES
        self.images = centres[self.labels] + 0.3 * torch.randn(count, 1, 4, 4, generator=generator)

    def __len__(self):
        return len(self.labels)

    def batch(self, indices, generator=None):
        index = torch.as_tensor(list(indices))
        return {"image": self.images[index], "label": self.labels[index]}

    def fingerprint(self):
        return "samples"


TASK = TaskSpec(options={"input_shape": [1, 4, 4], "classes": ["a", "b", "c"]})


def a_run(**changes) -> Run:
    from eff.data import Data
    from eff.schemas import DataSpec

    data = Data(DataSpec(scheme="samples"), TASK, Samples(48, 0), Samples(24, 1))
    train = CORE_TRAINING.model_copy(update={"epochs": 2, "batch_size": 8, "augment": False, **changes})
    return Run(make_task(TASK, Plugins((), ())), torch.device("cpu"), 0, data, train=train, training=True)


def adapt(model: nn.Module, run: Run | None = None, **options) -> tuple[nn.Module, PaCA, Run]:
    run = run or a_run()
    method = PaCA(PaCAConfig(**{"r": 3, "alpha": 3, **options}))
    return method.transform(model=model, run=run), method, run


def an_mlp(seed: int = 0) -> Mlp:
    torch.manual_seed(seed)
    return Mlp()


def train(model: nn.Module, method: PaCA, run: Run) -> nn.Module:
    training = Training(model, run, Plugins([Chosen("peft_paca", "0", "eff-peft-paca", method)], ()))
    training.run_all()
    return training.raw_model


# --- the layer


def partial(layer: nn.Module, index=(3, 0), scale: float = 2.0) -> PartialLayer:
    return PartialLayer(layer, torch.tensor(index), scale)


def test_at_the_start_the_function_is_that_of_the_layer():
    torch.manual_seed(0)
    layer = nn.Linear(5, 4)
    before, x = copy.deepcopy(layer), torch.randn(2, 3, 5)
    wrapped = partial(layer)
    torch.testing.assert_close(wrapped(x), before(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(wrapped.p, before.weight[:, [3, 0]] / 2.0)


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (2, 2, 3, 5)], ids=str)
def test_gradients_are_those_of_the_whole_weight_cut_to_the_columns(shape):
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    full, x = copy.deepcopy(layer), torch.randn(*shape, dtype=torch.float64)
    wrapped = partial(layer)
    wrapped.layer.weight.requires_grad_(False)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    full(one).square().sum().backward()
    wrapped(two).square().sum().backward()
    torch.testing.assert_close(wrapped.p.grad, 2.0 * full.weight.grad[:, [3, 0]])
    torch.testing.assert_close(two.grad, one.grad)
    torch.testing.assert_close(wrapped.layer.bias.grad, full.bias.grad)
    assert wrapped.layer.weight.grad is None


@pytest.mark.parametrize("format", [None, "nf4", "int8"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_passes_with_the_columns_as_a_function_of_p(format, bias):
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=bias).double()
    wrapped = partial(layer if format is None else PackedLinear(layer, format))
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    own_bias = layer.bias

    def forward(x, p):
        with torch.no_grad():
            wrapped.p.copy_(p)
        wrapped.synchronise()
        again = None if wrapped.in_place else wrapped.dense_weight
        weight = wrapped.dense_weight().clone()
        return partial_linear(x, weight, p, wrapped.index, own_bias, scale=wrapped.scale, again=again)

    p = wrapped.p.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(forward, (x, p), eps=1e-6, atol=1e-6)


def test_a_convolution_trains_its_input_channels():
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 4, 3, stride=2, padding=1, dilation=1).double()
    full, x = copy.deepcopy(layer), torch.randn(2, 5, 7, 6, dtype=torch.float64)
    wrapped = partial(layer)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    full(one).square().sum().backward()
    wrapped(two).square().sum().backward()
    torch.testing.assert_close(wrapped.p.grad, 2.0 * full.weight.grad[:, [3, 0]])
    torch.testing.assert_close(two.grad, one.grad)
    torch.testing.assert_close(layer.bias.grad, full.bias.grad)


def test_a_layer_stored_as_in_out_trains_rows():
    class Conv1D(nn.Module):  # as transformers has it
        def __init__(self, nf, nx):
            super().__init__()
            self.nf = nf
            self.weight = nn.Parameter(torch.randn(nx, nf))
            self.bias = nn.Parameter(torch.zeros(nf))

        def forward(self, x):
            return x @ self.weight + self.bias

    torch.manual_seed(0)
    layer = Conv1D(4, 5)
    full, x = copy.deepcopy(layer), torch.randn(3, 5)
    wrapped = partial(layer)
    full(x).square().sum().backward()
    wrapped(x).square().sum().backward()
    torch.testing.assert_close(wrapped.p.grad, 2.0 * full.weight.grad[[3, 0]].t())
    with torch.no_grad():
        wrapped.p.zero_()
    wrapped.synchronise()
    assert (layer.weight[[3, 0]] == 0).all() and (layer.weight[[1, 2, 4]] != 0).all()


def test_only_the_chosen_activations_are_kept():
    layer = nn.Linear(64, 32)
    wrapped = PartialLayer(layer, torch.arange(4), 1.0)
    x = torch.randn(10, 64, requires_grad=True)
    with record_kept(wrapped, {"layer": wrapped}) as kept:
        y = wrapped(x)
    assert kept.layers == kept.total == 10 * 4 * 4  # samples x columns x bytes
    layer.weight.requires_grad_(True)
    with record_kept(layer, {"layer": layer}) as whole:
        z = layer(x * 1)
    assert whole.layers == 10 * 64 * 4
    del y, z


def test_half_precision_weights_have_a_float_master():
    torch.manual_seed(0)
    layer = nn.Linear(8, 4).to(torch.bfloat16)
    wrapped = partial(layer)
    assert wrapped.p.dtype == torch.float32
    wrapped(torch.randn(3, 8, dtype=torch.bfloat16)).float().sum().backward()
    assert wrapped.p.grad.dtype == torch.float32
    with torch.no_grad():
        wrapped.p += 1e-4  # below the resolution of bfloat16
    wrapped.synchronise()
    assert torch.equal(layer.weight[:, 3], (2.0 * wrapped.p[:, 0]).detach().to(torch.bfloat16))


def test_autocast_gives_gradients_in_the_parameters_precision():
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    full, x = copy.deepcopy(layer), torch.randn(3, 8, requires_grad=True)
    wrapped = partial(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = wrapped(x), full(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    z.float().sum().backward()
    assert wrapped.p.grad.dtype == torch.float32
    torch.testing.assert_close(wrapped.p.grad, 2.0 * full.weight.grad[:, [3, 0]], atol=0.05, rtol=0.02)


def test_gradient_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    wrapped = partial(nn.Linear(6, 6))
    x = torch.randn(4, 6, requires_grad=True)
    wrapped(wrapped(x).relu()).sum().backward()
    plain = wrapped.p.grad.clone()
    wrapped.p.grad = None
    checkpoint(lambda x: wrapped(wrapped(x).relu()), x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(wrapped.p.grad, plain)


@settings(max_examples=25, deadline=None)
@given(
    outputs=st.integers(1, 6), inputs=st.integers(1, 9), rows=st.integers(1, 5), seed=st.integers(0, 999),
    share=st.floats(0.0, 1.0), scale=st.floats(0.25, 4.0),
)  # fmt: skip
def test_one_sgd_step_is_a_masked_step_of_full_training(outputs, inputs, rows, seed, share, scale):
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs).double()
    full, x = copy.deepcopy(layer), torch.randn(rows, inputs, dtype=torch.float64)
    index = torch.randperm(inputs)[: max(1, round(share * inputs))]
    wrapped = PartialLayer(layer, index, scale)
    full(x).square().sum().backward()
    wrapped(x).square().sum().backward()
    with torch.no_grad():
        wrapped.p -= 0.1 * wrapped.p.grad
        mask = torch.zeros(inputs, dtype=torch.float64)
        mask[index] = scale**2  # the card of the method: s^2 lr is SGD's step on W
        expected = full.weight - 0.1 * full.weight.grad * mask
    wrapped.synchronise()
    torch.testing.assert_close(layer.weight, expected, atol=1e-6, rtol=1e-6)
    rest = [column for column in range(inputs) if column not in index.tolist()]
    assert torch.equal(layer.weight[:, rest], full.weight[:, rest])


def test_a_weight_is_never_stale():
    wrapped = partial(nn.Linear(5, 4))
    x = torch.randn(2, 5)
    before = wrapped(x)
    with torch.no_grad():
        wrapped.p.add_(1.0)
        assert not torch.equal(wrapped(x), before)
        torch.testing.assert_close(wrapped.layer.weight[:, [3, 0]], 2.0 * wrapped.p)


def test_the_released_write_back_rule_leaves_every_other_step_stale():
    wrapped = PartialLayer(nn.Linear(5, 4), torch.tensor([1]), 1.0, period=2)
    x = torch.ones(1, 5)
    stale = []
    for _ in range(4):
        with torch.no_grad():
            wrapped.p.add_(1.0)
        wrapped(x)
        stale.append(not torch.equal(wrapped.layer.weight[:, 1], wrapped.p.detach()[:, 0]))
    assert stale == [True, False, True, False]


# --- packed bases


def test_the_nf4_levels_are_normal_quantiles():
    norm = pytest.importorskip("scipy.stats", reason="needs scipy").norm
    offset = 0.9677083  # QLoRA, appendix E: halfway between the ends of 15 and 16 equal shares
    positive = norm.ppf(torch.linspace(offset, 0.5, 9)[:-1].double().numpy())
    negative = -norm.ppf(torch.linspace(offset, 0.5, 8)[:-1].double().numpy())
    levels = sorted([*positive, 0.0, *negative])
    torch.testing.assert_close(
        torch.tensor(levels) / max(levels), torch.tensor(NF4_LEVELS, dtype=torch.float64), atol=2e-6, rtol=0
    )


@settings(max_examples=25, deadline=None)
@given(outputs=st.integers(1, 9), inputs=st.integers(1, 130), seed=st.integers(0, 99))
def test_packing_rounds_to_the_nearest_level_of_the_block(outputs, inputs, seed):
    torch.manual_seed(seed)
    weight = torch.randn(outputs, inputs)
    for format in ("nf4", "int8"):
        found = unpack(*pack(weight, format), tuple(weight.shape), format)
        for flat, got in zip(
            weight.flatten().split(BLOCK) if format == "nf4" else weight,
            found.flatten().split(BLOCK) if format == "nf4" else found,
            strict=True,
        ):
            levels = torch.tensor(NF4_LEVELS) if format == "nf4" else torch.arange(-127, 128) / 127
            grid = levels * flat.abs().max()
            best = (flat[:, None] - grid).abs().min(1).values
            torch.testing.assert_close((flat - got).abs(), best, atol=1e-6, rtol=1e-5)


def test_a_block_of_zeros_stays_zero():
    weight = torch.zeros(2, 64)
    for format in ("nf4", "int8"):
        assert torch.equal(unpack(*pack(weight, format), (2, 64), format), weight)


def test_a_packed_base_takes_an_eighth_or_a_quarter_of_the_memory():
    layer = nn.Linear(256, 256)
    sizes = {}
    for format in ("nf4", "int8"):
        packed = PackedLinear(layer, format)
        sizes[format] = sum(value.numel() * value.element_size() for value in packed.buffers())
    whole = layer.weight.numel() * 4
    assert sizes["nf4"] == whole / 8 + 4 * layer.weight.numel() / BLOCK
    assert sizes["int8"] == whole / 4 + 4 * 256


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_on_a_packed_base_the_columns_start_from_the_dequantized_weight(format):
    torch.manual_seed(0)
    packed = PackedLinear(nn.Linear(70, 6), format)
    start, x = packed.weight().clone(), torch.randn(3, 70)
    wrapped = partial(packed, (69, 2))
    torch.testing.assert_close(wrapped(x), F.linear(x, start, packed.bias), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        wrapped.p.add_(0.01)
    expected = start.clone()
    expected[:, [69, 2]] = 2.0 * wrapped.p.detach()
    torch.testing.assert_close(wrapped.dense_weight(), expected)
    torch.testing.assert_close(packed.weight(), start)


# --- columns


def test_random_columns_differ_by_layer_and_repeat_by_seed():
    model = nn.ModuleDict({"a": nn.Linear(64, 4), "b": nn.Linear(64, 4)})
    layers = dict(model.named_children())
    first = choose_columns(model, layers, PaCAConfig(seed=1), a_run())
    assert torch.equal(first["a"], choose_columns(model, layers, PaCAConfig(seed=1), a_run())["a"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], choose_columns(model, layers, PaCAConfig(seed=2), a_run())["a"])
    assert len(set(first["a"].tolist())) == 8


def test_columns_are_chosen_by_norm_from_either_end():
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 1.0, 0.5, 2.0], [0.0, 0.0, 0.0, 0.0]]))
    model = nn.ModuleDict({"a": layer})
    chosen = {
        name: choose_columns(model, {"a": layer}, PaCAConfig(r=2, selection=name), a_run())["a"].tolist()
        for name in ("weight_norm", "weight_norm_small")
    }
    assert chosen == {"weight_norm": [0, 3], "weight_norm_small": [2, 1]}


def test_gradient_norms_are_summed_over_batches_and_leave_no_trace():
    model, run = an_mlp(), a_run()
    reference = torch.zeros(16)
    batches = list(run.batches("train", 16, 8))
    for batch in batches:
        model.zero_grad()
        run.task.loss(run.forward(model, batch), batch).backward()
        reference += model.fc1.weight.grad.norm(dim=0)
    model.zero_grad()
    config = PaCAConfig(r=4, selection="grad_norm", warmup_batches=2)
    chosen = choose_columns(model, {"fc1": model.fc1}, config, run)["fc1"]
    assert chosen.tolist() == reference.argsort(descending=True)[:4].tolist()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_pruned_columns_are_not_chosen():
    model = an_mlp()
    with torch.no_grad():
        model.fc1.weight[:, :10] = 0
    adapted, method, _ = adapt(model, targets=("fc1",))
    assert min(method.structure["columns"]["fc1"]) >= 10
    with pytest.raises(ConfigError, match="r=7, but only 6 of the 16 input columns of 'fc1' are not pruned"):
        model = an_mlp()
        model.fc1.weight.data[:, :10] = 0
        adapt(model, r=7, targets=("fc1",))


def test_column_norms_of_a_convolution_are_per_input_channel():
    weight = torch.arange(24.0).view(2, 3, 2, 2)
    expected = [weight[:, channel].norm().item() for channel in range(3)]
    assert column_norms(weight).tolist() == pytest.approx(expected)


# --- which layers, and what is wrong with a request


def test_all_linear_layers_but_the_output_are_adapted_and_the_rest_is_frozen():
    model, method, _ = adapt(an_mlp())
    assert list(partial_layers(model)) == ["fc1", "fc2"]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["fc1.p", "fc2.p", "head.weight", "head.bias"]
    assert method.structure["trained"] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("option", "extra"),
    [("paca_only", {"fc1.layer.bias"}), ("all", {"fc1.layer.bias", "fc2.bias", "head.bias"}), ("none", set())],
)
def test_biases_are_trained_as_asked(option, extra):
    model, _, _ = adapt(an_mlp(), targets=("fc1",), train_bias=option, train_head=False)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {"fc1.p", *extra}


def test_patterns_set_rank_and_alpha_of_single_layers():
    model, _, _ = adapt(an_mlp(), rank_pattern={"fc1": 5}, alpha_pattern={"fc2": 6})
    layers = partial_layers(model)
    assert [len(layer.index) for layer in layers.values()] == [5, 3]
    assert [layer.scale for layer in layers.values()] == [3 / 5, 2.0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.vectors = nn.Embedding(16, 4)
        self.middle = nn.Linear(16, 4, bias=False)
        self.middle.weight = nn.Parameter(torch.randn(4, 16))
        self.back = nn.Linear(4, 16, bias=False)
        self.back.weight = self.vectors.weight
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.back(self.middle(x.flatten(1))))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 13}, ConfigError, "peft_paca: r=13 is more than the 12 input features of 'fc2'; use a smaller r"),
        ({"targets": ("fc3",)}, ConfigError, "targets: 'fc3' matches no layer; did you mean 'fc1'|'fc2'"),
        ({"targets": "query"}, ConfigError, "'query' matches no layer; layers are fc1, fc2"),
        ({"rank_pattern": {"fc9": 1}}, ConfigError, "rank_pattern: 'fc9' matches no adapted layer"),
        ({"rank_pattern": {"fc1": 0}}, ConfigError, "rank_pattern: 'fc1' must be above 0, got 0"),
        ({"alpha_pattern": {"fc1": -1.0}}, ConfigError, "alpha_pattern: 'fc1' must be above 0"),
    ],
)
def test_a_wrong_request_says_what_is_right(options, error, message):
    with pytest.raises(error, match=message) as raised:
        adapt(an_mlp(), **options)
    assert len(str(raised.value).splitlines()) == 1


def test_a_shared_weight_is_refused():
    with pytest.raises(UnsupportedModelError, match="the weight of 'back' is shared with 'vectors'"):
        adapt(Tied())
    assert list(partial_layers(adapt(Tied(), targets=("middle",))[0])) == ["middle"]


def test_a_model_with_nothing_but_an_output_layer_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    with pytest.raises(UnsupportedModelError, match="found no linear layer besides the output layer '1' in Sequential"):
        adapt(model)


def test_a_convolution_is_adapted_when_named_and_cannot_be_packed():
    def a_cnn():
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, CLASSES))

    model, method, run = adapt(a_cnn(), targets=("1",))
    assert list(partial_layers(model)) == ["1"]
    train(model, method, run)
    with pytest.raises(ConfigError, match="quantize_base=nf4 packs linear layers, and '1' is a convolution"):
        adapt(a_cnn(), targets=("1",), quantize_base="nf4")


# --- training, merging, deltas


def test_training_moves_the_columns_and_nothing_else_and_merging_adds_nothing():
    before = an_mlp()
    model, method, run = adapt(copy.deepcopy(before), alpha=6)
    model = train(model, method, run)
    x = torch.randn(5, 1, 4, 4)
    trained = model.eval()(x)
    merged = method.finish(model, run)
    assert type(merged.fc1) is nn.Linear and list(merged.state_dict()) == list(before.state_dict())
    assert torch.equal(merged(x), trained)
    for name, index in method.structure["columns"].items():
        new, old = merged.get_submodule(name).weight, before.get_submodule(name).weight
        changed = (new != old).any(0).nonzero().flatten().tolist()
        assert sorted(changed) == sorted(index)
        assert torch.equal(merged.get_submodule(name).bias, before.get_submodule(name).bias)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_packed_base_keeps_the_columns_apart_unless_told_to_round_them(format):
    model, method, run = adapt(an_mlp(), quantize_base=format)
    model = train(model, method, run)
    assert type(method.finish(model, run).fc1) is PartialLayer
    assert method.structure["merged"] is False
    model, method, run = adapt(an_mlp(), quantize_base=format, merge=True)
    run.log = Log()
    merged = method.finish(train(model, method, run), run)
    assert type(merged.fc1) is PackedLinear
    assert "merge=true rounds the trained columns" in run.log.warnings[0]


def test_a_delta_puts_the_training_onto_the_base_and_a_difference_takes_it_off(tmp_path):
    from eff_peft_kit.delta import write_delta
    from eff_peft_paca.insert import make_delta

    base = an_mlp()
    for kind in ("columns", "difference"):
        model, method, run = adapt(copy.deepcopy(base), delta=kind, train_bias="paca_only")
        finished = method.finish(train(model, method, run), run)
        path = tmp_path / f"{kind}.delta"
        details = write_delta(path, make_delta(finished, method.structure, method.config, method.original))
        assert details["numbers"] == 12 * 3 + 8 * 3 + 12 + 8 + 9 * CLASSES
        again = copy.deepcopy(base)
        assert apply_delta(again, path).method == "peft_paca"
        for key, value in finished.state_dict().items():
            torch.testing.assert_close(again.state_dict()[key], value, atol=1e-6, rtol=1e-6)
        if kind == "difference":
            remove_delta(again, path)
            torch.testing.assert_close(again.fc1.weight, base.fc1.weight, atol=1e-6, rtol=1e-6)
        else:
            with pytest.raises(ModelError, match="holds columns, not their difference .*cannot be taken out"):
                remove_delta(again, path)
    with pytest.raises(ModelError, match="the frozen part of 'fc1' is not what the delta was trained on"):
        apply_delta(an_mlp(seed=1), path)
    with pytest.raises(ModelError, match="the model has no layer 'fc1'"):
        apply_delta(nn.Linear(2, 2), path)
    assert read_delta(path).kind == "difference"


def test_checked_gradients_agree_with_the_whole_weights():
    model, _, run = adapt(an_mlp(), quantize_base="nf4")
    batch = next(run.batches("train", 8, 8))
    assert gradient_error(model, lambda: run.task.loss(run.forward(model, batch), batch)) < 1e-5


# --- whole runs


def recipe(tmp_path, model="zoo:vit_micro?depth=2", data="digits?train=128&test=64", **options) -> Recipe:
    pytest.importorskip("sklearn", reason="needs scikit-learn (eff-core[digits])")
    pytest.importorskip("eff_zoo", reason="needs eff-zoo")
    return Recipe(
        model=model, data=data, device="cpu", methods=(MethodUse(name="peft_paca", options={"r": 4, "alpha": 4, **options}),),
        train=TrainOptions(epochs=1, batch_size=32, lr=0.01, accumulate=1),
    )  # fmt: skip


def test_a_run_reports_what_it_saves_and_ships_a_plain_model(tmp_path):
    report = apply(recipe(tmp_path), tmp_path / "run")
    values = report.after.metrics.values
    saved = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["state_dict"]
    assert not [name for name in saved if name.endswith((".p", ".index"))]
    assert values["trainable_parameters"].value == 2 * 4 * (192 + 64 + 256 + 64) + 650
    assert values["gradient_error"].value < 1e-4
    assert values["kept_in_layers"].value < 8 * 17 * 4 * 4 * 8 + 1  # samples, tokens, columns, bytes, layers
    assert report.after.bytes == (tmp_path / "run" / "model.pt").stat().st_size  # a delta alone is no model
    assert (tmp_path / "run" / "model.delta").stat().st_size < 0.3 * (tmp_path / "run" / "model.pt").stat().st_size


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_run_on_a_packed_base_reloads_to_the_same_result(tmp_path, format):
    report = apply(recipe(tmp_path, quantize_base=format), tmp_path / "run")
    again = evaluate(UseRequest(str(tmp_path / "run"), device="cpu"))
    assert again.metrics.values["cross_entropy"].value == pytest.approx(
        report.after.metrics.values["cross_entropy"].value, rel=1e-5
    )
    # of the 102,218 numbers of the base, packed or not
    assert again.metrics.values["trainable_share"].value == pytest.approx(100 * (2 * 4 * 576 + 650) / 102_218)
    saved = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["state_dict"]
    assert saved["blocks.0.mlp.fc1.layer.codes"].dtype == (torch.uint8 if format == "nf4" else torch.int8)


def test_the_text_encoder_of_transformers_is_adapted(tmp_path):
    pytest.importorskip("transformers", reason="needs transformers (eff-zoo[text])")
    data = "eff_peft_paca.sentences:sentences?train=96&test=48&max_length=32"
    report = apply(recipe(tmp_path, "zoo:text_tiny", data), tmp_path / "run")
    assert report.after.metrics.values["trainable_parameters"].value == 2 * 4 * (4 * 32 + 64 + 32) + 33 * 6


def test_a_vit_of_transformers_is_adapted_in_bfloat16(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers (eff-core[text])")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_channels=1, num_labels=10,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    wanted = recipe(tmp_path, f"hf:{tmp_path / 'vit'}")
    report = apply(wanted.model_copy(update={"precision": "bf16"}), tmp_path / "run")
    assert report.after.metrics.values["trainable_parameters"].value > 170
    assert report.after.metrics.values["gradient_error"].value < 0.01  # bfloat16 has 8 bits
    again = evaluate(UseRequest(str(tmp_path / "run"), device="cpu"))
    assert again.metrics.values["cross_entropy"].value == pytest.approx(
        report.after.metrics.values["cross_entropy"].value, rel=0.01
    )


def test_quantization_goes_before_or_onto_the_finished_model_but_not_after_it_in_one_run(tmp_path):
    pytest.importorskip("eff_quant_lsq", reason="needs eff-quant-lsq")
    base = recipe(tmp_path)
    lsq = MethodUse(name="quant_lsq", options={"weight_bits": 8, "act_bits": 8, "init": "minmax"})
    after = base.model_copy(update={"methods": (*base.methods, lsq)})
    with pytest.raises(
        PluginError, match="has put QuantLayer into an adapted layer.*name that method before peft_paca"
    ):
        apply(after, tmp_path / "after")
    before = base.model_copy(update={"methods": (lsq, *base.methods)})
    report = apply(before, tmp_path / "before")
    assert report.after.metrics.values["gradient_error"].value < 1e-4
    again = evaluate(UseRequest(str(tmp_path / "before"), device="cpu"))
    assert again.metrics.values["accuracy"].value == report.after.metrics.values["accuracy"].value
    apply(base, tmp_path / "plain")
    then = Recipe(model=str(tmp_path / "plain"), device="cpu", methods=(lsq,), train=TrainOptions(epochs=0), export=())
    assert apply(then, tmp_path / "then").after is not None


def test_columns_on_a_fake_quantized_layer_stay_in_float():
    pytest.importorskip("eff_quant_kit", reason="needs eff-quant-kit")
    from eff_quant_kit.layers import QuantLayer
    from eff_quant_kit.quantizer import Quantizer

    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    quantizer = Quantizer(4, True, channels=4)
    quantizer.set_scale(torch.tensor(0.1))
    wrapped = partial(QuantLayer(layer, quantizer, None))
    with torch.no_grad():
        wrapped.p.add_(0.0123)
    expected = quantizer(layer.weight).detach()
    expected[:, [3, 0]] = 2.0 * wrapped.p.detach()
    torch.testing.assert_close(wrapped(torch.eye(6)), expected.t() + layer.bias)


# --- data


def test_sentences_of_train_and_test_share_no_paraphrase_person_action_or_time():
    assert all(not set(train) & set(test) for train, test in TEMPLATES.values())
    for name in ("who", "when"):
        assert not set(TRAIN[name]) & set(TEST[name])
    assert not {word for do in TRAIN["what"] for word in do} & {word for do in TEST["what"] for word in do}


def test_sentences_are_different_and_repeat_by_seed():
    import random

    texts, labels = make_sentences(TRAIN, 0, 20, random.Random(0))
    assert len(set(texts)) == len(texts) == 20 * len(TEMPLATES)
    assert labels.count(3) == 20
    assert make_sentences(TRAIN, 0, 20, random.Random(0))[0] == texts


def test_matrix_is_a_view_on_the_weight():
    layer = nn.Linear(3, 2)
    assert matrix(layer).data_ptr() == layer.weight.data_ptr()
