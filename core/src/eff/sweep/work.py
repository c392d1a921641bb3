"""Doing trials: each is an ordinary run in its own folder, which may go on where it stopped."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from eff.errors import EffError, InterruptedRunError, RequestError
from eff.files import IN_PROGRESS, STATE_FILE

TRACEBACK_FILE = "error.txt"


@dataclass(frozen=True)
class Job:
    """One trial for a worker; plain values, because it travels."""

    number: int
    recipe: str
    """The recipe as JSON."""
    folder: str
    fresh: bool = False
    """Do not go on with what an earlier attempt left."""
    working_folder: str = "."
    environment: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a job; the figures are in the run folder's report."""

    number: int
    state: Literal["done", "failed", "stopped"]
    reason: str = ""


Pool = Callable[[Sequence[Job], threading.Event], Iterator[Outcome]]
"""Does jobs and yields their outcomes as they come; ends early, but cleanly, once the event is set."""


def do_job(job: Job) -> Outcome:
    """Do one trial in this process; whatever goes wrong is an outcome."""
    os.environ.update(job.environment)
    if Path(job.working_folder).is_dir():
        os.chdir(job.working_folder)  # relative data paths mean what they mean where the sweep was started
    try:
        _run(job)
    except InterruptedRunError as error:
        return Outcome(job.number, "stopped", str(error))
    except KeyboardInterrupt:
        return Outcome(job.number, "stopped")
    except EffError as error:
        return Outcome(job.number, "failed", "; ".join(str(error).splitlines()))
    except Exception as error:  # a method may raise anything
        first = (str(error).strip().splitlines() or ["no message"])[0]
        note = _keep_traceback(Path(job.folder))
        return Outcome(job.number, "failed", f"{type(error).__name__}: {first}{note}")
    return Outcome(job.number, "done")


def _run(job: Job) -> None:
    from eff import runner
    from eff.schemas import Recipe

    if job.threads is not None:
        import torch

        torch.set_num_threads(job.threads)
    folder = Path(job.folder)
    if not job.fresh and (folder / IN_PROGRESS).exists() and (folder / STATE_FILE).exists():
        try:
            runner.resume(folder)
            return
        except RequestError:  # damaged by whatever stopped it; a trial can always be done anew
            pass
    runner.apply(Recipe.model_validate_json(job.recipe), folder, force=True)


def _keep_traceback(folder: Path) -> str:
    if not folder.is_dir():
        return ""
    (folder / TRACEBACK_FILE).write_text(traceback.format_exc(), encoding="utf-8")
    return f" ({folder.name}/{TRACEBACK_FILE})"
