"""train_adamp as a method and as `--optimizer` of other runs."""

import json
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from eff.errors import ConfigError, EffError, InterruptedRunError, RequestError
from eff.log import Log
from eff.runner import apply, make_plan, resume
from eff.schemas import MethodUse, Recipe, TrainOptions
from eff.testing.samples import DATA, MODEL
from eff_train_adamp.config import AdamPConfig
from eff_train_adamp.tracking import Track

EFF_PLUGIN = "train_adamp"


def test_contract(eff_contract_check):
    eff_contract_check()


def recipe(*names, options=None, **train):
    uses = tuple(MethodUse(name=name, options=(options or {}) if name == "train_adamp" else {}) for name in names)
    return Recipe(
        model=MODEL,
        data=DATA,
        methods=uses,
        train=TrainOptions(**{"epochs": 1, "batch_size": 64} | train),
        device="cpu",
    )


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)["state_dict"]


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_the_recipe_is_the_papers_code(tmp_path):
    plan = make_plan(recipe("train_adamp"))
    assert (plan.train.optimizer, plan.train.lr, plan.train.weight_decay) == ("adamp", 1e-3, 0.0)
    assert plan.train.optimizer_options == {
        "betas": [0.9, 0.999], "eps": 1e-8, "delta": 0.1, "wd_ratio": 0.1, "nesterov": False,
    }  # fmt: skip
    sgdp = make_plan(recipe("train_adamp", options={"optimizer": "sgdp", "lr": 0.05, "momentum": 0.9}))
    assert (sgdp.train.optimizer, sgdp.train.lr, sgdp.train.momentum) == ("sgdp", 0.05, 0.9)


def test_the_method_and_the_optimizer_by_name_train_the_same_weights(tmp_path):
    report = apply(recipe("train_adamp", options={"lr": 0.01}), tmp_path / "method")
    apply(recipe(optimizer="adamp", lr=0.01, weight_decay=0.0), tmp_path / "name")
    assert same(weights(tmp_path / "method"), weights(tmp_path / "name"))
    rows = report.after.metrics.tables["optimizer_layers"]
    assert [row["layer"] for row in rows] == ["conv1.weight", "conv2.weight", "conv3.weight", "fc.weight"]
    assert rows[0]["projected_by_channel"] == 1.0  # followed by batch norm
    assert rows[3]["projected_by_channel"] < 1.0


def test_adamp_trains_under_lsq(tmp_path):
    """By name and as a method; the steps of LSQ have one value each and are never projected."""
    named = apply(recipe("quant_lsq", optimizer="adamp", lr=1e-3), tmp_path / "named")
    chain = apply(recipe("quant_lsq", "train_adamp", lr=1e-3), tmp_path / "chain")
    assert {"mean_weight_bits", "weight_norm"} <= set(chain.after.metrics.values)
    assert chain.recipe.train.lr == named.recipe.train.lr == 1e-3
    plain = apply(recipe("quant_lsq", optimizer="adamw", lr=1e-3), tmp_path / "adamw")
    assert not same(weights(tmp_path / "named"), weights(tmp_path / "adamw"))
    assert plain.training.steps == named.training.steps


def test_a_run_with_another_optimizer_is_followed_and_says_so(tmp_path):
    """AdamP's options are not passed to it; the table says what would have been projected."""
    log = Log()
    report = apply(recipe("train_adamp", optimizer="sgd", lr=0.05), tmp_path / "sgd", log=log)
    assert report.after.metrics.tables["optimizer_layers"][0]["projected_by_channel"] == 1.0
    assert any("this run trains with sgd, not with adamp, and is only followed" in line for line in log.warnings)
    chain = Log()
    apply(recipe("train_adamp", "quant_lsq"), tmp_path / "chain", log=chain)
    assert any("or name train_adamp last" in line for line in chain.warnings)
    own = Log()
    apply(recipe("train_adamp"), tmp_path / "own", log=own)
    assert not any("train_adamp" in line for line in own.warnings)


def test_options_by_name_go_over_the_methods(tmp_path):
    plan = make_plan(recipe("train_adamp", options={"nesterov": True}, optimizer_options={"wd_ratio": 1.0}))
    assert plan.train.optimizer_options["nesterov"] is True and plan.train.optimizer_options["wd_ratio"] == 1.0


def test_accumulated_batches_give_the_step_of_the_big_batch(tmp_path):
    """On a network without batch norm, whose statistics would be those of each part."""
    fields = {"epochs": 2, "augment": False, "lr": 0.01}
    for name, size, parts in (("big", 128, 1), ("parts", 32, 4)):
        uses = {"options": {}, "batch_size": size, "accumulate": parts, **fields}
        asked = recipe("train_adamp", **uses).model_copy(update={"model": f"{__name__}:normless"})
        report = apply(asked, tmp_path / name)
        assert report.training.steps == 4
    for key, value in weights(tmp_path / "big").items():
        torch.testing.assert_close(value, weights(tmp_path / "parts")[key], rtol=1e-3, atol=1e-4)


