"""The packed file: weights as bit-packed integers in safetensors, everything else as it is.

Per packed weight the header's details hold bits (by channel where they differ), smallest level, shape, channel axis and,
for levels that are not evenly spaced, the table of their values; scale and offset are the weight quantizer's own. Batch-norm counters are kept, so the file restores the whole model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eff.checkpoint import header_metadata
from eff.exporting import make_header
from eff.run import Run
from eff_kernels.packing import pack_bits, unpack_bits
from eff_quant_kit.layers import quant_layers
from eff_quant_kit.quantizer import Quantizer, integer_range

ENCODING = "quant-packed"


def pack_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of the packed file and the details that `unpack_state` needs."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    details: dict[str, Any] = {}
    for name, layer in quant_layers(model).items():
        quantizer = layer.weight_quantizer
        if quantizer is None:
            continue
        key = f"{name}.layer.weight"
        weight = state[key]
        levels = quantizer.levels(layer.layer.weight).cpu()  # type: ignore[arg-type]
        state[key] = _packed(levels, quantizer)
        details[key] = {
            "bits": quantizer.bits,
            "q_min": quantizer.q_min,
            "shape": list(weight.shape),
            "axis": quantizer.axis,
            "scale": f"{name}.weight_quantizer.scale",
            "offset": None if quantizer.offset is None else f"{name}.weight_quantizer.offset",
            "dtype": str(weight.dtype).removeprefix("torch."),
        }
        if quantizer.channel_bits is not None:
            details[key] |= {"channel_bits": list(quantizer.channel_bits), "signed": quantizer.signed}
        if (table := getattr(quantizer, "table", None)) is not None:
            details[key]["table"] = table.tolist()
    return state, details


def _packed(levels: Tensor, quantizer: Quantizer) -> Tensor:
    """Return the bytes of a weight's levels; where channels differ in bits, those of 2 bits first, then 3, and so on."""
    if quantizer.channel_bits is None:
        return pack_bits(levels - quantizer.q_min, quantizer.bits)
    bits = torch.tensor(quantizer.channel_bits)
    parts = [pack_bits(levels[bits == b] - integer_range(b, quantizer.signed)[0], b) for b in bits.unique().tolist()]
    return torch.cat(parts)


def _levels(packed: Tensor, item: dict[str, Any]) -> Tensor:
    """Undo `_packed`."""
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


def unpack_state(tensors: dict[str, Tensor], details: dict[str, Any]) -> dict[str, Tensor]:
    """Return a state dict with the weights as levels times scale.

    Quantizing these weights again gives the same levels, so predictions are those of the original.

    Raises:
        KeyError, ValueError: the file does not fit its header.
    """
    state = dict(tensors)
    for key, item in details.items():
        shape, levels = item["shape"], _levels(tensors[key], item)
        spread = [-1 if index == item["axis"] else 1 for index in range(len(shape))] if item["axis"] is not None else []
        values = torch.tensor(item["table"])[(levels - item["q_min"]).long()] if "table" in item else levels
        weight = values * tensors[item["scale"]].view(spread)
        if item.get("offset"):
            weight = weight + tensors[item["offset"]].view(spread)
        state[key] = weight.to(getattr(torch, item["dtype"]))
    return state


def write_packed(model: nn.Module, path: Path, run: Run) -> dict[str, Any]:
    """Write the packed file and return details for the artifact: sizes in bytes."""
    from safetensors.torch import save_file

    state, details = pack_state(model)
    header = make_header(run, encoding=ENCODING, encoding_details=details)
    save_file({key: value.clone() for key, value in state.items()}, path, metadata=header_metadata(header))
    return {**sizes(model), "layers": len(details)}


def sizes(model: nn.Module) -> dict[str, int]:
    """Return the bytes of the packed weights, of the scales and offsets, and of everything else."""
    state, details = pack_state(model)
    quantizers = {f"{name}." for name, module in model.named_modules() if isinstance(module, Quantizer)}
    codes = sum(state[key].numel() for key in details)
    scales = rest = 0
    for key, value in state.items():
        if key in details:
            continue
        bytes_ = value.numel() * value.element_size()
        if any(key.startswith(prefix) for prefix in quantizers):
            scales += bytes_
        else:
            rest += bytes_
    return {"code_bytes": codes, "scale_bytes": scales, "other_bytes": rest}
