"""The search space as the user writes it, and the settings drawn from it.

weight_bits=2,3,4            these values, each once
lr=loguniform(1e-4,1e-1)     a number whose logarithm is uniform
dropout=uniform(0,0.5)       a number
layers=randint(2,8)          a whole number, both ends included
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from eff.errors import ConfigError, RequestError, did_you_mean, raise_problems
from eff.options import read_value

Kind = Literal["values", "uniform", "loguniform", "randint"]
DISTRIBUTIONS: tuple[Kind, ...] = ("uniform", "loguniform", "randint")
DRAWS_PER_TRIAL = 1000
"""How often a setting is drawn again before the space counts as exhausted."""

Setting = dict[str, JsonValue]


@dataclass(frozen=True)
class Axis:
    """One option and what it may be."""

    name: str
    kind: Kind
    values: tuple[JsonValue, ...] = ()
    low: float = 0.0
    high: float = 0.0

    def draw(self, source: random.Random) -> JsonValue:
        """Return one value; numbers have four significant digits, so that they can be read and typed again."""
        if self.kind == "values":
            return source.choice(self.values)
        if self.kind == "randint":
            return source.randint(int(self.low), int(self.high))
        share = source.random()
        if self.kind == "uniform":
            value = self.low + (self.high - self.low) * share
        else:
            value = math.exp(math.log(self.low) + (math.log(self.high) - math.log(self.low)) * share)
        return min(max(float(f"{value:.4g}"), self.low), self.high)


def parse_axes(texts: Sequence[str]) -> tuple[Axis, ...]:
    """Return the axes of texts like `weight_bits=2,3,4`, in their order.

    Raises:
        ConfigError: one is malformed or named twice. Problems: several.
    """
    axes: list[Axis] = []
    problems: list[RequestError] = []
    for text in texts:
        try:
            axis = _parse_axis(text)
            if axis.name in [other.name for other in axes]:
                raise ConfigError(f"-s {text}: '{axis.name}' is named twice; give all its values in one -s")
            axes.append(axis)
        except RequestError as error:
            problems.append(error)
    if not texts:
        problems.append(ConfigError("nothing to search; give options with their values, e.g. -s weight_bits=2,3,4"))
    raise_problems(problems)
    return tuple(axes)


def _parse_axis(text: str) -> Axis:
    name, _, right = text.partition("=")
    if not name or not right:
        raise ConfigError(f"-s '{text}': write it as name=value,value or name=loguniform(low,high)")
    if call := re.fullmatch(r"(\w+)\(([^()]*)\)", right.strip()):
        return _parse_distribution(text, name, call[1], call[2])
    values = tuple(read_value(part) for part in split_values(right))
    if "" in values:
        raise ConfigError(f"-s {text}: has an empty value; write name=value,value (an empty text is '\"\"')")
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"-s {text}: names {value!r} twice")
    return Axis(name, "values", values)


def split_values(text: str) -> list[str]:
    """Return the parts between commas; commas within brackets and quotes do not count.

    `["fc"],["fc","conv1"]` has two parts.
    """
    parts = [""]
    depth, quoted = 0, False
    for character in text:
        if character == '"':
            quoted = not quoted
        elif not quoted:
            depth += (character in "[({") - (character in "])}")
        if character == "," and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _parse_distribution(text: str, name: str, kind: str, arguments: str) -> Axis:
    if kind not in DISTRIBUTIONS:
        known = ", ".join(DISTRIBUTIONS)
        raise ConfigError(
            f"-s {text}: there is no distribution '{kind}'{did_you_mean(kind, DISTRIBUTIONS)}; known: {known}"
        )
    try:
        low, high = (float(part) for part in arguments.split(","))
    except ValueError as error:
        raise ConfigError(f"-s {text}: {kind} takes two numbers, e.g. {kind}(1,8)") from error
    if not low < high or not math.isfinite(high - low):
        raise ConfigError(f"-s {text}: the first number must be below the second")
    if kind == "loguniform" and low <= 0:
        raise ConfigError(f"-s {text}: loguniform needs numbers above 0, got {low:g}")
    if kind == "randint" and not (low.is_integer() and high.is_integer()):
        raise ConfigError(f"-s {text}: randint takes whole numbers")
    return Axis(name, kind, low=low, high=high)


def grid(axes: Sequence[Axis]) -> list[Setting]:
    """Return every combination; the last axis changes fastest.

    Raises:
        RequestError: an axis has no list of values.
    """
    for axis in axes:
        if axis.kind != "values":
            raise RequestError(f"a grid cannot hold {axis.name}={axis.kind}(...); list values, or use --search random")
    return [
        dict(zip([axis.name for axis in axes], values, strict=True))
        for values in itertools.product(*(axis.values for axis in axes))
    ]


def draw_settings(axes: Sequence[Axis], trials: int, seed: int) -> list[Setting]:
    """Return different settings drawn at random; a larger `trials` adds to a smaller one's.

    Raises:
        RequestError: the space has fewer than `trials` settings.
    """
    source = random.Random(seed)
    found: dict[str, Setting] = {}
    for _ in range(DRAWS_PER_TRIAL * trials):
        setting = {axis.name: axis.draw(source) for axis in axes}
        found.setdefault(repr(setting), setting)
        if len(found) == trials:
            return list(found.values())
    raise RequestError(f"--trials {trials}: the space has only {len(found)} different settings; ask for fewer")
