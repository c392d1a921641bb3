"""Training that is not one batch after another: rounds, accumulation, other optimizers, several devices."""

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

from eff.errors import InterruptedRunError, PluginError, RequestError
from eff.runner import apply, make_plan, resume
from eff.schemas import MethodUse, TrainOptions

ROUNDS = """
def step_count(self, run): return {rounds}

def finish(self, model, run):
    with __import__("torch").no_grad():
        model.fc.bias.add_(100.0)
    return model

def state_dict(self): return {{"seen": getattr(self, "seen", 0)}}
def load_state_dict(self, state): self.seen = state["seen"]

@hookimpl
def train_step(self, step):
    import torch
    from eff.run import StepResult
    assert step.batch == {{}} and step.optimizer is None and step.last_of_step
    self.seen = getattr(self, "seen", 0) + 1
    assert self.seen == step.index + 1
    batch = next(iter(step.run.batches("train", 32)))
    loss, _ = step.loss(step.model, batch)
    names = [p for p in step.module.parameters()]
    for p, g in zip(names, torch.autograd.grad(loss, names)):
        p.data.sub_(0.05 * g + 1e-3 * torch.randn(p.shape))
    return StepResult(loss.detach())
"""


@pytest.fixture
def rounds(install, method_code):
    install("fl_made", method_code(ROUNDS.format(rounds=5)))
    return (MethodUse(name="fl_made"),)


@pytest.mark.parametrize("stop", [1, 3])
def test_rounds_are_counted_saved_and_resumed_like_steps(recipe, rounds, tmp_path, stop, weights, same, stop_at):
    every = recipe.train.model_copy(update={"checkpoint_every": 1})
    asked = recipe.model_copy(update={"methods": rounds, "train": every})
    report = apply(asked, tmp_path / "whole")
    assert report.training.steps == 5 and len(report.training.loss) == 5
    with pytest.raises(InterruptedRunError, match=f"stopped at step {stop + 1} of 5"):
        apply(asked, tmp_path / "parts", log=stop_at(stop))
    assert resume(tmp_path / "parts").training.resumed_at == stop + 1
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_finish_changes_the_model_once_after_training(recipe, rounds, tmp_path, weights):
    apply(recipe.model_copy(update={"methods": rounds}), tmp_path / "run")
    assert (weights(tmp_path / "run")["fc.bias"] - 100).abs().max() < 5


