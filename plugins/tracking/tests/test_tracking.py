"""Tracking: what is written, what a resumed run adds, and that nothing is imported where nobody asked."""

import gc
import importlib.util
import subprocess
import sys

import pytest

from eff.errors import InterruptedRunError, NonFiniteLossError, RequestError, RunError
from eff.log import Log
from eff.runner import apply, resume
from eff.schemas import Recipe, TrainOptions
from eff.testing.samples import DATA, MODEL
from eff.training import Training
from eff_tracking.target import Target, read_target

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs eff-tracking[tensorboard]"
)
needs_mlflow = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mlflow", "sqlalchemy")),
    reason="needs eff-tracking[mlflow]",
)


def recipe(**train):
    options = {"epochs": 1, "batch_size": 64, **train}
    return Recipe(model=MODEL, data=DATA, train=TrainOptions(**options), device="cpu")


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def stop_at(monkeypatch, index):
    original = Training._step

    def step(self, *arguments):
        if self.done == index:
            self.save()
            raise InterruptedRunError("stopped")
        return original(self, *arguments)

    monkeypatch.setattr(Training, "_step", step)
    return lambda: monkeypatch.setattr(Training, "_step", original)


def stub(monkeypatch, tracker):
    monkeypatch.setenv("EFF_TRACK", "tensorboard")
    monkeypatch.setattr("eff_tracking.target._is_installed", lambda name: True)
    monkeypatch.setattr("eff_tracking.follow.open_tracker", tracker)


class Notes:
    """A tracker that remembers."""

    def __init__(self):
        self.logged = []
        self.status = None

    def log(self, step, values):
        self.logged.append((step, dict(values)))

    def close(self, status):
        self.status = self.status or status


# --- what EFF_TRACK may be


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("", None),
        ("tensorboard", Target("tensorboard")),
        ("tensorboard:logs/a", Target("tensorboard", "logs/a")),
        ("mlflow:http://localhost:5000", Target("mlflow", "http://localhost:5000")),
    ],
)
def test_the_variable_names_a_tracker_and_a_place(monkeypatch, text, target):
    monkeypatch.setattr("eff_tracking.target._is_installed", lambda name: True)
    assert read_target(text) == target


def test_an_unknown_tracker_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("EFF_TRACK", "tensorbord:x")
    with pytest.raises(RequestError) as caught:
        apply(recipe(), tmp_path / "run")
    assert str(caught.value) == (
        "EFF_TRACK=tensorbord:x: there is no tracker 'tensorbord'; did you mean 'tensorboard'?; "
        "known: tensorboard, mlflow, also as tensorboard:DIR and mlflow:URI"
    )
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_named_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr("eff_tracking.target._is_installed", lambda name: False)
    monkeypatch.setenv("EFF_TRACK", "mlflow")
    with pytest.raises(RequestError) as caught:
        apply(recipe(), tmp_path / "run")
    assert str(caught.value) == "EFF_TRACK=mlflow needs mlflow; pip install 'eff-tracking[mlflow]'"


