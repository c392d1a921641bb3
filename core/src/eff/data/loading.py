"""From what the user wrote to `Data`: finds the source and calls it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping

from eff.data import Data, Source
from eff.errors import DataError, EffError, did_you_mean
from eff.schemas import DataSpec, TaskSpec

BUILT_IN: dict[str, str] = {
    "corpus": "eff.data.corpus:load_corpus",
    "csv": "eff.data.text:load_csv",
    "digits": "eff.data.digits:load_digits",
    "folder": "eff.data.folder:load_folder",
    "hf": "eff.data.hub:load_hub",
    "npz": "eff.data.npz:load_npz",
    "parquet": "eff.data.parquet:load_parquet",
}
_NEED_LOCATION = {
    "csv": "csv:PATH",
    "folder": "folder:PATH",
    "hf": "hf:ID",
    "npz": "npz:PATH",
    "parquet": "parquet:PATH",
}


def load(spec: DataSpec, task: TaskSpec | None, sources: Mapping[str, str]) -> Data:
    """Return the data that `spec` names; see `eff.data.load_data`."""
    if spec.scheme in BUILT_IN and spec.scheme in sources:
        raise DataError(
            f"data '{spec}': '{spec.scheme}' is built in, and {sources[spec.scheme]} takes the same name; "
            "uninstall or rename that extension"
        )
    target = BUILT_IN.get(spec.scheme) or sources.get(spec.scheme)
    if target is None:
        return _call(_user_function(spec, sources), spec, task)
    if spec.scheme in _NEED_LOCATION and not spec.location:
        raise DataError(f"data '{spec}': nothing named; write {_NEED_LOCATION[spec.scheme]}")
    module, _, attribute = target.partition(":")
    try:
        source: Source = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise DataError(f"data '{spec}': cannot import {target}: {_reason(error)}") from error
    return source(spec, task) if spec.scheme in BUILT_IN else _call(source, spec, task)


def check_source(spec: DataSpec, sources: Mapping[str, str]) -> None:
    """Raise where no source can be meant; loads nothing.

    Raises:
        DataError: neither a source nor a module.
    """
    known = sorted({*BUILT_IN, *sources})
    if spec.scheme not in known and not (spec.location and _is_module(spec)):
        hint = did_you_mean(spec.scheme, known).rstrip("?")
        raise DataError(
            f"data '{spec}': there is no source, file or folder '{spec.scheme}'{hint}; "
            f"sources are {', '.join(known)} and package.module:function"
        )


def _user_function(spec: DataSpec, sources: Mapping[str, str]) -> Source:
    """Return the function that `package.module:function` names."""
    check_source(spec, sources)
    try:
        function = getattr(importlib.import_module(spec.scheme), spec.location)
    except AttributeError as error:
        raise DataError(f"data '{spec}': module {spec.scheme} has no function '{spec.location}'") from error
    except Exception as error:  # importing runs foreign code
        raise DataError(f"data '{spec}': cannot import {spec.scheme}: {_reason(error)}") from error
    if not callable(function):
        raise DataError(f"data '{spec}': {spec.scheme}.{spec.location} is no function; it must take (spec, task)")
    source: Source = function
    return source


def _is_module(spec: DataSpec) -> bool:
    if not all(part.isidentifier() for part in spec.scheme.split(".")):
        return False
    try:
        return importlib.util.find_spec(spec.scheme) is not None
    except ModuleNotFoundError:
        return False
    except Exception as error:  # finding a submodule imports its package
        raise DataError(f"data '{spec}': cannot import {spec.scheme}: {_reason(error)}") from error


def _call(source: Source, spec: DataSpec, task: TaskSpec | None) -> Data:
    """Call a function that is not eff's, and check what it returns."""
    try:
        data = source(spec, task)
    except EffError:
        raise
    except Exception as error:  # foreign code may raise anything
        raise DataError(f"data '{spec}' failed: {_reason(error)}") from error
    if not isinstance(data, Data):
        raise DataError(f"data '{spec}': the function returned {type(data).__name__}; it must return eff.data.Data")
    if data.train is None and data.test is None:
        raise DataError(f"data '{spec}': the function returned no split; set train, test or both")
    return data


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
