"""Search spaces and genotypes as data: which sizes a layer may have, and which were chosen. Imports no torch.

A choice (a width, a kernel size, a depth) has a name and its candidate values; layers refer to it by
name, so that what must change together (the output of one layer and the input of the next) does.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from eff.errors import ModelError, did_you_mean
from eff.schemas import ModelSpec, Schema

Chosen = dict[str, int]
"""A value for each choice of a space."""


class Choice(Schema):
    """One decision: candidate values in increasing order."""

    kind: Literal["width", "kernel", "depth"]
    values: tuple[int, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _values_increase(self) -> Choice:
        check_increasing(self.kind, self.values)
        if self.kind == "kernel":
            check_kernels(self.values)
        return self


class Axis(Schema):
    """One dimension of a weight whose size is a choice.

    Position p of the dimension belongs to channel `(p // repeat) % channels`; a candidate w keeps the
    channels below w. `repeat` is the number of features per channel (pixels after a flatten, or a head's
    width), `blocks` how often the channels come (3 for a joint query, key and value).
    """

    choice: str
    repeat: int = Field(1, ge=1)
    blocks: int = Field(1, ge=1)


class LayerChoices(Schema):
    """The choices that one module takes part in."""

    out: Axis | None = None
    inp: Axis | None = None
    kernel: str | None = None
    depth: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The choices, in the order of the product: input, output, kernel, depth."""
        names = (self.inp and self.inp.choice, self.out and self.out.choice, self.kernel, self.depth)
        return tuple(name for name in names if name)


class SearchSpace(Schema):
    """All choices, and the modules they shape by name."""

    choices: dict[str, Choice]
    layers: dict[str, LayerChoices]
    crop: Literal["center", "corner"] = "center"

    @model_validator(mode="after")
    def _choices_exist(self) -> SearchSpace:
        for layer, axes in self.layers.items():
            for name in axes.names:
                if name not in self.choices:
                    raise ValueError(f"layer '{layer}' refers to the choice '{name}', which is not in the space")
        return self

    @property
    def architectures(self) -> int:
        """How many networks the space holds."""
        return math.prod(len(choice.values) for choice in self.choices.values())

    @property
    def largest(self) -> Chosen:
        """The last candidate of every choice."""
        return {name: choice.values[-1] for name, choice in self.choices.items()}

    def values_of(self, name: str) -> tuple[int, ...]:
        """Return the candidates of one choice."""
        return self.choices[name].values

    def check(self, chosen: Chosen) -> None:
        """Raise when `chosen` is no network of this space.

        Raises:
            ModelError: a choice is missing, unknown, or has a value that is no candidate.
        """
        for name, value in chosen.items():
            if name not in self.choices:
                raise ModelError(f"genotype: there is no choice '{name}'{did_you_mean(name, self.choices)}")
            if value not in self.choices[name].values:
                known = ", ".join(str(known) for known in self.choices[name].values)
                raise ModelError(f"genotype: {name} is {value}; candidates are {known}")
        if missing := [name for name in self.choices if name not in chosen]:
            raise ModelError(f"genotype: nothing chosen for {', '.join(missing[:3])}")


class Genotype(Schema):
    """The network that a search chose: enough to build it anywhere, without weights."""

    format: Literal["eff-genotype"] = "eff-genotype"
    version: Literal[1] = 1
    model: ModelSpec = Field(description="The network before the search, with every candidate at its largest.")
    space: SearchSpace
    chosen: Chosen

    def check(self) -> None:
        """Raise ModelError where the chosen values do not fit the space."""
        self.space.check(self.chosen)


def read_genotype(path: Path) -> Genotype:
    """Read a genotype from JSON.

    Raises:
        ModelError: missing, no JSON, or no genotype.
    """
    try:
        genotype = Genotype.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"genotype {path}: {error.strerror}; name an existing file") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise ModelError(f"genotype {path}: is no genotype ({_first_fault(error)}); export it again") from error
    genotype.check()
    return genotype


def _first_fault(error: ValidationError | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is no text"
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"]).splitlines()[0]


def check_increasing(kind: str, values: tuple[float, ...]) -> None:
    """Raise ValueError where candidates are not above 0 and strictly increasing."""
    if any(value <= 0 for value in values) or any(a >= b for a, b in zip(values, values[1:], strict=False)):
        text = ", ".join(f"{value:g}" for value in values)
        raise ValueError(f"{kind} candidates must be above 0 and increase, got {text}")


def check_kernels(values: tuple[int, ...]) -> None:
    """Raise ValueError where a kernel size is even: it has no centre to be cropped around."""
    if even := [value for value in values if value % 2 == 0]:
        raise ValueError(f"kernel candidates must be odd, got {even[0]}; an even kernel has no centre")
