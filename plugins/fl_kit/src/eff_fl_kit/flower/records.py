"""Tensors in Flower's records and back, without changing a bit."""

from __future__ import annotations

import torch
from flwr.app import Array, ArrayRecord

from eff_fl_kit.protocol import State

_AS_INTEGERS = ":bfloat16"
"""Ends the name of a tensor whose type numpy does not have; it travels as int16."""


def to_record(tensors: State) -> ArrayRecord:
    """Return a record with the tensors' values."""
    arrays = {}
    for name, value in tensors.items():
        plain = value.detach().cpu().contiguous()
        if plain.dtype == torch.bfloat16:
            name, plain = name + _AS_INTEGERS, plain.view(torch.int16)
        arrays[name] = Array(plain.numpy())
    return ArrayRecord(arrays)


def from_record(record: ArrayRecord, device: torch.device) -> State:
    """Return the tensors of `to_record` on `device`."""
    tensors = {}
    for name, array in record.items():
        value = torch.from_numpy(array.numpy().copy())
        if name.endswith(_AS_INTEGERS):
            name, value = name.removesuffix(_AS_INTEGERS), value.view(torch.bfloat16)
        tensors[name] = value.to(device)
    return tensors