def test_nothing_is_imported_where_nobody_asked(tmp_path):
    code = f"""
import os, sys
os.environ.pop("EFF_TRACK", None)
from eff.runner import apply
from eff.schemas import Recipe, TrainOptions
from pathlib import Path
apply(Recipe(model={MODEL!r}, data={DATA!r}, train=TrainOptions(epochs=1), device="cpu"), Path({str(tmp_path / "run")!r}))
assert "eff_tracking.plugin" in sys.modules
found = [name for name in sys.modules if name.startswith(("tensorboard", "mlflow", "eff_tracking.follow"))]
sys.exit(f"imported: {{found}}" if found else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- what a run tells


def test_a_run_tells_every_step_and_both_measurements_and_then_ends(monkeypatch, tmp_path):
    notes = Notes()
    stub(monkeypatch, lambda target, run, first_step: notes)
    first = apply(recipe(), tmp_path / "first")
    report = apply(recipe().model_copy(update={"model": str(tmp_path / "first")}), tmp_path / "second")
    steps = [step for step, values in notes.logged if "train/loss" in values]
    assert steps == [1, 2, 3, 4] * 2
    before, after = [values for _, values in notes.logged if "evaluate/accuracy" in values][-2:]
    assert before["evaluate/accuracy"] == report.before.metrics.values["accuracy"].value
    assert after["evaluate/accuracy"] == report.after.metrics.values["accuracy"].value
    assert [values["train/lr"] for _, values in notes.logged if "train/lr" in values][0] == 0.05
    assert first.training.loss[0] == pytest.approx(sum(v["train/loss"] for _, v in notes.logged[1:5]) / 4)
    assert notes.status == "FINISHED"


def test_accumulated_batches_are_one_step_with_their_mean_loss(monkeypatch, tmp_path):
    notes = Notes()
    stub(monkeypatch, lambda target, run, first_step: notes)
    report = apply(recipe(batch_size=32, accumulate=4), tmp_path / "run")
    losses = [values["train/loss"] for _, values in notes.logged if "train/loss" in values]
    assert len(losses) == 2 and sum(losses) / 2 == pytest.approx(report.training.loss[0])


def test_a_loss_that_is_not_finite_is_logged_and_ends_the_run_as_failed(monkeypatch, tmp_path):
    notes = Notes()
    stub(monkeypatch, lambda target, run, first_step: notes)
    with pytest.raises(NonFiniteLossError):
        apply(recipe(lr=1e30, epochs=3), tmp_path / "run")
    assert notes.status == "FAILED"


def test_tracking_changes_no_result(monkeypatch, tmp_path):
    plain = apply(recipe(), tmp_path / "plain")
    stub(monkeypatch, lambda target, run, first_step: Notes())
    assert apply(recipe(), tmp_path / "tracked").after.metrics == plain.after.metrics


def test_a_tracker_that_cannot_be_opened_stops_the_run_at_its_first_step(monkeypatch, tmp_path):
    def refuse(target, run, first_step):
        raise OSError("connection refused")

    stub(monkeypatch, refuse)
    with pytest.raises(
        RunError, match="EFF_TRACK: tensorboard at its default place cannot be used: connection refused"
    ):
        apply(recipe(), tmp_path / "run")


def test_a_tracker_that_is_lost_on_the_way_is_a_warning(monkeypatch, tmp_path):
    class Lost(Notes):
        def log(self, step, values):
            super().log(step, values)
            if step == 2:
                raise OSError("connection lost")

    notes = Lost()
    stub(monkeypatch, lambda target, run, first_step: notes)
    report = apply(recipe(), tmp_path / "run", log=Log())
    assert report.warnings == ("tracking stopped: connection lost; the run goes on",)
    assert report.training.steps == 4 and notes.logged[-1][0] == 2


# --- TensorBoard


@needs_tensorboard
def test_tensorboard_reads_one_curve_of_a_run_that_was_repeated_stopped_and_resumed(monkeypatch, tmp_path):
    monkeypatch.setenv("EFF_TRACK", "tensorboard")
    folder = tmp_path / "run"
    apply(recipe(lr=0.5), folder)
    unstop = stop_at(monkeypatch, 2)
    with pytest.raises(InterruptedRunError):
        apply(recipe(), folder, force=True)
    unstop()
    report = resume(folder)
    found = scalars(folder / "tensorboard")
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4]
    assert found["train/lr"][0] == (1, pytest.approx(0.05))
    step, accuracy = found["evaluate/accuracy"][-1]
    assert step == 4 and accuracy == pytest.approx(report.after.metrics.values["accuracy"].value)


@needs_tensorboard
def test_a_folder_for_tensorboard_holds_one_per_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EFF_TRACK", "tensorboard:logs")
    apply(recipe(), tmp_path / "sweep" / "trial-003")
    assert list((tmp_path / "logs" / "sweep" / "trial-003").glob("events.out.tfevents.*"))
    assert not (tmp_path / "sweep" / "trial-003" / "tensorboard").exists()


# --- MLflow


@needs_mlflow
@pytest.mark.slow  # importing MLflow takes seconds
def test_mlflow_has_one_run_with_options_and_figures_also_when_it_was_resumed(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes seconds more to make
    place = (tmp_path / "runs").as_uri()
    monkeypatch.setenv("EFF_TRACK", f"mlflow:{place}")
    monkeypatch.chdir(tmp_path)
    unstop = stop_at(monkeypatch, 2)
    with pytest.raises(InterruptedRunError):
        apply(recipe(), tmp_path / "run")
    unstop()
    gc.collect()  # the interrupted run is forgotten, as at the end of its process
    report = resume(tmp_path / "run")
    client = MlflowClient(tracking_uri=place)
    (run,) = client.search_runs([client.get_experiment_by_name("eff").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["train.lr"] == "0.05" and run.data.params["model"] == MODEL
    assert run.data.metrics["evaluate/accuracy"] == report.after.metrics.values["accuracy"].value
    assert [item.step for item in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4]
