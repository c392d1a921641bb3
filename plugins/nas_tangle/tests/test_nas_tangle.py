"""The search from supernet to an ordinary network, for all four optimisers and both ways of mixing."""

import json
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from eff.errors import EffError, InterruptedRunError, RequestError
from eff.log import Log
from eff.runner import apply, resume
from eff.schemas import MethodUse, Recipe, TrainOptions
from eff.testing.samples import DATA, MODEL
from eff.use import UseRequest, evaluate, export_model
from eff_nas_kit.layers import Entangled
from eff_nas_kit.space import read_genotype
from eff_nas_tangle.config import TangleConfig
from eff_nas_tangle.cost import COUNTS, Size, largest_difference, make_layer, measure_layer
from eff_nas_tangle.plugin import TangleNAS

EFF_PLUGIN = "nas_tangle"


def test_contract(eff_contract_check):
    eff_contract_check()


def recipe(model=MODEL, data=DATA, train=None, **options):
    train = train or TrainOptions(epochs=2, batch_size=32)
    return Recipe(
        model=model, data=data, methods=(MethodUse(name="nas_tangle", options=options),), train=train, device="cpu"
    )


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)["state_dict"]


def values(report):
    return {name: metric.value for name, metric in report.after.metrics.values.items()}


def test_the_defaults_are_the_papers():
    config = TangleConfig()
    assert (config.optimizer, config.mixing, config.train_portion) == ("drnas", "entangled", 0.5)
    assert (config.lr, config.wd, config.arch_lr, config.arch_wd) == (3e-4, 5e-4, 3e-4, 1e-3)
    assert (config.epochs, config.batch_size, config.tau_max, config.tau_min, config.reg_scale) == (
        100,
        64,
        10,
        0.1,
        1e-3,
    )
    train = TangleNAS(config).training()
    assert (train.optimizer, train.optimizer_options) == ("adam", {"betas": [0.9, 0.995]})


@pytest.mark.parametrize("mixing", ["entangled", "output"])
@pytest.mark.parametrize("optimizer", ["darts", "drnas", "gdas", "spos"])
def test_every_optimiser_searches_and_leaves_an_ordinary_network(optimizer, mixing, tmp_path):
    report = apply(recipe(optimizer=optimizer, mixing=mixing, search_samples=4), tmp_path / "run")
    found = values(report)
    assert found["architectures"] == 3**3 * 2**3  # three widths and three kernels
    assert 0 < found["share_of_largest"] <= 100 and 0 <= found["search_entropy"] <= 1 + 1e-6
    again = evaluate(UseRequest(str(tmp_path / "run"), device="cpu"))
    assert again.metrics.values["accuracy"].value == found["accuracy"]
    genotype = read_genotype(tmp_path / "run" / "genotype.json")
    state = weights(tmp_path / "run")
    assert len(state["conv1.weight"]) == genotype.chosen["conv1.width"]
    assert state["conv1.weight"].shape[-1] == genotype.chosen["conv1.kernel"]
    rows = report.after.metrics.tables["genotype"]
    assert {row["choice"]: row["chosen"] for row in rows} == genotype.chosen


def test_the_architectures_step_leaves_the_weights_alone_and_the_weights_step_the_architecture():
    """Both steps of one search step, on batches that share no sample."""
    seen = []

    class Watch(TangleNAS):
        pass

    from eff_nas_tangle.search import Search

    original = Search.before_weights

    def watched(self, step):
        weights_before = [p.detach().clone() for p in step.module.parameters()]
        alphas = [a.detach().clone() for a in self.architecture.alphas.values()]
        loss = original(self, step)
        moved = any(not torch.equal(a, b) for a, b in zip(alphas, self.architecture.alphas.values(), strict=True))
        still = all(torch.equal(a, b) for a, b in zip(weights_before, step.module.parameters(), strict=True))
        gradients = any(p.grad is not None for p in step.module.parameters())
        seen.append((moved, still, gradients, loss))
        return loss

    Search.before_weights = watched
    try:
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            apply(recipe(train=TrainOptions(epochs=1, batch_size=32)), Path(folder, "run"))
    finally:
        Search.before_weights = original
    assert len(seen) == 4 and all(moved and still and not gradients for moved, still, gradients, _ in seen)


