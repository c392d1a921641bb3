"""Sweeps: the search space, what is refused, resuming, the front. Ray is needed by the last test alone."""

import csv
import importlib.util
import json
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eff.errors import InterruptedRunError, OutputError, Problems, RequestError, RunError
from eff.schemas import MethodUse, Recipe, TrainOptions
from eff.sweep import SweepRequest, plan_sweep, sweep
from eff.sweep.results import pareto_front
from eff.sweep.space import draw_settings, grid, parse_axes, split_values
from eff.sweep.work import do_job
from eff.testing.samples import DATA, MODEL

METHOD = """
@hookimpl
def transform(self, model, run):
    if self.config.strength == 9:
        raise RuntimeError("nine is too strong")
    return model
"""


@pytest.fixture
def made(install, method_code):
    config = (
        "strength: int = Field(3, ge=1, le=9, description='How much.')\n    layers: tuple[str, ...] = Field(("
        "), description='Which.')"
    )
    install("quant_made", method_code(METHOD, config))


def request(*space, search=None, trials=None, options=None, seed=0, **train):
    recipe = Recipe(
        model=MODEL, data=f"{DATA}?train=64&test=32", methods=(MethodUse(name="quant_made", options=options or {}),),
        train=TrainOptions(**{"epochs": 1, "batch_size": 64, **train}), device="cpu", seed=seed,
    )  # fmt: skip
    return SweepRequest(recipe, space, search, trials)


class Here:
    """A pool in this process, which counts what it did and may be stopped after some jobs."""

    def __init__(self, stop_after=None):
        self.done = []
        self.stop_after = stop_after

    @contextmanager
    def __call__(self, log):
        yield self.work

    def work(self, jobs, stop):
        for job in jobs:
            if len(self.done) == self.stop_after:
                stop.set()
                return
            self.done.append(job.number)
            yield do_job(replace(job, environment={}))


# --- the space


def test_a_grid_has_every_combination_and_the_last_axis_changes_fastest():
    assert grid(parse_axes(["bits=2,3", "mode=lsq,none", "per=true"])) == [
        {"bits": 2, "mode": "lsq", "per": True},
        {"bits": 2, "mode": "none", "per": True},
        {"bits": 3, "mode": "lsq", "per": True},
        {"bits": 3, "mode": "none", "per": True},
    ]


def test_commas_in_brackets_and_quotes_do_not_separate_values():
    assert split_values('["fc"],["fc", "conv1"],"a,b",null') == ['["fc"]', '["fc", "conv1"]', '"a,b"', "null"]
    (axis,) = parse_axes(['layers=["fc"],["fc","conv1"]'])
    assert axis.values == (["fc"], ["fc", "conv1"])


@given(seed=st.integers(0, 2**31 - 1), few=st.integers(1, 6), more=st.integers(7, 12))
def test_draws_stay_in_range_differ_and_a_longer_search_begins_like_a_shorter(seed, few, more):
    axes = parse_axes(["lr=loguniform(1e-4,1e-1)", "drop=uniform(0,0.5)", "layers=randint(2,8)", "mode=a,b"])
    settings = draw_settings(axes, more, seed)
    assert settings[:few] == draw_settings(axes, few, seed)
    assert len({json.dumps(setting) for setting in settings}) == more
    for setting in settings:
        assert 1e-4 <= setting["lr"] <= 1e-1 and 0 <= setting["drop"] <= 0.5
        assert setting["layers"] in range(2, 9) and setting["mode"] in ("a", "b")


