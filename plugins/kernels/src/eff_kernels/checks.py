"""Checks of arguments that ops share; each error names op, argument, what was found and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_dtype(op: str, name: str, x: Tensor, expected: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless `x` is a dense tensor of one of the dtypes."""
    if not isinstance(x, Tensor) or x.dtype not in expected:
        words = ", ".join(str(dtype).removeprefix("torch.") for dtype in expected)
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} is {type(x).__name__}, expected a tensor of {words}")
        raise TypeError(f"{op}: {name} is {str(x.dtype).removeprefix('torch.')}, expected {words}")
    if x.layout is not torch.strided:
        raise TypeError(f"{op}: {name} is {str(x.layout).removeprefix('torch.')}, expected a dense tensor")


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
    """Raise ValueError unless `value` is one of the words or integers expected; 4.0, True and tensors are none."""
    if not isinstance(value, (str, Integral)) or isinstance(value, bool) or value not in expected:
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(map(repr, expected))}")


def check_number(op: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is a real number, ValueError where it is NaN or infinite."""
    if type(value) not in (int, float) and (not isinstance(value, Real) or isinstance(value, bool)):
        raise TypeError(f"{op}: {name} is {value!r}, expected a number")
    if not -inf < value < inf:  # type: ignore[operator]
        raise ValueError(f"{op}: {name} is {value}, expected a finite number")


def check_range(op: str, name: str, value: float, low: float, high: float) -> None:
    """Raise unless `value` is a finite number with low <= value <= high."""
    check_number(op, name, value)
    if not low <= value <= high:
        wanted = f"{low} to {high}" if high < inf else f"at least {low}"
        raise ValueError(f"{op}: {name} is {value}, expected {wanted}")


def check_count(op: str, name: str, value: int, low: int, high: float = inf) -> None:
    """Raise unless `value` is an integer with low <= value <= high."""
    check_integer(op, name, value)
    check_range(op, name, value, low, high)


def check_flag(op: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} is {value!r}, expected True or False")


def check_integer(op: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is a whole number of an integer type."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} is {value!r}, expected an integer")


def check_values(op: str, name: str, x: Tensor, low: float, high: float, expected: str) -> None:
    """Raise ValueError unless low <= x <= high everywhere; NaN is outside.

    Looks at plain tensors on the CPU only: on another device it would wait for it, under torch.compile there are no values.
    """
    if not _has_values_at_hand(x):
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


def check_finite(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError where `x` holds NaN or infinity; looks where `check_values` does."""
    most = torch.finfo(x.dtype).max
    check_values(op, name, x, -most, most, "finite numbers")


def check_distinct(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError where an entry of the vector `x` comes twice; looks where `check_values` does."""
    if _has_values_at_hand(x):
        found = x.tolist()
        if len(set(found)) < len(found):
            twice = next(entry for entry in found if found.count(entry) > 1)
            raise ValueError(f"{op}: {name} has {twice} twice, expected each entry once")


def _has_values_at_hand(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter)


def check_readable(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError for a meta tensor, where what follows depends on values."""
    if x.is_meta:
        raise ValueError(f"{op}: {name} is on meta, expected a device that holds values")


def check_no_gradient(op: str, name: str, x: Tensor, why: str) -> None:
    """Raise ValueError where `x` asks for a gradient that it would not get."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"{op}: {name} asks for a gradient, {why}; expected it detached")


def check_writable(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError where `x` cannot be changed in place: autograd records it, or entries share memory."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"{op}: {name} asks for a gradient and would be changed in place; expected torch.no_grad()")
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"{op}: {name} is expanded, strides {x.stride()}, expected memory of its own; call .clone()")
