"""What may stand behind the '?' of a data source, and how its mistakes are reported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from eff.errors import DataError, RequestError, did_you_mean, raise_problems
from eff.schemas import DataSpec, Schema

LARGEST_SIDE = 8192


def _parse_size(value: object) -> object:
    """Read "224" or "192x256" as (height, width)."""
    if not isinstance(value, str):
        return value
    parts = value.lower().split("x")
    sides = tuple(int(part) for part in (parts * 2 if len(parts) == 1 else parts))
    if len(sides) != 2 or not all(1 <= side <= LARGEST_SIDE for side in sides):
        raise ValueError("out of range")
    return sides


Size = Annotated[tuple[int, int], BeforeValidator(_parse_size)]


class SampleOptions(Schema):
    """Options that all sources share. A field's description says what its value must be."""

    train: int | None = Field(None, ge=0, description="a whole number of samples, 0 or more")
    test: int | None = Field(None, ge=0, description="a whole number of samples, 0 or more")
    seed: int = Field(0, ge=0, lt=2**31, description="a whole number from 0 to 2147483647")


class ImageOptions(SampleOptions):
    """Options that all image sources share."""

    size: Size | None = Field(None, description=f"N or HxW in pixels, each from 1 to {LARGEST_SIDE}")


OptionsT = TypeVar("OptionsT", bound=SampleOptions)


def read_options(spec: DataSpec, kind: type[OptionsT], path: Path | None = None) -> OptionsT:
    """Return the options of a source, checked; where the source reads a path, that it is there.

    Args:
        spec: the source as the user wrote it.
        kind: the options the source knows.
        path: what the source will read, or None when it reads no path.

    Raises:
        DataError: one thing is wrong. Problems: several are.
    """
    problems: list[RequestError] = []
    if path is not None and not path.exists():
        problems.append(DataError(f"data '{spec}': there is no file or folder {path}"))
    options: OptionsT | None = None
    try:
        options = kind.model_validate(spec.options)
    except ValidationError as error:
        problems += [DataError(f"data '{spec}': {_fault(kind, spec, str(item['loc'][0]))}") for item in error.errors()]
    raise_problems(problems)
    assert options is not None  # raise_problems raised where validation failed
    return options


def _fault(kind: type[SampleOptions], spec: DataSpec, name: str) -> str:
    field = kind.model_fields.get(name)
    if field is None:
        known = list(kind.model_fields)
        return f"option '{name}' is unknown{did_you_mean(name, known)}; {spec.scheme} knows {', '.join(known)}"
    return f"{name} must be {field.description}, got '{spec.options.get(name)}'"
