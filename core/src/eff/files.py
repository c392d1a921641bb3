"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from eff.errors import OutputError, RunError

if TYPE_CHECKING:
    from pydantic import JsonValue

    from eff.schemas import Artifact

RECIPE_FILE = "recipe.yaml"
REPORT_FILE = "report.json"
MODEL_FILE = "model.pt"
STATE_FILE = "resume.pt"
IN_PROGRESS = "run.in-progress"
"""Marks a run folder whose run has not finished; it may be resumed or started anew."""
CORE_FILES = (RECIPE_FILE, REPORT_FILE, MODEL_FILE, STATE_FILE, IN_PROGRESS)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; move it there when the block ends without an error.

    Raises:
        RunError: the disk is full or the folder cannot be written; `path` is unchanged.
    """
    temporary: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        _give_usual_mode(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; free space or choose another --out") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _give_usual_mode(path: Path) -> None:
    """Give `path` the permissions of an ordinary new file; mkstemp makes it private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe_artifact(path: Path, format: str, details: dict[str, JsonValue] | None = None) -> Artifact:
    """Return the artifact record of a file that has just been written."""
    from eff.schemas import Artifact

    return Artifact(path=path, format=format, bytes=path.stat().st_size, sha256=sha256_of(path), details=details or {})


def check_output_folder(folder: Path, force: bool) -> None:
    """Raise when results cannot be put into `folder`; changes nothing.

    A folder with an unfinished run, an empty folder and no folder are fine; one with results needs
    `force`.

    Raises:
        OutputError: `folder` is a file, holds results, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; --out needs a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if (folder / IN_PROGRESS).exists() and not force:
            raise OutputError(
                f"{folder} holds an unfinished run; go on with --resume {folder}, or start anew with --force"
            )
        if not force:
            raise OutputError(
                f"{folder} exists and is not empty; add --force to replace its results, or choose another --out"
            )
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"cannot create {folder}: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write in {parent}; choose another --out")


def make_output_folder(folder: Path) -> None:
    """Create `folder`, where `check_output_folder` has agreed.

    Raises:
        OutputError: the system refuses; nothing was created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write in {folder}: {error.strerror or error}; choose another --out") from error


def check_space(folder: Path, needed: int) -> None:
    """Raise when the disk of `folder` has less than `needed` bytes free.

    Raises:
        OutputError: it has less.
    """
    parent = folder
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{folder}: {free / 1e6:.1f} MB free, the run needs about {needed / 1e6:.1f} MB; free space or choose another --out"
        )
