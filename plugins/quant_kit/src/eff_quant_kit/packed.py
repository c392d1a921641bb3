"""The packed file: weights as bit-packed integers in safetensors, everything else as it is.

What is packed says so itself: a module with a method `packed(prefix)` returns, by key of the state dict, the bytes that
replace it, JSON details with a "kind" that names the decoder, and tables (scales, codebooks) in the dtype of the file.

    levels      integers times a scale; bits (by channel where they differ), smallest level, shape, channel axis and, for
                levels that are not evenly spaced, the table of their values. What QuantLayer holds.
    fixed       signed integers times a power of two, 2 to 32 bits each; where many are 0, a bit per place and the others.
    codebook    indices of codewords, ceil(log2 k) bits each, and their codebooks in float16
    scales      scales of several quantizers in one entry; 0 where one is not initialised
    norms       sets of a batch norm in one entry, each as a factor and a summand by channel (S, 2, C)

Batch norms that are packed so come back without their statistics: the same function, but not one to train on. Others are kept
with their counters, so the file restores the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eff.checkpoint import header_metadata
from eff.exporting import make_header
from eff.run import Run
from eff.schemas import Metric
from eff_kernels.codebook_matmul import pack_codes
from eff_kernels.packing import pack_bits, unpack_bits
from eff_quant_kit.codebooks import pack_indices, unpack_indices
from eff_quant_kit.layers import QuantLayer, quant_layers
from eff_quant_kit.quantizer import Quantizer, integer_range

ENCODING = "quant-packed"


@dataclass(frozen=True)
class Packed:
    """What the file holds instead of one entry of the state dict."""

    data: Tensor
    """uint8 vector; of scales and norms, floats."""
    details: dict[str, Any]
    """JSON values; "kind" names the decoder in `DECODERS`."""
    tables: dict[str, Tensor] = field(default_factory=dict)
    """Entries of the state dict, by their full key, that the file holds in another dtype; counted with the scales."""
    replaces: tuple[str, ...] = ()
    """Other entries of the state dict that `data` holds too; the file leaves them out."""


def packed_codes(codes: Tensor, k: int, tables: dict[str, Tensor], op_bits: int | None = None) -> Packed:
    """Return how codes (any shape, integers below k) are packed; the tables, by full key, become float16.

    For equal predictions the model must compute with tables that float16 holds: `in_half_precision`. With `op_bits` the
    entry of the state dict is what `eff_kernels.codebook_matmul.pack_codes` makes of the codes, else the codes.

    Raises:
        ValueError: a table does not fit float16.
    """
    for key, table in tables.items():
        if not bool(torch.isfinite(table.half()).all()):
            raise ValueError(f"'{key}' holds values beyond float16")
    details: dict[str, Any] = {
        "kind": "codebook",
        "k": k,
        "shape": list(codes.shape),
        "dtype": _name(codes.dtype),
        "tables": {key: _name(table.dtype) for key, table in tables.items()},
    }
    if op_bits is not None:
        details["op_bits"] = op_bits
    halves = {key: table.detach().half().cpu().contiguous() for key, table in tables.items()}
    return Packed(pack_indices(codes.detach().cpu(), k), details, halves)


def packed_fixed(codes: Tensor, bits: int, exponent: int, dtype: torch.dtype) -> Packed:
    """Return how signed integers of `bits` bits (any shape), worth codes * 2^exponent, are packed; they become `dtype`.

    Raises:
        ValueError: a code does not fit.
    """
    codes = codes.detach().cpu().long()
    details = {"kind": "fixed", "bits": bits, "exponent": exponent, "shape": list(codes.shape), "dtype": _name(dtype)}
    lifted, kept = codes.flatten() + 2 ** (bits - 1), codes.flatten() != 0
    if int(kept.sum()) * bits + kept.numel() < kept.numel() * bits:  # a bit for each place and the codes that are not 0
        details["nonzero"] = int(kept.sum())
        return Packed(torch.cat([pack_bits(kept.int(), 1), pack_indices(lifted[kept], 2**bits)]), details)
    return Packed(pack_indices(lifted, 2**bits), details)


def packed_scales(quantizers: nn.ModuleDict, prefix: str) -> dict[str, Packed]:
    """Return how the scales, 0-dim, of `quantizers`, whose keys begin with `prefix`, are one entry."""
    scales = [q.scale.detach() * q.initialised for q in quantizers.values()]  # type: ignore[union-attr, operator]
    keys = [f"{prefix}{name}.{entry}" for name in quantizers for entry in ("scale", "initialised")]
    details = {"kind": "scales", "prefix": prefix, "names": list(quantizers)}
    return {keys[0]: Packed(torch.stack(scales).cpu(), details, replaces=tuple(keys[1:]))}


def packed_norms(norms: nn.ModuleDict, sets: Tensor, prefix: str) -> dict[str, Packed]:
    """Return how batch norms, whose keys begin with `prefix`, are the one entry `sets` (S, 2, C) of factors and summands."""
    first: Any = next(iter(norms.values()))
    keys = [f"{prefix}{name}.{entry}" for name, norm in norms.items() for entry in norm.state_dict()]
    details = {
        "kind": "norms",
        "prefix": prefix,
        "names": list(norms),
        "eps": first.eps,
        "dtype": _name(first.weight.dtype),
    }
    return {keys[0]: Packed(sets.detach().cpu().contiguous(), details, replaces=tuple(keys[1:]))}


def in_half_precision(table: Tensor) -> Tensor:
    """Return `table` rounded to what float16 holds, in its own dtype."""
    return table.half().to(table.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def packed_parts(model: nn.Module) -> dict[str, Packed]:
    """Return what the modules of `model` pack, by key of the state dict; a shared module comes once."""
    parts: dict[str, Packed] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, QuantLayer):
            parts |= _packed_levels(module, prefix)
        elif callable(pack := getattr(module, "packed", None)):
            parts |= pack(prefix)
    return parts


def pack_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of the packed file and the details that `unpack_state` needs."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    details: dict[str, Any] = {}
    for key, part in packed_parts(model).items():
        state = {name: value for name, value in state.items() if name not in part.replaces}
        state |= {key: part.data, **part.tables}
        details[key] = part.details
    return state, details


def _packed_levels(layer: QuantLayer, prefix: str) -> dict[str, Packed]:
    quantizer = layer.weight_quantizer
    if quantizer is None:
        return {}
    weight: Tensor = layer.layer.weight  # type: ignore[assignment]
    details = {
        "kind": "levels",
        "bits": quantizer.bits,
        "q_min": quantizer.q_min,
        "shape": list(weight.shape),
        "axis": quantizer.axis,
        "scale": f"{prefix}weight_quantizer.scale",
        "offset": None if quantizer.offset is None else f"{prefix}weight_quantizer.offset",
        "dtype": _name(weight.dtype),
    }
    if quantizer.channel_bits is not None:
        details |= {"channel_bits": list(quantizer.channel_bits), "signed": quantizer.signed}
    if (table := getattr(quantizer, "table", None)) is not None:
        details["table"] = table.tolist()
    return {f"{prefix}layer.weight": Packed(_bytes(quantizer.levels(weight).cpu(), quantizer), details)}


def _bytes(levels: Tensor, quantizer: Quantizer) -> Tensor:
    """Return the bytes of a weight's levels; where channels differ in bits, those of 2 bits first, then 3, and so on."""
    if quantizer.channel_bits is None:
        return pack_bits(levels - quantizer.q_min, quantizer.bits)
    bits = torch.tensor(quantizer.channel_bits)
    parts = [pack_bits(levels[bits == b] - integer_range(b, quantizer.signed)[0], b) for b in bits.unique().tolist()]
    return torch.cat(parts)


