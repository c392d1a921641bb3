"""The errors that reach a user. Each message is one line: the thing, the reason, the way out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class EffError(Exception):
    """Base of all errors that eff reports without a traceback; `exit_code` is the command's."""

    exit_code = 1


class RequestError(EffError):
    """What was asked for is wrong; nothing has been written."""

    exit_code = 2


class ConfigError(RequestError):
    """An option is unknown, has the wrong type or is out of its range."""


class PluginError(RequestError):
    """A plugin is missing, broken or does not fit this core."""


class ModelError(RequestError):
    """A model cannot be built or its file cannot be used."""


class UnsupportedModelError(ModelError):
    """Nothing in the model is something the method can change."""


class DataError(RequestError):
    """The data is missing, empty or does not fit the task."""


class OutputError(RequestError):
    """The place for the results cannot be used."""


class MissingDependencyError(RequestError):
    """An optional library that this request needs is not installed."""


class RunError(EffError):
    """The request was fine, the work failed."""


class NonFiniteLossError(RunError):
    """The loss became NaN or infinite."""


class InterruptedRunError(EffError):
    """The user stopped the run; what is on disk can be resumed."""

    exit_code = 130


class Problems(RequestError):
    """Several things are wrong with one request; all are reported, one line each."""

    def __init__(self, problems: Sequence[Exception]):
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def raise_problems(problems: Sequence[RequestError]) -> None:
    """Raise nothing, the one problem, or all of them together."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(problems)


def check_all(*checks: Callable[[], Any]) -> list[Any]:
    """Return what the checks return; the faults of all of them are raised together."""
    results: list[Any] = []
    problems: list[RequestError] = []
    for check in checks:
        try:
            results.append(check())
        except RequestError as error:
            problems += getattr(error, "problems", (error,))
    raise_problems(problems)
    return results


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
