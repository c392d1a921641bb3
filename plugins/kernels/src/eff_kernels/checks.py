"""Checks of arguments that ops share; each error names op, argument, what was found and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_dtype(op: str, name: str, x: Tensor, expected: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless `x` has one of the dtypes."""
    if x.dtype not in expected:
        words = ", ".join(str(dtype).removeprefix("torch.") for dtype in expected)
        raise TypeError(f"{op}: {name} is {str(x.dtype).removeprefix('torch.')}, expected {words}")


def check_shape(op: str, name: str, x: Tensor, expected: Sequence[int | str]) -> None:
    """Raise ValueError unless `x` has this shape; words stand for any size, e.g. ("batch", 3)."""
    fits = x.ndim == len(expected) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(x.shape, expected, strict=True)
    )
    if not fits:
        words = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected ({words})")


def check_device(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both lie on one device."""
    if x.device != other.device:
        raise ValueError(f"{op}: {name} is on {x.device}, {other_name} on {other.device}; expected one device")


def check_contiguous(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError unless `x` is contiguous; for arguments whose copy would cost what the op saves."""
    if not x.is_contiguous():
        raise ValueError(
            f"{op}: {name} has strides {x.stride()}, expected a contiguous tensor; call .contiguous() once"
        )


def check_not_empty(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError where `x` has no elements."""
    if not x.numel():
        raise ValueError(f"{op}: {name} is empty, shape {tuple(x.shape)}; expected at least one element")


def check_choice(op: str, name: str, value: object, expected: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of those expected."""
    if value not in expected:
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(map(repr, expected))}")


def check_range(op: str, name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high; NaN is outside."""
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} is {value}, expected {low} to {high}")