def test_loguniform_has_as_much_in_each_decade():
    settings = draw_settings(parse_axes(["lr=loguniform(1e-4,1e-1)"]), 900, seed=0)
    decades = [math.floor(math.log10(setting["lr"])) for setting in settings]
    # 300 expected, standard deviation 14; five of them.
    assert all(abs(decades.count(decade) - 300) < 70 for decade in (-4, -3, -2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits", "-s 'bits': write it as name=value,value or name=loguniform(low,high)"),
        ("bits=2,,3", "-s bits=2,,3: has an empty value; write name=value,value (an empty text is '\"\"')"),
        ("bits=2,3,2", "-s bits=2,3,2: names 2 twice"),
        ("lr=loguniform(0,1)", "-s lr=loguniform(0,1): loguniform needs numbers above 0, got 0"),
        ("lr=uniform(2,1)", "-s lr=uniform(2,1): the first number must be below the second"),
        ("lr=uniform(1)", "-s lr=uniform(1): uniform takes two numbers, e.g. uniform(1,8)"),
        ("n=randint(1,2.5)", "-s n=randint(1,2.5): randint takes whole numbers"),
        (
            "lr=logunifrom(1,2)",
            "-s lr=logunifrom(1,2): there is no distribution 'logunifrom'; did you mean 'loguniform'?; "
            "known: uniform, loguniform, randint",
        ),
    ],
)
def test_a_malformed_axis_is_named_with_the_right_form(text, message):
    with pytest.raises(RequestError) as caught:
        parse_axes([text])
    assert str(caught.value) == message


# --- planning


def test_axes_belong_to_the_method_then_to_training_then_to_the_run(made):
    plan = plan_sweep(request("strength=1,2", "lr=0.1,0.2", "quant_made.layers=fc", "seed=7"))
    recipe = plan.trials[1].recipe
    assert recipe.methods[0].options == {"strength": 1, "layers": "fc"}
    assert (recipe.train.lr, recipe.train.epochs, recipe.seed) == (0.2, 1, 7)
    assert [trial.folder for trial in plan.trials] == ["trial-000", "trial-001", "trial-002", "trial-003"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (request(), "nothing to search; give options with their values, e.g. -s weight_bits=2,3,4"),
        (request("strenght=1"), "-s strenght: there is no such option; did you mean 'strength'?"),
        (request("quant_made.lr=1"), "-s quant_made.lr: quant_made has no option 'lr'"),
        (request("other.lr=1"), "-s other.lr: 'other' is not part of this run"),
        (request("strength=1", "strength=2"), "-s strength=2: 'strength' is named twice; give all its values in one -s"),
        (request("strength=1", options={"strength": 2}), "-s strength: -o fixes it too; leave one of them out"),
        (request("batch_size=8,16"), "-s batch_size: --batch-size fixes it too; leave one of them out"),
        (request("lr=-1,0.1"), "-s lr: input should be greater than or equal to 0, got -1"),
        (request("lr=uniform(0,1)"), "a random search needs --trials N"),
        (
            request("lr=uniform(0,1)", search="grid"),
            "a grid cannot hold lr=uniform(...); list values, or use --search random",
        ),
        (
            request("strength=1,2", search="grid", trials=2),
            "a grid tries every combination; leave out --trials, or use --search random",
        ),
        (
            request("strength=1,2,3", trials=4),
            "--trials 4: the space has only 3 different settings; ask for fewer",
        ),
    ],
)  # fmt: skip
def test_a_wrong_search_is_refused_before_anything_is_written(made, wrong, message, tmp_path):
    with pytest.raises(RequestError) as caught:
        sweep(wrong, tmp_path / "s", Here())
    assert str(caught.value) == message
    assert not (tmp_path / "s").exists()


def test_every_trial_is_checked_and_a_fault_that_many_share_is_said_once(made):
    with pytest.raises(Problems) as caught:
        plan_sweep(request("strength=0,3,12", "lr=0.1,0.2"))
    assert str(caught.value).splitlines() == [
        "quant_made: strength must be between 1 and 9, got 0",
        "quant_made: strength must be between 1 and 9, got 12",
    ]


def test_a_model_that_does_not_open_is_refused_before_anything_is_written(made, tmp_path):
    wrong = request("strength=1,2")
    wrong = replace(wrong, recipe=wrong.recipe.model_copy(update={"model": "gone.pt"}))
    with pytest.raises(RequestError, match="gone.pt: there is no such file"):
        sweep(wrong, tmp_path / "s", Here())
    assert not (tmp_path / "s").exists()


# --- running