def normless(num_classes=4, in_channels=1):
    """Return a network whose batches may be split."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64 * in_channels, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, num_classes)
    )


class StopAfter(Log):
    """Interrupts the training as Ctrl-C does."""

    def progress(self, description, total):
        from contextlib import contextmanager

        @contextmanager
        def counting():
            done = 0

            def advance(steps=1, note=""):
                nonlocal done
                done += steps
                if description == "train" and done == 3:
                    raise InterruptedRunError("stop")

            yield advance

        return counting()


def test_a_resumed_run_reports_what_an_uninterrupted_one_does(tmp_path):
    asked = recipe("train_adamp", epochs=2, checkpoint_every=1)
    whole = apply(asked, tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        apply(asked, tmp_path / "parts", log=StopAfter())
    parts = resume(tmp_path / "parts")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert parts.after.metrics.tables == whole.after.metrics.tables


def test_the_track_measures_the_effective_step():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 0.0]]))
    track = Track.of(model)
    before = track.weights(model)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 5.0]]))
    model.weight.grad = torch.tensor([[0.0, 1.0]])
    track.add(model, before, epoch=0, delta=0.1, eps=1e-8)
    (row,) = track.table()
    assert row["effective_step_last_third"] == pytest.approx(2**0.5)  # a quarter turn
    assert row["cosine_of_successive"] == pytest.approx(0.0, abs=1e-6)
    assert (row["norm_before"], row["norm_after"], row["projected_by_channel"]) == (3.0, 5.0, 1.0)
    track.add(model, track.weights(model), epoch=0, delta=0.1, eps=1e-8)  # stands still: the cosine is 1
    (row,) = track.table()
    assert row["cosine_of_successive"] == pytest.approx(0.5, abs=1e-6)
    assert row["effective_step_last_third"] == pytest.approx(2**0.5 / 2)
    assert row["projected_by_channel"] == 0.5  # now the gradient is along the weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgdp", "lr": 0.1, "momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"optimizer": "sgdp", "lr": 0.1, "dampening": 2}, "dampening must be between 0 and 1, got 2"),
        ({"lr": -0.1}, "lr must be above 0, got -0.1"),
        ({"weight_decay": -1}, "weight_decay must be at least 0, got -1"),
        ({"delta": 0}, "delta must be above 0, got 0"),
        ({"eps": 0}, "eps must be above 0, got 0"),
        ({"betas": [0.9, 1.0]}, "betas must be below 1.0, got 1.0"),
        ({"wd_ratio": 2}, "wd_ratio must be between 0 and 1, got 2"),
        ({"optimizer": "sgdp"}, "sgdp has no default learning rate; set lr, e.g. -o lr=0.05"),
        ({"momentum": 0.9}, "momentum is an option of sgdp; leave it out, or use -o optimizer=sgdp"),
    ],
)
def test_wrong_options_are_refused_with_their_name(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        apply(recipe("train_adamp", options=options), tmp_path / "run")
    assert str(caught.value).startswith("train_adamp: ") and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()


def test_the_configuration_refuses_unknown_options():
    with pytest.raises(ValidationError):
        AdamPConfig(beta=0.9)


def test_options_of_the_optimizer_by_name_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(
        RequestError, match="optimizer 'sgdp' refuses its options: delta must be above 0, got 0"
    ) as caught:
        apply(recipe("quant_lsq", optimizer="sgdp", optimizer_options={"delta": 0}), tmp_path / "run")
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("names", [("train_adamp",), ()], ids=["the method", "the optimizer by name"])
def test_a_gradient_that_is_not_finite_names_the_models_parameter(names, tmp_path):
    asked = recipe(*names, optimizer="adamp").model_copy(update={"model": f"{__name__}:broken"})
    with pytest.raises(EffError, match="the gradient of '1.weight' holds NaN or infinity"):
        apply(asked, tmp_path / "run")


class Broken(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


class BrokenLinear(nn.Linear):
    """A linear layer whose weight gets NaN."""

    def forward(self, x):
        return nn.functional.linear(x, Broken.apply(self.weight), self.bias)


def broken(num_classes=4, in_channels=1):
    """Return a network with a NaN gradient and a finite loss."""
    return nn.Sequential(nn.Flatten(), BrokenLinear(64 * in_channels, num_classes))


def test_the_command_line_takes_the_optimizer_and_its_options(tmp_path):
    command = [
        sys.executable,
        "-m",
        "eff",
        "train",
        MODEL,
        "--data",
        DATA,
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--json",
    ]
    command += ["--optimizer", "sgdp", "--optimizer-option", "delta=0.2", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipe"]["train"]["optimizer_options"] == {"delta": 0.2}
