"""A pool of Ray workers: one machine, started for the sweep, or a cluster by address."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from eff.errors import MissingDependencyError, RequestError
from eff.log import Log
from eff.sweep.work import Job, Outcome, Pool, do_job

OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's smallest is 75 MiB; jobs and outcomes are short texts, models stay in their run folders."""
POLL_S = 0.2
CONNECT_S = 10.0


@dataclass(frozen=True)
class Resources:
    """Where the trials run and what each may use."""

    address: str | None = None
    """None: this machine; else `ray://HOST:PORT`, `HOST:PORT` or `auto`."""
    cpus: int = 1
    gpus: float = 0.0
    parallel: int | None = None
    """Trials at once on this machine; None: as many as its CPUs allow."""


def import_ray() -> Any:
    """Return the module `ray`, kept from sending anything anywhere.

    Raises:
        MissingDependencyError: it is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns of a coming change
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError("eff sweep needs Ray; pip install 'eff-core[sweep]'") from error
    return ray


@contextmanager
def ray_pool(resources: Resources, log: Log) -> Iterator[Pool]:
    """Give a pool; what was started for it ends with the block.

    Raises:
        RequestError: the cluster cannot be reached, or has not what a trial needs.
    """
    ray = import_ray()
    with ExitStack() as ending:
        if resources.address is None:
            log.info("start Ray")
            base = "/tmp" if os.path.isdir("/tmp") else None  # its sockets need a short path
            folder = tempfile.mkdtemp(prefix="eff-ray-", dir=base)
            ending.callback(shutil.rmtree, folder, ignore_errors=True)
            ending.callback(ray.shutdown)
            _start(ray, resources, folder)
        else:
            log.info(f"connect to Ray at {resources.address}")
            ending.callback(ray.shutdown)
            _connect(ray, resources.address)
        _check_resources(ray, resources, log)

        def pool(jobs: Sequence[Job], stop: threading.Event) -> Iterator[Outcome]:
            return _do_jobs(ray, resources, jobs, stop)

        yield pool


def _start(ray: Any, resources: Resources, folder: str) -> None:
    at_once = resources.parallel or max(1, (os.cpu_count() or 1) // resources.cpus)
    ray.init(
        num_cpus=at_once * resources.cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False, logging_level="ERROR", _temp_dir=folder,
    )  # fmt: skip


def _connect(ray: Any, address: str) -> None:
    try:
        _check_listens(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(dict.fromkeys((lines[0], lines[-1])))  # of a traceback, what it is and how it ended
        raise RequestError(
            f"--address {address}: cannot be reached ({reason}); start the cluster with 'ray start --head', "
            "or leave out --address"
        ) from error


def _check_listens(address: str) -> None:
    """Raise at once where nothing listens; Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()


def _check_resources(ray: Any, resources: Resources, log: Log) -> None:
    has = ray.cluster_resources()
    for name, wanted, flag in (("CPU", resources.cpus, "--cpus"), ("GPU", resources.gpus, "--gpus")):
        if wanted > has.get(name, 0.0):
            message = f"{flag} {wanted:g}: there are {has.get(name, 0.0):g} here"
            if resources.address is None:
                raise RequestError(f"{message}; ask for fewer")
            log.warn(f"{message}; the trials wait until the cluster has grown")


def _do_jobs(ray: Any, resources: Resources, jobs: Sequence[Job], stop: threading.Event) -> Iterator[Outcome]:
    """Hand all jobs to Ray, which runs as many at once as fit; once `stop` is set, ask them to end."""
    remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0)(do_job)
    waiting = {remote.remote(job): job.number for job in jobs}
    cancelled = False
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
        for reference in ready:
            yield _outcome(ray, reference, waiting.pop(reference))
        if stop.is_set() and not cancelled:
            cancelled = True
            for reference in waiting:
                ray.cancel(reference)  # a Ctrl-C in the worker: the run finishes its step and saves


def _outcome(ray: Any, reference: Any, number: int) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
        return outcome
    except ray.exceptions.TaskCancelledError:
        return Outcome(number, "stopped")
    except ray.exceptions.RayError as error:  # the worker died, e.g. for want of memory
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Outcome(number, "failed", f"{type(error).__name__}: {lines[0] if lines else 'no message'}")
