"""Runs an exported program on numpy integers; imports numpy alone (and safetensors to read the file).

    from eff_quant_hawqv3.runner import read_program, run_program
    codes = run_program(*read_program("model.integer"), images)     # int64 (N, classes); argmax needs no scale

Floats occur in one place: the input is divided by its step and rounded. Convolutions gather their windows (im2col).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def read_program(path: Path | str) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return a program and its tensors.

    Raises:
        ValueError: the file holds no such program.
    """
    from safetensors import safe_open

    with safe_open(str(path), "np") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != "eff-hawqv3":
            raise ValueError(f"{path}: is no integer program of quant_hawqv3")
        program = json.loads(metadata["program"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, shape in program["packed"].items():
        pairs = tensors[key]
        codes = np.stack([pairs & 15, pairs >> 4], 1).reshape(-1)[: int(np.prod(shape))]
        tensors[key] = (codes.astype(np.int8) - 8).reshape(shape)
    return program, tensors


def run_program(
    program: dict[str, Any], tensors: dict[str, Array], x: Array, trace: dict[str, Array] | None = None
) -> Array:
    """Return the output's codes, int64.

    Args:
        program, tensors: from `read_program`.
        x: float32 inputs as the model takes them (normalised), shape (N, ...).
        trace: filled with every step's codes by name, where given.
    """
    values: dict[str, Array] = {}
    half_even = program["rounding"] == "half_even"
    for step in program["steps"]:
        if step["op"] == "quantize":
            ratio = np.asarray(x, np.float32) / np.float32(step["step"])
            rounded = np.round(ratio) if half_even else np.floor(ratio + np.float32(0.5))
            result = np.clip(rounded, step["low"], step["high"]).astype(np.int64)
        else:
            own = {key: tensors[name] for key in ("m", "e", "weight", "bias", "low", "high") if (name := f"{step['out']}.{key}") in tensors}  # fmt: skip
            result = _OPS[step["op"]](step, own, half_even, *(values[name] for name in step["in"]))
        values[step["out"]] = result
    if trace is not None:
        trace.update(values)
    return values[program["output"]]


def _channels(array: Array, ndim: int) -> Array:
    return array.astype(np.int64).reshape((1, -1) + (1,) * (ndim - 2)) if array.ndim else array.astype(np.int64)


def _requantize(step: dict[str, Any], own: dict[str, Array], half_even: bool, x: Array) -> Array:
    m, e = _channels(own["m"], x.ndim), _channels(own["e"], x.ndim)
    product, half = x * m, np.left_shift(1, e - 1)
    if half_even:
        floor = product >> e
        rest = product - (floor << e)
        out = floor + ((rest > half) | ((rest == half) & (floor % 2 == 1)))
    else:
        out = (product + half) >> e
    return out if step["low"] is None else np.clip(out, step["low"], step["high"])


def _layer(step: dict[str, Any], own: dict[str, Array], half_even: bool, x: Array) -> Array:
    weight, bias, conv = own["weight"].astype(np.int32), own["bias"].astype(np.int64), step["conv"]
    if conv is None:
        return x.astype(np.int32) @ weight.T + bias
    groups, (kh, kw) = conv["groups"], weight.shape[2:]
    windows = _windows(x.astype(np.int32), (kh, kw), conv["stride"], conv["padding"], conv["dilation"])
    n, c, oh, ow = windows.shape[:4]
    inside = (c // groups) * kh * kw
    rows = windows.reshape(n, groups, c // groups, oh, ow, kh, kw).transpose(1, 0, 3, 4, 2, 5, 6)
    product = rows.reshape(groups, n * oh * ow, inside) @ weight.reshape(groups, -1, inside).transpose(0, 2, 1)
    product = product.reshape(groups, n, oh, ow, -1).transpose(1, 0, 4, 2, 3).reshape(n, -1, oh, ow)
    return product + bias.reshape(1, -1, 1, 1)


def _windows(x: Array, kernel: Any, stride: Any, padding: Any, dilation: Any = (1, 1), value: int = 0) -> Array:
    """Return a view (N, C, OH, OW, kh, kw)."""
    if any(padding):
        x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2), constant_values=value)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(x, reach, (2, 3))
    return view[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]


def _clip(step: dict[str, Any], own: dict[str, Array], half_even: bool, x: Array) -> Array:
    x = np.maximum(x, _channels(own["low"], x.ndim))
    return np.minimum(x, _channels(own["high"], x.ndim)) if "high" in own else x


def _max_pool(step: dict[str, Any], own: dict[str, Array], half_even: bool, x: Array) -> Array:
    lowest = int(np.iinfo(np.int64).min)
    return _windows(x, step["kernel"], step["stride"], step["padding"], value=lowest).max((4, 5))


def _sum_pool(step: dict[str, Any], own: dict[str, Array], half_even: bool, x: Array) -> Array:
    return _windows(x, step["kernel"], step["stride"], step["padding"]).sum((4, 5))


def _slice(step: dict[str, Any], own: dict[str, Array], half_even: bool, x: Array) -> Array:
    return x[(slice(None), *(slice(*cut) for cut in step["cuts"]))]


def _pad(step: dict[str, Any], own: dict[str, Array], half_even: bool, x: Array) -> Array:
    sides = step["sides"]
    pairs = [(sides[i], sides[i + 1]) for i in range(0, len(sides), 2)][::-1]
    return np.pad(x, [(0, 0)] * (x.ndim - len(pairs)) + pairs)


_OPS: dict[str, Any] = {
    "requantize": _requantize,
    "layer": _layer,
    "clip": _clip,
    "add": lambda step, own, half_even, left, right: left + right,
    "cat": lambda step, own, half_even, *parts: np.concatenate(parts, 1),
    "max_pool": _max_pool,
    "sum_pool": _sum_pool,
    "flatten": lambda step, own, half_even, x: x.reshape(len(x), -1),
    "slice": _slice,
    "pad": _pad,
}
