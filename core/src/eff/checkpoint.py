"""Model files: writing eff's own, and reading foreign ones without ever running code from them.

What eff writes is a plain `torch.save` dictionary `{"eff": header, "state_dict": tensors}` that loads
under `weights_only=True`, or a safetensors file with the header in its metadata.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue, ValidationError
from torch import Tensor, nn

from eff.errors import ModelError
from eff.files import atomic_path
from eff.schemas import CheckpointHeader

HEADER = "eff"
SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt", ".safetensors", ".pt2")
_TRUST = "if you made this file yourself, add --trust-pickle"


@dataclass
class ModelFile:
    """What a model file holds: eff's header with tensors, bare tensors, or a whole module."""

    path: Path
    header: CheckpointHeader | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    module: nn.Module | None = None


def save_checkpoint(path: Path, header: CheckpointHeader, state: Mapping[str, Tensor]) -> None:
    """Write a self-describing checkpoint, whole or not at all.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_dictionary(path, {HEADER: header.model_dump(mode="json"), "state_dict": tensors})


def save_dictionary(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary of tensors and plain values with torch.save, whole or not at all."""
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch reports a full disk so
            raise OSError(str(error).splitlines()[0]) from error


def header_metadata(header: CheckpointHeader) -> dict[str, str]:
    """Return safetensors metadata that make a file self-describing."""
    return {HEADER: header.model_dump_json(), "format": "pt"}


def read_model_file(path: Path, trust_pickle: bool = False) -> ModelFile:
    """Read a checkpoint, a bare state dict, safetensors, or (only with `trust_pickle`) a pickled module.

    Raises:
        ModelError: missing, empty, truncated, no model file, a zip bomb, or it holds pickled code.
    """
    check_model_file(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".pt2":
        return _read_exported(path, trust_pickle)
    content = _torch_load(path, trust_pickle)
    if isinstance(content, nn.Module):
        return ModelFile(path, module=content)
    if not isinstance(content, Mapping):
        raise ModelError(f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict() instead")
    if HEADER in content:
        return ModelFile(path, _read_header(path, content[HEADER]), dict(content["state_dict"]))
    return ModelFile(path, state=bare_state(path, content))


def check_model_file(path: Path) -> None:
    """Raise when `path` can be seen not to be a usable model file; reads no tensors.

    Raises:
        ModelError: missing, a folder, empty, a truncated archive or a zip bomb.
    """
    if not path.exists():
        raise ModelError(f"{path}: there is no such file; name a model file, or a source such as zoo:digits_cnn")
    if path.is_dir():
        raise ModelError(f"{path}: is a folder without model.pt; name a model file or the folder of a finished run")
    if path.suffix == ".onnx":
        raise ModelError(f"{path}: ONNX is for onnxruntime; name the model.pt or packed file that it was made from")
    size = path.stat().st_size
    if size == 0:
        raise ModelError(f"{path}: the file is empty; write it again")
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic[:2] == b"PK":
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
        except zipfile.BadZipFile as error:
            raise ModelError(f"{path}: truncated or damaged ({error}); copy or write it again") from error
        if unpacked > 2 * size + (1 << 20):  # torch stores without compression
            raise ModelError(
                f"{path}: {size:,} bytes would unpack to {unpacked:,}; torch.save does not compress, so this is no model file"
            )


def _torch_load(path: Path, trust_pickle: bool) -> Any:
    with open(path, "rb") as file:
        start = file.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # neither an archive nor a pickle, so not torch.save's
        raise ModelError(f"{path}: is no model file; name what eff, torch.save or safetensors wrote")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles in other protocols; the error says it
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ModelError(
                f"{path}: holds pickled code ({found[1]}), which could run anything when loaded, so it was not loaded; "
                f"save model.state_dict() instead, or {_TRUST}"
            ) from error
        if "TorchScript" in str(error):
            raise ModelError(f"{path}: is a TorchScript archive; save model.state_dict() instead") from error
        raise ModelError(
            f"{path}: holds pickled objects or is damaged, so it was not loaded; save model.state_dict() instead, or {_TRUST}"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, ImportError, TypeError, OSError) as error:
        reason = "it is truncated, damaged or not torch.save's"
        if "TorchScript" in str(error):
            reason = "it is a TorchScript archive; save model.state_dict() instead"
        raise ModelError(f"{path}: not a readable model file: {reason}") from error


def _read_header(path: Path, content: Any) -> CheckpointHeader:
    try:
        return CheckpointHeader.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelError(
            f"{path}: its header does not fit this eff ({where}: {first['msg']}); update eff-core"
        ) from error


def bare_state(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a foreign checkpoint: unwraps `state_dict`/`model`, strips `module.`.

    Raises:
        ModelError: there are no tensors by name in it.
    """
    for wrapper in ("state_dict", "model_state_dict", "model"):
        inner = content.get(wrapper)
        if isinstance(inner, Mapping):
            content = inner
            break
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(f"{path}: holds no tensors by name; save model.state_dict() instead")
    if all(key.startswith("module.") for key in tensors):  # written by DataParallel
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _read_safetensors(path: Path) -> ModelFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: truncated or no safetensors file: {error}; write it again") from error
    if HEADER not in metadata:
        return ModelFile(path, state=state)
    try:
        content = json.loads(metadata[HEADER])
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: its header is no JSON ({error}); write it again") from error
    return ModelFile(path, _read_header(path, content), state)


def _read_exported(path: Path, trust_pickle: bool) -> ModelFile:
    if not trust_pickle:
        raise ModelError(
            f"{path}: a torch.export archive can hold pickled objects, which could run anything when loaded, "
            f"so it was not loaded; {_TRUST}"
        )
    try:
        return ModelFile(path, module=torch.export.load(path).module())
    except Exception as error:  # torch.export raises many types
        raise ModelError(f"{path}: torch.export cannot read it: {str(error).splitlines()[0]}") from error


def load_state(model: nn.Module, state: Mapping[str, Tensor], where: str, what: str) -> None:
    """Load `state` into `model`, exactly.

    Args:
        model: the architecture; where it has `own_name(key) -> str`, keys of files by others go through that first.
        state: tensors by name.
        where: the file, for the message.
        what: the architecture's name, for the message.

    Raises:
        ModelError: keys are missing, left over, or of another shape; the first few are named.
    """
    own = model.state_dict()
    rename = getattr(model, "own_name", None)
    if callable(rename) and not state.keys() <= own.keys():
        state = {rename(key): value for key, value in state.items()}
    # Files from before torch 0.4.1 lack the batch counters; they only matter to a cumulative average.
    missing = [key for key in own if key not in state and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"'{key}' is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and isinstance(own[key], Tensor) and state[key].shape != own[key].shape
    ]
    faults = [
        text
        for text in (_name("missing", missing), _name("not in the model", unexpected), "; ".join(shapes[:3]))
        if text
    ]
    if faults:
        raise ModelError(f"{where}: the weights do not fit {what}: {'; '.join(faults)}; name the right --arch")
    model.load_state_dict({**own, **state})


def _name(label: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{label}: {', '.join(repr(key) for key in keys[:3])}{more}"


def decode_state(file: ModelFile, decoder: Any) -> dict[str, Tensor]:
    """Return the state dict of a packed file, through the decoder its header names."""
    assert file.header is not None
    details: dict[str, JsonValue] = file.header.encoding_details
    try:
        decoded: dict[str, Tensor] = decoder(file.state, details)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"{file.path}: its packed tensors cannot be decoded: {error}; write it again") from error
    return decoded
