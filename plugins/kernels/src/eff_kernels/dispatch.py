"""Which implementation of an op runs: one mechanism for all ops.

`EFF_KERNELS` forces a path (reference, cpu, triton); "auto" or unset chooses by device and dtype.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

PATHS = ("reference", "cpu", "triton")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """The path an op takes and why, for `eff bench-kernels --explain`."""

    path: str
    reason: str


def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """Return the path for a tensor's device and dtype.

    Raises:
        ValueError: EFF_KERNELS holds an unknown word.
    """
    wanted = os.environ.get("EFF_KERNELS", "auto")
    if wanted in PATHS:
        return Choice(wanted, f"EFF_KERNELS={wanted}")
    if wanted != "auto":
        raise ValueError(f"EFF_KERNELS is '{wanted}'; it must be one of auto, {', '.join(PATHS)}")
    if device.type == "cpu":
        return Choice("cpu", "CPU tensor")
    if device.type == "cuda" and dtype in TRITON_DTYPES:
        if has_triton():
            return Choice("triton", f"CUDA tensor of {dtype}")
        return Choice("reference", "CUDA tensor, but triton does not import")
    return Choice("reference", f"no kernel for {dtype} on {device.type}")


def has_triton() -> bool:
    """Whether the triton package imports."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