def test_two_methods_that_count_their_own_steps_are_refused(recipe, install, method_code, tmp_path):
    code = "def step_count(self, run): return 2"
    install("fl_one", method_code(code))
    install("nas_two", method_code(code))
    uses = (MethodUse(name="fl_one"), MethodUse(name="nas_two"))
    with pytest.raises(PluginError, match="fl_one and nas_two both count the steps"):
        apply(recipe.model_copy(update={"methods": uses}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def with_training(recipe, **fields):
    return recipe.model_copy(update={"train": TrainOptions(epochs=1, batch_size=64, **fields)})


def test_options_of_the_optimizer_reach_it(recipe, tmp_path, weights, same):
    plain = with_training(recipe, optimizer="adam", lr=1e-3)
    apply(plain, tmp_path / "defaults")
    apply(
        with_training(recipe, optimizer="adam", lr=1e-3, optimizer_options={"betas": [0.9, 0.999]}), tmp_path / "same"
    )
    apply(with_training(recipe, optimizer="adam", lr=1e-3, optimizer_options={"betas": [0.0, 0.5]}), tmp_path / "other")
    assert same(weights(tmp_path / "defaults"), weights(tmp_path / "same"))
    assert not same(weights(tmp_path / "defaults"), weights(tmp_path / "other"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betass": [0.9, 0.99]}, "optimizer 'adam' takes no option 'betass'; did you mean 'betas'"),
        ({"lr": 0.1}, "takes no option 'lr'.*use --lr"),
        ({"betas": [2.0, 0.9]}, "optimizer 'adam' refuses its options: Invalid beta"),
    ],
)
def test_wrong_options_of_the_optimizer_are_refused_before_anything_is_opened(recipe, options, message):
    with pytest.raises(RequestError, match=message):
        make_plan(with_training(recipe, optimizer="adam", optimizer_options=options))


def test_options_of_an_optimizer_go_with_it():
    """Over the same optimizer they add up; naming another one leaves those of the first behind."""
    base = TrainOptions(optimizer="adam", optimizer_options={"betas": [0.5, 0.9], "eps": 1e-6})
    more = TrainOptions(optimizer_options={"eps": 1e-4}).over(base)
    assert more.optimizer_options == {"betas": [0.5, 0.9], "eps": 1e-4}
    assert TrainOptions(optimizer="adam").over(base).optimizer_options == base.optimizer_options
    assert TrainOptions(optimizer="sgd").over(base).optimizer_options is None
    other = TrainOptions(optimizer="sgd", optimizer_options={"nesterov": True}).over(base)
    assert other.optimizer_options == {"nesterov": True}


def test_accumulated_batches_give_the_step_of_the_big_batch(recipe, tmp_path, install, method_code, weights):
    """Without batch statistics and augmentation the sum over parts is the same sum; 256 samples, 2 steps of 128."""
    code = """
    @hookimpl
    def transform(self, model, run):
        import torch
        model.bn1 = torch.nn.Identity()
        return model
    """
    install("train_made", method_code(code))
    plain = recipe.model_copy(update={"methods": (MethodUse(name="train_made"),)})
    fields = {"epochs": 2, "lr": 0.1, "augment": False}
    for name, size, parts in (("big", 128, 1), ("parts", 32, 4)):
        train = TrainOptions(batch_size=size, accumulate=parts, **fields)
        report = apply(plain.model_copy(update={"train": train}), tmp_path / name)
        assert report.training.steps == 4
    left, right = weights(tmp_path / "big"), weights(tmp_path / "parts")
    apply(plain.model_copy(update={"train": TrainOptions(epochs=0)}), tmp_path / "start")
    start = weights(tmp_path / "start")
    assert max((left[key] - start[key]).abs().max() for key in left) > 1e-3
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": 3, "train": TrainOptions(batch_size=64)}, "--batch-size 64 cannot be divided among 3 devices"),
        ({"devices": 2, "train": TrainOptions(epochs=0)}, "nothing is trained in this run; leave out --devices"),
    ],
)
def test_devices_that_cannot_be_used_are_refused(recipe, tmp_path, change, message):
    with pytest.raises(RequestError, match=message):
        apply(recipe.model_copy(update=change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_devices_train_the_model_of_one(recipe, tmp_path, weights):
    """The whole path: two processes with gloo; the batch statistics are those of the whole batch."""
    one = apply(recipe, tmp_path / "one")
    two = apply(recipe.model_copy(update={"devices": 2}), tmp_path / "two")
    left, right = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-4, atol=1e-5)
    assert two.training.loss == pytest.approx(one.training.loss, rel=1e-4)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["model.pt", "recipe.yaml", "report.json"]


def test_an_error_in_one_of_two_processes_is_reported_as_with_one(recipe, tmp_path):
    wild = recipe.model_copy(update={"devices": 2, "train": TrainOptions(epochs=3, batch_size=64, lr=1e30)})
    with pytest.raises(Exception, match=r"the loss is .* at step \d+ of 12; start again with a smaller --lr") as caught:
        apply(wild, tmp_path / "run")
    assert type(caught.value).__name__ == "NonFiniteLossError"
    assert not multiprocessing.active_children()


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_two_devices_stop_at_ctrl_c_and_resume_to_the_uninterrupted_result(
    recipe, install, method_code, tmp_path, monkeypatch, weights
):
    """Ctrl-C goes to every process of the group, as a terminal sends it; here after the sixth step."""
    hooks = """
    @hookimpl(wrapper=True)
    def train_step(self, step):
        import os, signal
        result = yield
        if step.index == 5 and os.environ["RANK"] == "0":
            os.killpg(0, signal.SIGINT)
        return result
    """
    install("train_made", method_code(hooks))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    command = [sys.executable, "-m", "eff", "apply", "train_made", recipe.model, "--data", recipe.data, "--epochs", "2"]
    command += ["--batch-size", "64", "--device", "cpu", "--devices", "2", "--out", str(tmp_path / "parts")]
    done = subprocess.run(command, start_new_session=True, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert "go on with --resume" in " ".join((done.stdout + done.stderr).split())
    resumed = resume(tmp_path / "parts")
    assert 6 <= resumed.training.resumed_at < 8 and resumed.training.steps == 8
    apply(recipe, tmp_path / "whole")
    left, right = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-4, atol=1e-5)
