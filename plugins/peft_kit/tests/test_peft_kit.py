"""The adapter kit: choice of layers, freezing, delta files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eff.errors import ConfigError, ModelError, UnsupportedModelError
from eff_peft_kit.delta import Delta, apply_delta, base_checksum, read_delta, save_delta
from eff_peft_kit.freezing import freeze, parameter_metrics
from eff_peft_kit.targets import adaptable_layers, in_features, matches, output_layer, replace_module, select_targets


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(6, 6)
        self.key = nn.Linear(6, 6)
        self.mix = nn.MultiheadAttention(6, 2, batch_first=True)
        self.conv = nn.Conv2d(3, 4, 3)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)

    def forward(self, x):
        return self.key(self.query(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 2)  # defined first, used last
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.head(self.blocks(x))


def names(targets="all-linear"):
    model = Model()
    return list(select_targets("peft_x", model, targets, output_layer(model, lambda: model(torch.zeros(1, 6)))))


def test_the_output_layer_is_the_one_that_is_called_last():
    model = Model()
    assert output_layer(model, lambda: model(torch.zeros(1, 6))) == "head"
    assert output_layer(nn.Flatten(), lambda: None) is None
    assert model.training


def test_all_linear_leaves_out_the_head_attention_and_convolutions():
    assert names() == ["blocks.0.query", "blocks.0.key", "blocks.1.query", "blocks.1.key"]


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        ("query", ["blocks.0.query", "blocks.1.query"]),
        (("blocks.1.*",), ["blocks.1.query", "blocks.1.key", "blocks.1.conv"]),
        (("conv", "0.key"), ["blocks.0.key", "blocks.0.conv", "blocks.1.conv"]),
    ],
)
def test_patterns_fit_names_or_their_ends(targets, chosen):
    assert names(targets) == chosen


def test_a_pattern_does_not_fit_the_middle_of_a_word():
    assert matches("a.query", "query") and not matches("a.subquery", "query") and not matches("query.a", "query")


def test_a_pattern_without_a_layer_gets_the_names_there_are():
    with pytest.raises(
        ConfigError, match="peft_x: targets: 'qury' matches no layer; did you mean 'query'.; layers are"
    ):
        names("qury")
    with pytest.raises(ConfigError, match="'head' matches no layer"):
        names(("head",))


def test_nothing_to_adapt_is_said_with_an_example():
    with pytest.raises(
        UnsupportedModelError, match="found no linear layer in Sequential .*'0': ReLU.*nothing to adapt"
    ):
        select_targets("peft_x", nn.Sequential(nn.ReLU()), "all-linear", None)
    with pytest.raises(UnsupportedModelError, match="name convolutions in targets"):
        select_targets("peft_x", nn.Sequential(nn.Conv2d(1, 1, 1)), "all-linear", None)


def test_a_shared_weight_is_refused_by_name():
    model = Model()
    model.blocks[1].query.weight = model.blocks[0].query.weight
    with pytest.raises(UnsupportedModelError, match="'blocks.0.query' is shared with 'blocks.1.query'"):
        select_targets("peft_x", model, "all-linear", "head")


def test_a_module_under_two_names_is_replaced_under_both():
    model = nn.Module()
    model.a = model.b = nn.Linear(2, 2)
    new = nn.Linear(2, 2)
    replace_module(model, "a", new)
    assert model.a is new and model.b is new


def test_input_features_are_channels_for_convolutions():
    layers = adaptable_layers(Model())
    assert in_features(layers["blocks.0.conv"]) == 3 and in_features(layers["blocks.0.query"]) == 6


def test_freezing_keeps_the_named_modules_and_biases():
    model = Model()
    assert freeze(model, ["head"], "none", []) == ["head.weight", "head.bias"]
    assert freeze(model, [], "targets", ["blocks.0.key"]) == ["blocks.0.key.bias"]
    kept = freeze(model, [], "all", [])
    assert all(name.endswith("bias") for name in kept) and "blocks.1.conv.bias" in kept


def test_the_share_of_trained_parameters_is_in_percent():
    metrics = parameter_metrics(5, 200)
    assert metrics["trainable_parameters"].value == 5 and metrics["trainable_share"].value == 2.5


def a_delta(model, kind="columns"):
    index = torch.tensor([4, 1])
    weight = model.blocks[0].query.weight.detach()
    values = weight[:, index] + 1 if kind == "columns" else torch.ones(6, 2)
    bases = {"blocks.0.query": base_checksum(weight, index)}
    return Delta(kind, {"blocks.0.query": (index, values)}, {"head.bias": torch.tensor([7.0, 8.0])}, bases, "peft_x")


@pytest.mark.parametrize("kind", ["columns", "difference"])
def test_a_delta_survives_the_file_and_changes_just_its_columns(tmp_path, kind):
    model = Model()
    before = model.blocks[0].query.weight.detach().clone()
    save_delta(tmp_path / "a.delta", a_delta(model, kind))
    assert read_delta(tmp_path / "a.delta").numbers == 14
    apply_delta(model, tmp_path / "a.delta")
    change = model.blocks[0].query.weight.detach() - before
    assert (change[:, [0, 2, 3, 5]] == 0).all()
    torch.testing.assert_close(change[:, [4, 1]], torch.ones(6, 2))
    assert model.head.bias.tolist() == [7.0, 8.0]


def test_a_delta_that_does_not_fit_changes_nothing(tmp_path):
    model, other = Model(), Model()
    save_delta(tmp_path / "a.delta", a_delta(model))
    state = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ModelError, match="the frozen part of 'blocks.0.query' is not what the delta was trained on"):
        apply_delta(other, tmp_path / "a.delta")
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    model.blocks[0].query = nn.Linear(6, 5)
    with pytest.raises(ModelError, match=r"has columns of shape \(6, 2\), the model's weight is \(5, 6\)"):
        apply_delta(model, tmp_path / "a.delta")


def test_a_file_that_is_no_delta_is_refused(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "cut.delta").write_bytes(b"\x10")
    with pytest.raises(ModelError, match="truncated or no delta file"):
        read_delta(tmp_path / "cut.delta")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ModelError, match="is no delta file; eff writes one as model.delta"):
        read_delta(tmp_path / "plain.safetensors")
