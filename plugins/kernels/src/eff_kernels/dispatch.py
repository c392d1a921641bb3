"""Which implementation of an op runs: one mechanism for all ops.

`EFF_KERNELS` forces a path (reference, cpu, triton); "auto" or unset chooses by device and dtype.
"""

from __future__ import annotations

import functools
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
        ValueError: EFF_KERNELS holds an unknown word, or forces triton where no kernel can run.
    """
    return _choose(os.environ.get("EFF_KERNELS", "auto"), device.type, dtype)


@functools.cache
def _choose(wanted: str, device_type: str, dtype: torch.dtype) -> Choice:
    """Return the path for EFF_KERNELS=`wanted`; kept, because ops on small tensors ask every time."""
    if wanted == "triton":
        _check_triton_can_run(device_type, dtype)
    if wanted in PATHS:
        return Choice(wanted, f"EFF_KERNELS={wanted}")
    if wanted != "auto":
        raise ValueError(f"EFF_KERNELS is '{wanted}'; it must be one of auto, {', '.join(PATHS)}")
    if device_type == "cpu":
        return Choice("cpu", "CPU tensor")
    if device_type == "cuda" and dtype in TRITON_DTYPES:
        if has_triton():
            return Choice("triton", f"CUDA tensor of {dtype}")
        return Choice("reference", "CUDA tensor, but triton does not import")
    return Choice("reference", f"no kernel for {dtype} on {device_type}")


def _check_triton_can_run(device_type: str, dtype: torch.dtype) -> None:
    """Raise ValueError when a forced Triton kernel would fail with an obscure error."""
    if not has_triton():
        raise ValueError("EFF_KERNELS=triton, but triton is not installed; use auto, reference or cpu")
    if dtype not in TRITON_DTYPES:
        raise ValueError(f"EFF_KERNELS=triton, but there is no Triton kernel for {dtype}; use auto or reference")
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "EFF_KERNELS=triton, but the tensor is on the CPU; set TRITON_INTERPRET=1 to interpret the kernels"
        )


def has_triton() -> bool:
    """Whether the triton package imports."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
