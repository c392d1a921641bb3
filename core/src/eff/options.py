"""Options of methods as the user writes them (`-o key=value`), checked against the method's schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue, ValidationError

from eff.errors import ConfigError, RequestError, did_you_mean, raise_problems

if TYPE_CHECKING:
    from eff.method import MethodConfig


def read_value(text: str) -> JsonValue:
    """Return the JSON value that `text` is (3, 0.5, true, null, [..]), else the text itself.

    A comma-separated text stays a text here; a field that is a list takes it apart.
    """
    try:
        value: JsonValue = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value


def read_assignments(assignments: Sequence[str], flag: str) -> dict[str, JsonValue]:
    """Return the values of texts like `betas=0.9,0.99`; commas make a list.

    Raises:
        ConfigError: a text has no '='.
    """
    values: dict[str, JsonValue] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{flag} '{text}': write it as name=value, e.g. {flag} betas=0.9,0.99")
        read = read_value(value)
        values[key] = [read_value(part) for part in read.split(",")] if isinstance(read, str) and "," in read else read
    return values


def method_names(text: str) -> list[str]:
    """Return the methods of a text like `quant_lsq,train_adamp`.

    Raises:
        RequestError: a name is missing between the commas.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise RequestError(f"'{text}': a name is missing between the commas; write e.g. quant_lsq,train_adamp")
    return names


def split_assignments(assignments: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, JsonValue]]:
    """Return the options of each method from texts like `bits=3` or `quant_lsq.bits=3`.

    Raises:
        ConfigError: no '=', a method that is not part of the run, or an option without its
            method's name where there are several methods. Problems: several of these.
    """
    options: dict[str, dict[str, JsonValue]] = {name: {} for name in methods}
    problems: list[RequestError] = []
    for text in assignments:
        key, equals, value = text.partition("=")
        method, dot, option = key.rpartition(".")
        if not equals or not key:
            problems.append(ConfigError(f"option '{text}': write it as name=value, e.g. -o weight_bits=3"))
        elif dot and method not in options:
            problems.append(
                ConfigError(f"option '{text}': '{method}' is not part of this run{did_you_mean(method, methods)}")
            )
        elif not dot and len(methods) != 1:
            problems.append(
                ConfigError(f"option '{text}': say whose, e.g. -o {methods[0] if methods else 'METHOD'}.{text}")
            )
        else:
            options[method or methods[0]][option] = read_value(value)
    raise_problems(problems)
    return options


def check_config(name: str, config_type: type[MethodConfig], options: Mapping[str, JsonValue]) -> MethodConfig:
    """Return the method's configuration.

    Raises:
        ConfigError: an option is unknown, of the wrong type or out of range. Problems: several.
    """
    fields = config_type.model_fields
    values = {
        key: _as_list(value, fields[key].annotation) if key in fields else value for key, value in options.items()
    }
    try:
        return config_type.model_validate(values)
    except ValidationError as error:
        problems: dict[str, RequestError] = {}
        for fault in error.errors():
            key = str(fault["loc"][0]) if fault["loc"] else ""
            problems.setdefault(key, ConfigError(f"{name}: {_say(key, fault, fields)}"))
        raise_problems(list(problems.values()))
        raise AssertionError("pydantic reported an error without a fault") from error


def _as_list(value: JsonValue, annotation: Any) -> JsonValue:
    """Take `a,b` apart for a field that is a tuple or list."""
    if isinstance(value, str) and str(annotation).startswith(("tuple", "list", "typing.Tuple", "typing.List")):
        return [part for part in value.split(",") if part]
    return value


def _say(key: str, fault: Any, fields: Mapping[str, Any]) -> str:
    if fault["type"] == "extra_forbidden":
        known = ", ".join(fields) or "none"
        return f"option '{key}' is unknown{did_you_mean(key, fields) or f'; known: {known}'}"
    found = fault.get("input")
    context = fault.get("ctx", {})
    if fault["type"] in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        # Of an entry of a tuple only the bound that it broke is known.
        bounds = _range(fields.get(key)) or {name: context[name] for name in _BOUNDS if name in context}
        if set(bounds) == {"ge", "le"}:
            return f"{key} must be between {bounds['ge']} and {bounds['le']}, got {found}"
        return (
            f"{key} must be {' and '.join(f'{_BOUNDS[name]} {value}' for name, value in bounds.items())}, got {found}"
        )
    if "error" in context:  # a validator of the plugin
        return f"{key + ': ' if key else ''}{context['error']}"
    message = str(fault["msg"])
    return f"{key}: {message[0].lower()}{message[1:]}, got {found!r}"


_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _range(field: Any) -> dict[str, Any]:
    """Return the bounds of a field, the lower one first."""
    metadata = getattr(field, "metadata", ())
    return {name: getattr(item, name) for name in _BOUNDS for item in metadata if hasattr(item, name)}


def option_rows(config_type: type[MethodConfig]) -> list[dict[str, str]]:
    """Return name, type, default, range and meaning of each option, for tables."""
    rows = []
    for name, field in config_type.model_fields.items():
        schema = config_type.model_json_schema()["properties"][name]
        low, high = _bounds(schema)
        rows.append(
            {
                "option": name,
                "type": _type_name(schema),
                "default": json.dumps(schema.get("default")) if "default" in schema else "",
                "range": f"{low}..{high}" if low or high else _choices(schema),
                "meaning": field.description or "",
            }
        )
    return rows


def _variants(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(schema.get("anyOf", [schema]))


def _bounds(schema: Mapping[str, Any]) -> tuple[str, str]:
    for variant in _variants(schema):
        low = variant.get("minimum", variant.get("exclusiveMinimum", ""))
        high = variant.get("maximum", variant.get("exclusiveMaximum", ""))
        if low != "" or high != "":
            return str(low), str(high)
    return "", ""


def _choices(schema: Mapping[str, Any]) -> str:
    return ", ".join(str(choice) for variant in _variants(schema) for choice in variant.get("enum", ()))


def _type_name(schema: Mapping[str, Any]) -> str:
    names = [str(variant.get("type", "choice")) for variant in _variants(schema)]
    return " or ".join(names)