def _levels(packed: Tensor, item: dict[str, Any]) -> Tensor:
    """Undo `_bytes`."""
    shape = torch.Size(item["shape"])
    if "channel_bits" not in item:
        return unpack_bits(packed, item["bits"], shape.numel()).view(shape) + item["q_min"]
    bits = torch.tensor(item["channel_bits"])
    levels = torch.empty(shape, dtype=torch.int32)
    start = 0
    for b in bits.unique().tolist():
        count = int((bits == b).sum()) * shape[1:].numel()
        size = -(-count * b // 8)
        part = unpack_bits(packed[start : start + size], b, count).view(-1, *shape[1:])
        levels[bits == b] = part.to(torch.int32) + integer_range(b, item["signed"])[0]
        start += size
    return levels


def _decode_levels(tensors: dict[str, Tensor], key: str, item: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weight as levels times scale; quantizing it again gives the same levels."""
    shape, levels = item["shape"], _levels(tensors[key], item)
    spread = [-1 if index == item["axis"] else 1 for index in range(len(shape))] if item["axis"] is not None else []
    values = torch.tensor(item["table"])[(levels - item["q_min"]).long()] if "table" in item else levels
    weight = values * tensors[item["scale"]].view(spread)
    if item.get("offset"):
        weight = weight + tensors[item["offset"]].view(spread)
    return {key: weight.to(getattr(torch, item["dtype"]))}


def _decode_codebook(tensors: dict[str, Tensor], key: str, item: dict[str, Any]) -> dict[str, Tensor]:
    """Return the codes as integers and the tables in their own dtype."""
    shape = torch.Size(item["shape"])
    codes = unpack_indices(tensors[key], item["k"], shape.numel()).view(shape)
    tables = {name: tensors[name].to(getattr(torch, dtype)) for name, dtype in item["tables"].items()}
    found = pack_codes(codes, item["op_bits"]) if "op_bits" in item else codes.to(getattr(torch, item["dtype"]))
    return {key: found, **tables}


def _decode_fixed(tensors: dict[str, Tensor], key: str, item: dict[str, Any]) -> dict[str, Tensor]:
    """Return the integers times their power of two."""
    shape, bits = torch.Size(item["shape"]), item["bits"]
    if "nonzero" in item:
        places = -(-shape.numel() // 8)
        kept = unpack_bits(tensors[key][:places], 1, shape.numel()).bool()
        found = unpack_indices(tensors[key][places:], 2**bits, item["nonzero"]) - 2 ** (bits - 1)
        codes = torch.zeros(shape.numel(), dtype=torch.int64).masked_scatter_(kept, found).view(shape)
    else:
        codes = unpack_indices(tensors[key], 2**bits, shape.numel()).view(shape) - 2 ** (bits - 1)
    return {key: torch.ldexp(codes.double(), torch.tensor(item["exponent"])).to(getattr(torch, item["dtype"]))}


def _decode_scales(tensors: dict[str, Tensor], key: str, item: dict[str, Any]) -> dict[str, Tensor]:
    """Return the scales one by one, with whether they are initialised."""
    found = {}
    for name, scale in zip(item["names"], tensors[key], strict=True):
        known = scale > 0
        found[f"{item['prefix']}{name}.scale"] = torch.where(known, scale, torch.ones_like(scale))
        found[f"{item['prefix']}{name}.initialised"] = known
    return found


def _decode_norms(tensors: dict[str, Tensor], key: str, item: dict[str, Any]) -> dict[str, Tensor]:
    """Return sets whose statistics are mean 0 and deviation 1, so that they multiply and add alone."""
    found = {}
    for name, (factor, summand) in zip(item["names"], tensors[key].to(getattr(torch, item["dtype"])), strict=True):
        entries = {
            "weight": factor,
            "bias": summand,
            "running_mean": torch.zeros_like(factor),
            "running_var": torch.full_like(factor, 1 - item["eps"]),
            "num_batches_tracked": torch.zeros((), dtype=torch.int64),
        }
        found |= {f"{item['prefix']}{name}.{entry}": value.clone() for entry, value in entries.items()}
    return found


DECODERS: dict[str, Callable[[dict[str, Tensor], str, dict[str, Any]], dict[str, Tensor]]] = {
    "levels": _decode_levels,
    "fixed": _decode_fixed,
    "codebook": _decode_codebook,
    "scales": _decode_scales,
    "norms": _decode_norms,
}
"""Kind -> function(tensors of the file, key, details of that key) -> entries of the state dict."""


def unpack_state(tensors: dict[str, Tensor], details: dict[str, Any]) -> dict[str, Tensor]:
    """Return the state dict of a packed file; predictions are those of the model that was packed.

    Raises:
        KeyError, ValueError: the file does not fit its header.
    """
    state = dict(tensors)
    for key, item in details.items():
        kind = item.get("kind", "levels")
        if kind not in DECODERS:
            raise ValueError(f"'{key}' is packed as '{kind}', which is none of {', '.join(DECODERS)}")
        state |= DECODERS[kind](tensors, key, item)
    return state


def write_packed(model: nn.Module, path: Path, run: Run) -> dict[str, Any]:
    """Write the packed file and return details for the artifact: sizes in bytes."""
    from safetensors.torch import save_file

    state, details = pack_state(model)
    header = make_header(run, encoding=ENCODING, encoding_details=details)
    save_file({key: value.clone() for key, value in state.items()}, path, metadata=header_metadata(header))
    return {**sizes(model), "layers": len(details)}


def sizes(model: nn.Module) -> dict[str, int]:
    """Return the bytes of the codes, of scales, offsets and codebooks, and of everything else."""
    parts, (state, _) = packed_parts(model), pack_state(model)
    quantizers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Quantizer))
    tables = {key for part in parts.values() for key in part.tables}
    codes = scales = rest = 0
    for key, value in state.items():
        bytes_ = value.numel() * value.element_size()
        kind = parts[key].details["kind"] if key in parts else ""
        if kind in ("levels", "fixed", "codebook"):
            codes += bytes_
        elif key in tables or (quantizers and key.startswith(quantizers)):
            scales += bytes_
        else:
            rest += bytes_
    return {"code_bytes": codes, "scale_bytes": scales, "other_bytes": rest}


def size_metrics(model: nn.Module) -> dict[str, Metric]:
    """Return what every method says of size: bits per weight of the quantized layers (32 in float), bytes of the file."""
    counts = [(layer.weight_bits, layer.layer.weight.numel()) for layer in quant_layers(model).values()]  # type: ignore[union-attr,operator]
    values = {"packed_bytes": Metric(value=sum(sizes(model).values()), unit="B", better="lower")}
    if weights := sum(count for _, count in counts):
        mean = sum(bits * count for bits, count in counts) / weights
        values = {"mean_weight_bits": Metric(value=mean, unit="bits", better="lower"), **values}
    return values
