"""Checks of arguments that ops share; each error names op, argument, what was found and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_dtype(op: str, name: str, x: Tensor, expected: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless `x` is a tensor of one of the dtypes."""
    if not isinstance(x, Tensor) or x.dtype not in expected:
        words = ", ".join(str(dtype).removeprefix("torch.") for dtype in expected)
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} is {type(x).__name__}, expected a tensor of {words}")
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


def check_integer(op: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is a whole number of an integer type."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} is {value!r}, expected an integer")


def check_values(op: str, name: str, x: Tensor, low: float, high: float, expected: str) -> None:
    """Raise ValueError unless low <= x <= high everywhere; NaN is outside.

    Looks at plain tensors on the CPU only: on another device it would wait for it, under torch.compile there are no values.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return
    if x.ndim == 0:
        least = most = x.item()
    elif not x.numel():
        return
    else:
        least, most = (bound.item() for bound in torch.aminmax(x.detach()))
    if not low <= least <= most <= high:
        found = f"is {least}" if least == most or x.ndim == 0 else f"has values from {least} to {most}"
        raise ValueError(f"{op}: {name} {found}, expected {expected}")