def test_a_sweep_writes_runs_table_and_picture_and_a_failed_trial_keeps_its_reason(made, tmp_path):
    result = sweep(request("strength=2,9", "epochs=0,1", epochs=None), tmp_path / "s", Here())
    assert [trial.state for trial in result.trials] == ["done", "done", "failed", "failed"]
    assert result.trials[2].reason == "RuntimeError: nine is too strong"
    assert result.metric == "accuracy" and result.before is not None
    report = json.loads((tmp_path / "s" / "trial-001" / "report.json").read_text())
    assert report["methods"][0]["config"]["strength"] == 2 and report["training"]["steps"] == 1
    assert (tmp_path / "s" / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader((tmp_path / "s" / "sweep.csv").open()))
    assert [(row["strength"], row["epochs"], row["state"]) for row in rows][:2] == [
        ("2", "0", "done"),
        ("2", "1", "done"),
    ]
    assert float(rows[1]["accuracy"]) == result.trials[1].figure("accuracy").value
    assert rows[3]["reason"] == "RuntimeError: nine is too strong"


def test_a_stopped_sweep_goes_on_with_what_is_left(made, tmp_path):
    search = request("strength=1,2,3,9")
    with pytest.raises(InterruptedRunError, match="stopped with 2 of 4 trials done"):
        sweep(search, tmp_path / "s", Here(stop_after=2))
    rest = Here()
    assert len(sweep(search, tmp_path / "s", rest).of_state("done")) == 3
    assert rest.done == [2, 3]
    again = Here()
    sweep(search, tmp_path / "s", again, metric="cross_entropy", cost="parameters")
    assert again.done == []
    retried = Here()
    sweep(search, tmp_path / "s", retried, retry_failed=True)
    assert retried.done == [3]


def test_a_trial_that_stopped_within_its_training_goes_on_from_its_checkpoint(made, tmp_path, monkeypatch):
    from eff.training import Training

    search = request("strength=1", batch_size=16)
    original = Training._step

    def stop_at_two(self, *arguments):
        if self.done == 2:
            self.save()
            raise InterruptedRunError("stopped")
        return original(self, *arguments)

    monkeypatch.setattr(Training, "_step", stop_at_two)
    with pytest.raises(InterruptedRunError):
        sweep(search, tmp_path / "s", Here())
    monkeypatch.setattr(Training, "_step", original)
    sweep(search, tmp_path / "s", Here())
    report = json.loads((tmp_path / "s" / "trial-000" / "report.json").read_text())
    assert report["training"]["resumed_at"] == 2 and report["training"]["steps"] == 4


def test_a_random_search_takes_more_trials_but_not_fewer(made, tmp_path):
    def search(trials):
        return request("lr=loguniform(1e-3,1e-1)", trials=trials, epochs=0)

    sweep(search(2), tmp_path / "s", Here())
    more = Here()
    sweep(search(3), tmp_path / "s", more)
    assert more.done == [2]
    with pytest.raises(OutputError, match="holds 3 trials; give --trials 3 or more"):
        sweep(search(2), tmp_path / "s", Here())


def test_another_search_in_the_same_folder_is_refused(made, tmp_path):
    sweep(request("strength=1", epochs=0), tmp_path / "s", Here())
    for other, what in [
        (request("strength=2", epochs=0), "space"),
        (request("strength=1", epochs=0, seed=1), "seed"),
        (request("strength=1", epochs=0, search="random", trials=1), "search"),
        (request("strength=1", epochs=0, lr=0.5), "train"),
    ]:
        with pytest.raises(OutputError, match=rf"holds another search \(different: {what}\)"):
            sweep(other, tmp_path / "s", Here())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty and holds no sweep"):
        sweep(request("strength=1"), tmp_path / "notes", Here())


def test_two_sweeps_in_one_folder_at_a_time_are_refused(made, tmp_path):
    class Nested(Here):
        def work(self, jobs, stop):
            with pytest.raises(OutputError, match="another eff sweep is at work there"):
                sweep(request("strength=1", epochs=0), tmp_path / "s", Here())
            yield from super().work(jobs, stop)

    sweep(request("strength=1", epochs=0), tmp_path / "s", Nested())


