"""A grid or random search over the options of methods: many runs, one table, one Pareto front."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from eff.errors import InterruptedRunError, OutputError, RequestError, RunError
from eff.files import IN_PROGRESS, REPORT_FILE, check_output_folder, make_output_folder
from eff.log import Log
from eff.runner import check_opens
from eff.schemas import Measurement, Metrics, Report
from eff.sweep.figure import draw_front
from eff.sweep.plan import Definition, SweepPlan, SweepRequest, Trial, plan_sweep
from eff.sweep.results import (
    FIGURE_FILE,
    SWEEP_FILE,
    SweepResult,
    TrialResult,
    check_measured,
    name_metric,
    with_front,
    write_results,
)
from eff.sweep.work import Job, Outcome, Pool
from eff.training import stop_requests
from eff.use import load_pyplot

__all__ = ["SweepRequest", "SweepResult", "plan_sweep", "sweep"]

LOCK_FILE = ".sweep.lock"

MakePool = Callable[[Log], AbstractContextManager[Pool]]
"""Gives the workers; called only when there is work, and after everything has been checked."""


def sweep(
    request: SweepRequest,
    out: Path,
    make_pool: MakePool,
    *,
    metric: str | None = None,
    cost: str = "size",
    retry_failed: bool = False,
    threads: int | None = None,
    log: Log | None = None,
) -> SweepResult:
    """Run a search, or go on with it; write runs, `sweep.json`, `sweep.csv` and `pareto.png` into `out`.

    Args:
        request: what to search.
        out: folder of the sweep; new, empty, or with the same search in it.
        make_pool: where the trials run, e.g. `eff.sweep.on_ray.ray_pool`.
        metric: what to judge by; None: the first metric that is measured.
        cost: what it is set against: size, parameters, latency, seconds or a metric.
        retry_failed: do trials that failed before anew.
        threads: CPU threads of a trial; None: torch's default.
        log: where messages and progress go.

    Raises:
        RequestError: something asked for is wrong. InterruptedRunError: stopped; what is done is kept.
        RunError: no trial succeeded.
    """
    log = log or Log()
    plan = plan_sweep(request, log)
    pyplot = load_pyplot()
    out = out.resolve()
    earlier = _earlier(out, plan)
    state = _Sweep(plan, out, metric, cost, [_known(trial, out, earlier) for trial in plan.trials])
    jobs = state.jobs(retry_failed, threads)
    if jobs:
        check_opens(plan.first, log)
        with make_pool(log) as pool, _alone_in(out):
            stopped = state.work(pool, jobs, log)
    else:
        stopped = False
        log.info(f"{out.name}: all {len(plan.trials)} trials are done")
    result = state.save()
    if result.of_state("done"):
        _judge(result, out, pyplot)
    if stopped:
        done = len(result.trials) - len(result.of_state("waiting"))
        raise InterruptedRunError(
            f"stopped with {done} of {len(result.trials)} trials done; the same command with --out {out} goes on"
        )
    return result


def _judge(result: SweepResult, out: Path, pyplot: object) -> None:
    if result.metric is None:
        raise RunError("the trials measured no metric to judge by; name a figure, e.g. --metric latency")
    check_measured(result.trials, result.metric, "--metric")
    check_measured(result.trials, result.cost, "--cost")
    draw_front(result, out / FIGURE_FILE, pyplot)


class _Sweep:
    """The state of one search while it goes on."""

    def __init__(self, plan: SweepPlan, out: Path, metric: str | None, cost: str, trials: list[TrialResult]):
        self.plan = plan
        self.out = out
        self.metric = metric
        self.cost = cost
        self.trials = trials

    def jobs(self, retry_failed: bool, threads: int | None) -> list[Job]:
        """Return what is left to do."""
        environment = {name: value for name, value in os.environ.items() if name.startswith("EFF_")}
        return [
            Job(
                number=trial.number,
                recipe=trial.recipe.model_dump_json(exclude_unset=True),
                folder=str(self.out / trial.folder),
                fresh=known.state == "failed",
                working_folder=os.getcwd(),
                environment=environment,
                threads=threads,
            )
            for trial, known in zip(self.plan.trials, self.trials, strict=True)
            if known.state == "waiting" or (retry_failed and known.state == "failed")
        ]

    def work(self, pool: Pool, jobs: list[Job], log: Log) -> bool:
        """Do jobs; returns whether the user stopped them before the last."""
        self.save()
        left = {job.number for job in jobs}
        kept = len(self.trials) - len(jobs)
        if kept:
            log.info(f"{self.out.name}: {kept} of {len(self.trials)} trials are there already")
        with stop_requests() as stop, log.progress("sweep", len(self.trials)) as advance:
            advance(kept)
            for outcome in pool(jobs, stop):
                if outcome.state == "stopped":
                    continue
                left.discard(outcome.number)
                self._take(outcome, log)
                self.save()
                advance(1)
        return bool(left)

    def _take(self, outcome: Outcome, log: Log) -> None:
        trial = self.plan.trials[outcome.number]
        said = f"{trial.folder} ({', '.join(f'{name} {value}' for name, value in trial.setting.items())})"
        if outcome.state == "failed":
            self.trials[trial.number] = _result(trial, state="failed", reason=outcome.reason)
            log.warn(f"{said} failed: {outcome.reason}")
            return
        known = _finished(trial, self.out)
        if known is None:
            reason = f"its {REPORT_FILE} is not here; the workers must see {self.out} under the same path"
            known = _result(trial, state="failed", reason=reason)
            log.warn(f"{said}: {reason}")
        self.trials[trial.number] = known
        log.info(f"{said}: {known.seconds or 0:.0f} s")
        if len([item for item in self.trials if item.state == "done"]) == 1:  # say it now, not after hours
            for name, flag in ((self.metric, "--metric"), (self.cost, "--cost")):
                try:
                    check_measured([known], name or self.cost, flag)
                except RequestError as error:
                    log.warn(str(error))

    def save(self) -> SweepResult:
        """Write what is known so far and return it."""
        metric = name_metric(self.trials, self.metric)
        result = SweepResult(
            definition=self.plan.definition,
            metric=metric,
            cost=self.cost,
            before=self._before(),
            trials=with_front(self.trials, metric, self.cost),
        )
        if self.out.is_dir():
            write_results(result, self.out)
        return result

    def _before(self) -> Measurement | None:
        """Return how the untouched model measured, which every finished trial reports alike."""
        for trial in self.trials:
            if trial.state == "done":
                report = _report(self.out / trial.folder)
                return _without_tables(report.before) if report and report.before else None
        return None


def _earlier(out: Path, plan: SweepPlan) -> dict[int, TrialResult]:
    """Return the trials that an earlier call left in `out`.

    Raises:
        OutputError: there is something else, or another search.
    """
    path = out / SWEEP_FILE
    if not path.exists():
        if out.is_dir() and any(item.name != LOCK_FILE for item in out.iterdir()):
            raise OutputError(f"{out} is not empty and holds no sweep; choose another --out")
        check_output_folder(out, force=True)
        return {}
    try:
        found = SweepResult.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise OutputError(f"{path}: cannot be read; choose another --out or remove the folder") from error
    if different := _differences(found.definition, plan.definition):
        raise OutputError(
            f"{out} holds another search (different: {', '.join(different)}); choose another --out or remove the folder"
        )
    if len(plan.trials) < len(found.trials):
        raise OutputError(f"{out} holds {len(found.trials)} trials; give --trials {len(found.trials)} or more")
    return {trial.number: trial for trial in found.trials}


def _differences(old: Definition, new: Definition) -> list[str]:
    """Return what differs between two searches, in words a user can look for."""
    names = [name for name in ("space", "search", "model_sha256") if getattr(old, name) != getattr(new, name)]
    fields = [name for name in type(old.recipe).model_fields if getattr(old.recipe, name) != getattr(new.recipe, name)]
    return [{"model_sha256": "content of the model file"}.get(name, name) for name in (*fields, *names)]


def _known(trial: Trial, out: Path, earlier: dict[int, TrialResult]) -> TrialResult:
    """Return what is known of a trial before work begins: finished, failed, or waiting."""
    finished = _finished(trial, out)
    if finished is not None:
        return finished
    known = earlier.get(trial.number)
    return known if known is not None and known.state == "failed" else _result(trial)


def _finished(trial: Trial, out: Path) -> TrialResult | None:
    folder = out / trial.folder
    report = None if (folder / IN_PROGRESS).exists() else _report(folder)
    if report is None or report.after is None:
        return None
    return _result(trial, state="done", measured=_without_tables(report.after), seconds=report.seconds)


def _report(folder: Path) -> Report | None:
    try:
        return Report.model_validate_json((folder / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None


def _without_tables(measured: Measurement) -> Measurement:
    """Leave the tables (per layer, per class) to the trial's own report."""
    return measured.model_copy(update={"metrics": Metrics(values=measured.metrics.values)})


def _result(trial: Trial, **known: object) -> TrialResult:
    return TrialResult.model_validate(
        {"number": trial.number, "setting": trial.setting, "folder": Path(trial.folder), **known}
    )


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Make the folder and hold it against a second sweep at the same time.

    Raises:
        OutputError: another one is at work there.
    """
    make_output_folder(out)
    lock = FileLock(out / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(f"{out}: another eff sweep is at work there; wait for it or choose another --out") from error
    try:
        yield
    finally:
        lock.release()
