"""A compressed cache as a file: codes, parameters, positions and the tokens in float, with the text they come from.

safetensors; the metadata `zipcache` holds options, lengths and widths as JSON. `load_cache` gives a cache that decoding goes
on with as with the one that was saved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eff.errors import DataError
from eff_kernels.kv_quant import Codes, Part, QuantizedKV
from eff_quant_zipcache.cache import ZipCache, ZipLayer
from eff_quant_zipcache.config import ZipCacheConfig

_FLOAT = ("keys", "values", "queries", "present", "visible")
_CODES = ("packed", "scale", "low")


def save_cache(cache: ZipCache, input_ids: Tensor, path: Path) -> dict[str, Any]:
    """Write a cache and the ids (batch, tokens) that it holds; return its size for a report."""
    tensors: dict[str, Tensor] = {"input_ids": input_ids}
    layers = [_take_apart(layer, f"layers.{index}", tensors) for index, layer in enumerate(cache.layers)]
    described = {"config": cache.config.model_dump(mode="json"), "layers": layers}
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(stored, path, metadata={"zipcache": json.dumps(described)})
    return {
        "layers": len(layers),
        "tokens": input_ids.numel(),
        "cache_bytes": cache.nbytes,
        "compression_ratio": cache.compression_ratio(),
    }


def _take_apart(layer: ZipLayer, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    for held in _FLOAT:
        if getattr(layer, held) is not None:
            tensors[f"{name}.{held}"] = getattr(layer, held)
    segments = []
    for i, segment in enumerate(layer.segments):
        for which in ("key_channel", "value_channel"):
            if getattr(segment, which) is not None:
                tensors[f"{name}.{i}.{which}"] = getattr(segment, which)
        parts = []
        for j, part in enumerate(segment.parts):
            here = f"{name}.{i}.{j}"
            tensors[f"{here}.member"] = part.member
            if part.counts is not None:
                tensors[f"{here}.counts"] = part.counts
            for which, codes in (("keys", part.keys), ("values", part.values)):
                tensors |= {f"{here}.{which}.{item}": getattr(codes, item) for item in _CODES}
            parts.append([[codes.bits, codes.by_token] for codes in (part.keys, part.values)])
        segments.append({"length": segment.length, "dtype": str(segment.dtype).removeprefix("torch."), "parts": parts})
    return {"length": layer.length, "segments": segments}


def load_cache(path: Path, device: torch.device | str = "cpu") -> tuple[ZipCache, Tensor]:
    """Return the cache and the ids of a file that `save_cache` wrote.

    Raises:
        DataError: it is no such file.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            described = json.loads((file.metadata() or {})["zipcache"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        cache = ZipCache(ZipCacheConfig.model_validate(described["config"]), len(described["layers"]))
        for index, (layer, parts) in enumerate(zip(cache.layers, described["layers"], strict=True)):
            _put_together(layer, parts, f"layers.{index}", tensors)
        return cache, tensors["input_ids"]
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise DataError(
            f"{path}: is no cache that quant_zipcache wrote ({error}); write one by --export kvcache"
        ) from error


def _put_together(layer: ZipLayer, described: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> None:
    layer.lazy_initialization(tensors[f"{name}.keys"], tensors[f"{name}.values"])
    for held in _FLOAT:
        setattr(layer, held, tensors.get(f"{name}.{held}"))
    layer.length = int(described["length"])
    for i, segment in enumerate(described["segments"]):
        parts = []
        for j, kinds in enumerate(segment["parts"]):
            here = f"{name}.{i}.{j}"
            codes = [
                Codes(bits, *(tensors[f"{here}.{which}.{item}"] for item in _CODES), by_token)
                for which, (bits, by_token) in zip(("keys", "values"), kinds, strict=True)
            ]
            parts.append(Part(codes[0], codes[1], tensors[f"{here}.member"], tensors.get(f"{here}.counts")))
        channels = [tensors.get(f"{name}.{i}.{which}") for which in ("key_channel", "value_channel")]
        dtype = getattr(torch, segment["dtype"])
        layer.segments.append(QuantizedKV(tuple(parts), channels[0], channels[1], dtype, int(segment["length"])))
