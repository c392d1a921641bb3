"""What EFF_TRACK asks for: `tensorboard`, `tensorboard:DIR`, `mlflow` or `mlflow:URI`. Imports no tracker."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from eff.errors import ConfigError, MissingDependencyError, did_you_mean

VARIABLE = "EFF_TRACK"
TRACKERS = ("tensorboard", "mlflow")
"""Names of the trackers, of the modules they need, and of the extras that install them."""


@dataclass(frozen=True)
class Target:
    """A tracker and where it writes; an empty place is the tracker's own default."""

    tracker: str
    place: str = ""


def read_target(text: str) -> Target | None:
    """Return what `text` asks for, None where it is empty.

    Raises:
        ConfigError: there is no such tracker. MissingDependencyError: it is not installed.
    """
    if not text:
        return None
    tracker, _, place = text.partition(":")
    if tracker not in TRACKERS:
        raise ConfigError(
            f"{VARIABLE}={text}: there is no tracker '{tracker}'{did_you_mean(tracker, TRACKERS)}; "
            f"known: {', '.join(TRACKERS)}, also as tensorboard:DIR and mlflow:URI"
        )
    if not _is_installed(tracker):
        raise MissingDependencyError(f"{VARIABLE}={text} needs {tracker}; pip install 'eff-tracking[{tracker}]'")
    return Target(tracker, place)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # it is being imported, or was put there without a spec
        return True
