"""The file of a task: a header, then for each layer its codes and two float32, then the float head.

    codes: 8 / b a byte, the first weight in the lowest bits, rows one after the other; then mean and deviation
    float adapters (b = 32): the weights in float32; head: weight, then bias, float32, unless it is binary

All numbers are little-endian. The header is JSON behind a magic word and its length: version, names, shapes, bits, scale,
and a fingerprint of the frozen model.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eff.errors import RequestError
from eff_kernels.packing import pack_bits, unpack_bits
from eff_quant_biadapter.config import BiAdapterConfig
from eff_quant_biadapter.insert import PLUGIN, adapter_layers
from eff_quant_biadapter.qlinear import QLinear

MAGIC = b"eff-biadapter\n"
VERSION = 1


def layer_bytes(layer: QLinear) -> int:
    """Return the bytes of a layer: numel b / 8 and two float32; 4 a weight of a float one."""
    count = layer.weight.numel()
    return 4 * count if layer.bits == 32 else math.ceil(count * layer.bits / 8) + 8


def head_tensors(model: nn.Module, head: str) -> dict[str, Tensor]:
    """Return weight and bias of a float head by name; empty for a binary one."""
    module = model.get_submodule(head)
    if isinstance(module, QLinear):
        return {}
    return {f"{head}.{name}": value.detach() for name, value in module.named_parameters()}


def payload_bytes(model: nn.Module, head: str) -> int:
    """Return the bytes of the file behind its header."""
    return sum(layer_bytes(layer) for layer in adapter_layers(model).values()) + sum(
        4 * value.numel() for value in head_tensors(model, head).values()
    )


def fingerprint(model: nn.Module, head: str) -> str:
    """Return a hash of the frozen model's names, shapes and values; without adapters and head."""
    own = {f"{name}.{part}" for name in adapter_layers(model) for part in ("weight", "fixed")}
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name in own or name.startswith(f"{head}."):
            continue
        digest.update(f"{_base_name(name)} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else b"")
    return digest.hexdigest()[:16]


def _base_name(name: str) -> str:
    return name.replace(".layer.", ".")


def dump(model: nn.Module, head: str, config: BiAdapterConfig) -> bytes:
    """Return the file's bytes."""
    layers, floats = adapter_layers(model), head_tensors(model, head)
    header = {
        "version": VERSION, "bits": config.bits, "codebook": config.codebook, "scale": config.scale, "head": head,
        "placement": config.placement, "base": fingerprint(model, head),
        "layers": {name: [*layer.weight.shape, layer.bits] for name, layer in layers.items()},
        "floats": {name: list(value.shape) for name, value in floats.items()},
    }  # fmt: skip
    text = json.dumps(header).encode()
    parts = [MAGIC, len(text).to_bytes(4, "little"), text]
    for layer in layers.values():
        if layer.bits == 32:
            parts.append(_floats(layer.weight.detach()))
        else:
            codes, mu, sd = layer.parts()
            parts += [pack_bits(codes.cpu(), layer.bits).numpy().tobytes(), _floats(torch.stack([mu.cpu(), sd.cpu()]))]
    parts += [_floats(value) for value in floats.values()]
    return b"".join(parts)


def _floats(value: Tensor) -> bytes:
    return value.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes()


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return header and payload of a file.

    Raises:
        RequestError: it cannot be read, or is no such file.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{PLUGIN}: cannot read {path}: {error.strerror}") from error
    if not raw.startswith(MAGIC):
        raise RequestError(f"{PLUGIN}: {path} is no adapter file; one is written by eff apply quant_biadapter")
    start = len(MAGIC) + 4
    size = int.from_bytes(raw[len(MAGIC) : start], "little")
    try:
        header = json.loads(raw[start : start + size])
        if header["version"] != VERSION:
            raise RequestError(f"{PLUGIN}: {path} has version {header['version']}, this reads {VERSION}")
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{PLUGIN}: the header of {path} is damaged") from error
    return header, raw[start + size :]


def load(model: nn.Module, path: Path, head: str, config: BiAdapterConfig) -> None:
    """Put a file's weights into a model with fresh adapters; they are decoded once and then computed with as they are.

    Raises:
        RequestError: the file is of another model, other options or another length; nothing has been changed.
    """
    header, payload = read_header(path)
    layers, floats = adapter_layers(model), head_tensors(model, head)
    for key in ("bits", "codebook", "scale", "placement"):
        if header[key] != getattr(config, key):
            raise RequestError(f"{PLUGIN}: {path} has {key}={header[key]}; give -o {key}={header[key]}")
    expected = {name: [*layer.weight.shape, layer.bits] for name, layer in layers.items()}
    shapes = {name: list(value.shape) for name, value in floats.items()}
    if header["layers"] != expected or header["floats"] != shapes:
        different = [n for n in {**expected, **header["layers"]} if header["layers"].get(n) != expected.get(n)]
        different += [n for n in {**shapes, **header["floats"]} if header["floats"].get(n) != shapes.get(n)]
        raise RequestError(f"{PLUGIN}: {path} does not fit the model at {different[0]}: other sizes, classes or layers")
    if len(payload) != payload_bytes(model, head):
        raise RequestError(
            f"{PLUGIN}: {path} has {len(payload)} bytes of weights, expected {payload_bytes(model, head)}"
        )
    if header["base"] != fingerprint(model, head):
        raise RequestError(f"{PLUGIN}: {path} was trained on another base model (or on other weights of it)")
    place = 0

    def take(count: int) -> bytes:
        nonlocal place
        place += count
        return payload[place - count : place]

    new: list[tuple[Tensor, Tensor]] = []
    fixed: list[tuple[QLinear, Tensor]] = []
    for name, layer in layers.items():
        shape = layer.weight.shape
        if layer.bits == 32:
            new.append((layer.weight, _read(take(4 * shape.numel())).view(shape)))
            continue
        packed = torch.from_numpy(np.frombuffer(take(math.ceil(shape.numel() * layer.bits / 8)), np.uint8).copy())
        mu, sd = _read(take(8))
        if not bool(sd > 0):
            raise RequestError(f"{PLUGIN}: {path} holds a deviation of {float(sd):g} for {name}; the file is damaged")
        codes = unpack_bits(packed, layer.bits, shape.numel()).long().view(shape)
        new.append((layer.weight, layer.decoded(codes, mu, sd)))
        fixed.append((layer, torch.stack([mu, sd])))
    state = dict(model.named_parameters())
    new += [(state[name], _read(take(4 * value.numel())).view(value.shape)) for name, value in floats.items()]
    with torch.no_grad():
        for parameter, value in new:
            parameter.copy_(value)
    for layer, pair in fixed:
        layer.fixed.copy_(pair)


def _read(raw: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(raw, "<f4").copy())