def test_a_figure_that_nothing_measured_is_named_and_the_trials_are_kept(made, tmp_path):
    search = request("strength=1,2", epochs=0)
    with pytest.raises(RequestError, match=r"--metric acuracy: no trial measured it; did you mean 'accuracy'\?"):
        sweep(search, tmp_path / "s", Here(), metric="acuracy")
    with pytest.raises(RequestError, match="--cost sise: no trial measured it; did you mean 'size'"):
        sweep(search, tmp_path / "s", Here(), cost="sise")
    nothing = Here()
    sweep(search, tmp_path / "s", nothing)
    assert nothing.done == []


# --- the front


@given(st.dictionaries(st.integers(0, 30), st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20))
def test_the_front_is_what_no_point_dominates(points):
    def dominates(a, b):
        return a[0] >= b[0] and a[1] <= b[1] and a != b

    expected = {key for key, point in points.items() if not any(dominates(other, point) for other in points.values())}
    assert pareto_front(points) == expected


def test_a_figure_that_is_not_a_number_is_on_no_front():
    assert pareto_front({0: (math.nan, 0.0), 1: (1.0, 5.0), 2: (2.0, math.nan)}) == {1}


# --- the command


def test_without_ray_one_line_says_what_to_install(made, tmp_path, monkeypatch, capsys):
    import sys

    from eff.cli import main

    monkeypatch.setitem(sys.modules, "ray", None)  # an import of it fails
    with pytest.raises(SystemExit) as caught:
        main(["sweep", "quant_made", MODEL, "--data", DATA, "-s", "strength=1,2", "--out", str(tmp_path / "s")])
    assert caught.value.code == 2
    assert "eff: eff sweep needs Ray; pip install 'eff-core[sweep]'" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_dry_run_prints_the_trials_and_touches_nothing(made, tmp_path, capsys, monkeypatch):
    from eff.cli import main

    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["sweep", "quant_made", MODEL, "--data", DATA, "-s", "strength=1,2", "-s", "seed=0,1", "--dry-run"])
    out = capsys.readouterr().out
    assert "grid search, 4 trials" in out and "trial-003" in out
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray (eff-core[sweep])")
def test_a_cluster_that_does_not_listen_is_named_at_once(made, tmp_path):
    import socket

    from eff.sweep.on_ray import Resources, ray_pool

    with socket.socket() as free:  # bound, but not listening
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(
            RequestError, match=rf"--address {address}: cannot be reached \(.*refused\); start the cluster"
        ):
            sweep(request("strength=1"), tmp_path / "s", lambda log: ray_pool(Resources(address), log))
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray (eff-core[sweep])")
def test_ray_does_the_trials_and_one_that_fails_does_not_stop_the_others(tmp_path):
    from eff.log import Log
    from eff.sweep.on_ray import Resources, ray_pool

    base = request("lr=0.01,1e30", epochs=8)
    search = replace(base, recipe=base.recipe.model_copy(update={"methods": ()}))
    here = sweep(search, tmp_path / "here", Here())

    def pool(log):
        return ray_pool(Resources(parallel=1), Log())

    result = sweep(search, tmp_path / "s", pool, threads=1)
    assert [trial.state for trial in result.trials] == ["done", "failed"]
    assert "the loss is nan" in result.trials[1].reason or "the loss is inf" in result.trials[1].reason
    assert result.trials[0].figure("accuracy") == here.trials[0].figure("accuracy")


def test_a_sweep_in_which_nothing_succeeds_says_so(made, tmp_path, monkeypatch, capsys):
    from eff.cli import main
    from eff.sweep import on_ray

    monkeypatch.setattr(on_ray, "ray_pool", lambda resources, log: Here()(log))
    with pytest.raises(SystemExit) as caught:
        main(["sweep", "quant_made", MODEL, "--data", DATA, "-s", "strength=9", "--out", str(tmp_path / "s")])
    shown = capsys.readouterr()
    assert caught.value.code == RunError.exit_code
    assert "trial-000 failed: RuntimeError: nine is too strong" in shown.out
    assert "none of the 1 trials succeeded" in shown.err
