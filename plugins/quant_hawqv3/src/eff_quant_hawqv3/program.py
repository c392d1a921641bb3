"""The network as a program of integers: a list of steps and their tensors, in one safetensors file.

The metadata key "program" holds JSON: `steps` in their order (op, out, in, options), `input`, `output`, the output's scale,
and for each packed weight its shape. Tensors are named STEP.KEY; weights of 4 bits are packed two to a byte, low one first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eff_kernels.packing import pack_bits
from eff_quant_hawqv3.network import Integers, Network

VERSION = 1


class Recorder(Integers):
    """Writes the operations down instead of carrying them out; a value is its name."""

    def __init__(self, net: Network):
        super().__init__(net)
        self.steps: list[dict[str, Any]] = []
        self.tensors: dict[str, NDArray[Any]] = {}

    def emit(self, op: str, out: str, inputs: list[Any], **options: Any) -> str:
        """Record one operation."""
        step: dict[str, Any] = {"op": op, "out": out, "in": inputs}
        if op == "layer":
            layer = options.pop("layer")
            step["bits"] = layer.bits
            step["conv"] = None if layer.conv is None else {**layer.conv}
        for key, value in options.items():
            if key in ("m", "e", "weight", "bias") or (op == "clip" and value is not None):
                array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
                kind = {"e": np.uint8, "weight": np.int8, "bias": np.int32, "m": np.int32}.get(key, np.int64)
                self.tensors[f"{out}.{key}"] = np.ascontiguousarray(array.astype(kind))
            elif isinstance(value, torch.Tensor):
                step[key] = float(value)
            else:
                step[key] = value
        self.steps.append(step)
        return out


def compile_program(net: Network) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the program (JSON values) and its integer tensors.

    Raises:
        RunError: a range is missing, or sums would not fit.
    """
    recorder = Recorder(net)
    with torch.no_grad():
        output = recorder.run("input")
    head = {
        "version": VERSION,
        "rounding": net.config.rounding,
        "steps": recorder.steps,
        "output": output.x,
        "output_scale": output.scale.reshape(-1).tolist(),
    }
    return json.loads(json.dumps(head)), recorder.tensors


def write_program(net: Network, path: Path) -> dict[str, Any]:
    """Write the program and return what it holds, for the artifact's details."""
    from safetensors.numpy import save_file

    program, tensors = compile_program(net)
    stored = dict(tensors)
    packed: dict[str, list[int]] = {}
    for step in program["steps"]:
        if step["op"] == "layer" and step["bits"] == 4:
            key = f"{step['out']}.weight"
            packed[key] = list(stored[key].shape)
            stored[key] = pack_bits(torch.from_numpy(stored[key].astype(np.int64)) + 8, 4).numpy()
    program["packed"] = packed
    save_file(stored, path, metadata={"format": "eff-hawqv3", "program": json.dumps(program)})
    weights = sum(value.nbytes for key, value in stored.items() if key.endswith(".weight"))
    layers = sum(step["op"] == "layer" for step in program["steps"])
    return {"weight_bytes": weights, "steps": len(program["steps"]), "layers": layers}