def test_the_search_learns(tmp_path):
    report = apply(recipe(train=TrainOptions(epochs=40, batch_size=32, lr=0.02), arch_lr=0.02), tmp_path / "run")
    assert values(report)["accuracy"] > 80
    history = report.after.metrics.tables["search_history"]
    assert [row["epoch"] for row in history] == list(range(1, 41))


class StopAfter(Log):
    """Interrupts the search as Ctrl-C does."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def progress(self, description, total):
        from contextlib import contextmanager

        @contextmanager
        def counting():
            done = 0

            def advance(steps=1, note=""):
                nonlocal done
                done += steps
                if description == "train" and done == self.step:
                    raise InterruptedRunError("stop")

            yield advance

        return counting()


@pytest.mark.parametrize(("optimizer", "step"), [("drnas", 3), ("gdas", 6)])
def test_an_interrupted_search_ends_where_an_uninterrupted_one_does(optimizer, step, tmp_path):
    asked = recipe(train=TrainOptions(epochs=2, batch_size=32, checkpoint_every=1), optimizer=optimizer)
    whole = apply(asked, tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        apply(asked, tmp_path / "parts", log=StopAfter(step))
    parts = resume(tmp_path / "parts")
    left, right = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert parts.after.metrics.tables == whole.after.metrics.tables


def test_the_exported_network_needs_no_search_plugin(tmp_path):
    report = apply(recipe("nas:digits_macro?widths=8,8&pools=2", "digits?train=128&test=64"), tmp_path / "run")
    (path,) = (artifact.path for artifact in report.artifacts if artifact.format == "subnet")
    code = (
        "import sys; sys.modules['eff_nas_tangle'] = None\n"  # importing it fails
        "from eff.use import UseRequest, evaluate\n"
        "found = evaluate(UseRequest(sys.argv[1], device='cpu'))\n"
        "print(found.metrics.values['accuracy'].value)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run" / path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == values(report)["accuracy"]
    quantize = Recipe(
        model=str(tmp_path / "run" / path),
        methods=(MethodUse(name="quant_lsq"),),
        train=TrainOptions(epochs=0),
        device="cpu",
    )
    assert values(apply(quantize, tmp_path / "quantized"))["mean_weight_bits"] < 9


def test_the_genotype_builds_an_untrained_network_anywhere(tmp_path):
    apply(recipe("nas:digits_macro?widths=8,8&pools=2", "digits?train=128&test=64"), tmp_path / "run")
    exported = export_model(UseRequest(str(tmp_path / "run"), device="cpu"), ["genotype"], tmp_path / "out")
    source = f"nas:genotype?file={exported[0].path}"
    fresh = Recipe(model=source, data="digits?train=128&test=64", train=TrainOptions(epochs=1), device="cpu")
    apply(fresh, tmp_path / "fresh")
    shapes = [{key: value.shape for key, value in weights(tmp_path / name).items()} for name in ("run", "fresh")]
    assert shapes[0] == shapes[1]


def test_ranking_compares_inherited_with_stand_alone_networks(tmp_path):
    report = apply(recipe(train=TrainOptions(epochs=1, batch_size=64), rank_samples=3, rank_epochs=1), tmp_path / "run")
    assert -1 <= values(report)["rank_kendall_tau"] <= 1 and 0 <= values(report)["rank_cka"] <= 1


def test_fresh_weights_are_not_the_inherited_ones(tmp_path):
    for name in ("inherited", "fresh"):
        apply(recipe(weights=name), tmp_path / name)
    left, right = weights(tmp_path / "inherited"), weights(tmp_path / "fresh")
    assert left["fc.weight"].shape == right["fc.weight"].shape and not torch.equal(
        left["fc.weight"], right["fc.weight"]
    )


def test_a_penalty_on_size_gives_smaller_networks(tmp_path):
    train = TrainOptions(epochs=8, batch_size=32)
    shares = [
        values(apply(recipe(train=train, arch_lr=0.1, size_weight=weight), tmp_path / str(weight)))["share_of_largest"]
        for weight in (0.0, 10.0)
    ]
    assert shares[1] < shares[0] and shares[1] < 30


def test_memory_does_not_grow_with_the_candidates():
    size = Size(channels=8, kernel=5, pixels=8, batch=4)
    entangled = [measure_layer(count, "entangled", size, budget_s=0.0).kept_bytes for count in COUNTS]
    output = [measure_layer(count, "output", size, budget_s=0.0).kept_bytes for count in COUNTS]
    assert max(entangled) <= 1.05 * min(entangled) and output[2] > 5 * output[0]
    assert largest_difference(size) < 1e-5
    assert len(list(make_layer(27, "output", size).candidates())) == 27


def test_without_training_the_largest_network_stays_with_a_warning(tmp_path):
    report = apply(recipe(train=TrainOptions(epochs=0)), tmp_path / "run")
    assert any("nothing was searched, the largest network stays" in text for text in report.warnings)
    assert values(report)["share_of_largest"] == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_choices": (2, 4)}, "kernel candidates must be odd, got 2"),
        ({"kernel_choices": (3, 1)}, "kernel candidates must be above 0 and increase"),
        ({"width_choices": (0.5, 0.5)}, "width candidates must be above 0 and increase"),
        ({"width_choices": (0.5, 1.5)}, "at most 1, got 1.5"),
        ({"tau_max": 0.1, "tau_min": 1.0}, "tau_min 1 is above tau_max 0.1"),
        ({"crop": "corner"}, "crop=corner needs mixing=output"),
        ({"train_portion": 1.0}, "train_portion"),
        ({"depth_choices": (3, 2)}, "depth candidates must be above 0 and increase"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        TangleConfig(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"kernel_choices": [3, 5]}}, "5 is larger than the kernel of 'conv1', which is 3"),
        ({"options": {"include": ["conv9"]}}, "include names 'conv9'"),
        ({"data": DATA + "?train=1"}, "cannot be divided|too few|training samples"),
        ({"precision": "fp16"}, "fp16 scales the loss"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_written(change, message, tmp_path):
    asked = recipe(**change.pop("options", {})).model_copy(update=change)
    with pytest.raises(EffError, match=message) as caught:
        apply(asked, tmp_path / "run")
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()


def test_a_genotype_cannot_hold_what_another_method_did(tmp_path):
    """Another method before it in the chain is in model.pt, not in the genotype."""
    from types import SimpleNamespace

    from eff_nas_tangle.insert import write_subnet

    run = SimpleNamespace(applied=lambda: (SimpleNamespace(name="prune_made"), SimpleNamespace(name="nas_tangle")))
    with pytest.raises(RequestError, match="a genotype cannot hold what prune_made did to the model; use model.pt"):
        write_subnet(None, {}, tmp_path / "x", run)


def test_the_command_line_shows_what_was_chosen(tmp_path):
    command = [sys.executable, "-m", "eff", "apply", "nas_tangle", MODEL, "--data", DATA, "--epochs", "1", "--json"]
    done = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {artifact["format"] for artifact in report["artifacts"]} >= {"checkpoint", "subnet", "genotype"}


def test_no_supernet_layer_is_left(tmp_path):
    from eff.models import ModelRequest, open_model
    from eff.session import Plugins

    apply(recipe(), tmp_path / "run")
    opened = open_model(ModelRequest(str(tmp_path / "run")), Plugins())
    assert not any(isinstance(module, Entangled) for module in opened.model.modules())
