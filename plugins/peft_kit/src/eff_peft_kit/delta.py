"""Delta files: what a fine-tuning changed, without the base model. They are safetensors.

    NAME.index, NAME.columns       int32 (r,) and (out, r, ...): input columns of NAME's weight and their values
    NAME.index, NAME.difference    the same with the difference to the base, which can be taken out again
    NAME                           a whole tensor that was trained, e.g. the head's weight

The metadata say which method wrote the file and hold a checksum of each layer's untouched columns, so a
delta is not put onto another base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eff.errors import ModelError
from eff.files import atomic_path
from eff_peft_kit.targets import is_conv1d, is_quantized

_KEY = "eff-delta"
_KINDS = ("columns", "difference")


@dataclass(frozen=True)
class Delta:
    """What was trained.

    Args:
        kind: "columns" (new values) or "difference" (new minus old).
        columns: layer -> (index (r,), values (out, r, ...)).
        whole: name of a parameter -> its new value.
        bases: layer -> checksum of the columns that were not trained; empty: not checked.
        method: the method that trained it, for the metadata.
    """

    kind: str
    columns: Mapping[str, tuple[Tensor, Tensor]]
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    bases: Mapping[str, str] = field(default_factory=dict)
    method: str = ""

    @property
    def numbers(self) -> int:
        """How many numbers were trained."""
        return sum(values.numel() for _, values in self.columns.values()) + sum(
            value.numel() for value in self.whole.values()
        )


def matrix(layer: nn.Module) -> Tensor:
    """Return the layer's weight as (out, in, ...); a view where it is stored as (in, out)."""
    inner: Any = layer.layer if is_quantized(layer) else layer
    weight: Tensor = inner.weight.detach()
    return weight.t() if is_conv1d(inner) else weight


def base_checksum(weight: Tensor, index: Tensor) -> str:
    """Return a hash of the columns of a weight (out, in, ...) that are not in `index`."""
    kept = torch.ones(weight.shape[1], dtype=torch.bool)
    kept[index.cpu().long()] = False
    untouched = weight.detach().cpu()[:, kept].contiguous()
    return hashlib.blake2b(untouched.view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


def write_delta(path: Path, delta: Delta) -> dict[str, Any]:
    """Write a delta file; returns details for the report."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, (index, values) in delta.columns.items():
        tensors[f"{name}.index"] = index.to("cpu", torch.int32)
        tensors[f"{name}.{delta.kind}"] = values.detach().cpu()
    tensors |= {name: value.detach().cpu() for name, value in delta.whole.items()}
    head = {"kind": delta.kind, "method": delta.method, "bases": dict(delta.bases), "layers": list(delta.columns)}
    save_file(
        {name: value.contiguous().clone() for name, value in tensors.items()}, path, metadata={_KEY: json.dumps(head)}
    )
    return {"needs_base": True, "kind": delta.kind, "layers": len(delta.columns), "numbers": delta.numbers}


def read_delta(path: Path) -> Delta:
    """Read a delta file.

    Raises:
        ModelError: it cannot be read, or is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: truncated or no delta file ({error}); write it again") from error
    if not isinstance(head, dict) or head.get("kind") not in _KINDS:
        raise ModelError(f"{path}: is no delta file; eff writes one as model.delta")
    kind = head["kind"]
    try:
        columns = {name: (tensors.pop(f"{name}.index"), tensors.pop(f"{name}.{kind}")) for name in head["layers"]}
    except KeyError as error:
        raise ModelError(f"{path}: tensor {error} is missing; write it again") from error
    return Delta(kind, columns, tensors, head.get("bases", {}), head.get("method", ""))


def apply_delta(model: nn.Module, path: Path) -> Delta:
    """Put a delta onto its base model, in place; nothing changes when it does not fit.

    Raises:
        ModelError: the file is no delta, or belongs to another model.
    """
    delta = read_delta(path)
    _check_fit(model, delta, path)
    _write(model, delta, 1.0)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in delta.whole.items():
            parameters[name].copy_(value)
    return delta


def remove_delta(model: nn.Module, path: Path) -> None:
    """Take the columns of a delta out of a model again, up to rounding.

    Raises:
        ModelError: the file holds columns, not differences: the base's own columns are not known.
    """
    delta = read_delta(path)
    if delta.kind != "difference":
        raise ModelError(
            f"{path}: holds columns, not their difference to the base, so it cannot be taken out; "
            "start from the base model, or train with delta=difference"
        )
    _check_fit(model, delta, path)
    _write(model, delta, -1.0)


def _write(model: nn.Module, delta: Delta, sign: float) -> None:
    with torch.no_grad():
        for name, (index, values) in delta.columns.items():
            weight = matrix(model.get_submodule(name))
            place = index.to(weight.device, torch.long)
            new = values.to(weight.device)
            if delta.kind == "difference":
                new = weight[:, place].to(new.dtype) + sign * new
            weight[:, place] = new.to(weight.dtype)


def _check_fit(model: nn.Module, delta: Delta, path: Path) -> None:
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name, (index, values) in delta.columns.items():
        if name not in modules or not hasattr(modules[name], "weight"):
            raise ModelError(f"{path}: the model has no layer '{name}'; the delta belongs to another model")
        weight = matrix(modules[name])
        found, wanted = tuple(values.shape), (weight.shape[0], len(index), *weight.shape[2:])
        if found != wanted or int(index.max()) >= weight.shape[1] or int(index.min()) < 0:
            raise ModelError(
                f"{path}: '{name}' has columns of shape {found}, the model's weight is {tuple(weight.shape)}; "
                "the delta belongs to another model"
            )
        if name in delta.bases and base_checksum(weight, index) != delta.bases[name]:
            raise ModelError(
                f"{path}: the frozen part of '{name}' is not what the delta was trained on; use the same base model"
            )
    for name, value in delta.whole.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise ModelError(f"{path}: the model has no '{name}' of shape {tuple(value.shape)}")


def save_delta(path: Path, delta: Delta) -> None:
    """Write a delta file, whole or not at all."""
    with atomic_path(path) as temporary:
        write_delta(temporary, delta)
