"""Which implementation of an op runs: one mechanism for all ops.

An op is a package `eff_kernels.<name>` with the modules `reference`, `cpu` and `triton_kernel`, whose functions have the
same names and arguments. `EFF_KERNELS` forces one (reference, cpu, triton); "auto", empty or unset chooses by device and
dtype. What has one implementation only (packing a cache, a product that keeps nothing) looks at it all the same.
Where one of them has several ways (by shape), it chooses itself and says which in the benchmark's `Choice`.
"""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass, replace
from types import ModuleType

import torch

MODULES = {"reference": "reference", "cpu": "cpu", "triton": "triton_kernel"}
PATHS = tuple(MODULES)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """The path an op takes and why, for `eff bench-kernels --explain`."""

    path: str
    reason: str

    def by(self, way: str) -> Choice:
        """Return the choice with the way that the path takes for a shape, e.g. "channels_last convolution"."""
        return replace(self, reason=f"{self.reason}; {way}")


@dataclass(frozen=True)
class Op:
    """An op of this package.

    Args:
        name: the package below `eff_kernels`.
        dtypes: what its Triton kernels take, of the tensor that decides.
        without_kernel: the path off the CPU where no kernel can run; "cpu" where that one suits other devices better.
    """

    name: str
    dtypes: tuple[torch.dtype, ...] = TRITON_DTYPES
    without_kernel: str = "reference"

    def choose(self, x: torch.Tensor) -> Choice:
        """Return the path for the tensor that decides.

        Raises:
            ValueError: EFF_KERNELS holds an unknown word, or forces triton where no kernel can run.
        """
        return _choose(self, requested(), x.device.type, x.dtype)

    def implementation(self, x: torch.Tensor) -> ModuleType:
        """Return the module that runs for this tensor."""
        return _module(self.name, self.choose(x).path)


def requested() -> str:
    """Return the word of EFF_KERNELS, "auto" where it is empty or unset.

    Raises:
        ValueError: it is none that there is.
    """
    wanted = os.environ.get("EFF_KERNELS") or "auto"
    if wanted != "auto" and wanted not in PATHS:
        raise ValueError(f"EFF_KERNELS is '{wanted}'; it must be one of auto, {', '.join(PATHS)}")
    return wanted


@functools.cache
def _module(name: str, path: str) -> ModuleType:
    return importlib.import_module(f"eff_kernels.{name}.{MODULES[path]}")


@functools.cache
def _choose(op: Op, wanted: str, device_type: str, dtype: torch.dtype) -> Choice:
    """Return the path for EFF_KERNELS=`wanted`; kept, because ops on small tensors ask every time."""
    if wanted == "triton":
        _check_triton_can_run(op, device_type, dtype)
    if wanted in PATHS:
        return Choice(wanted, f"EFF_KERNELS={wanted}")
    if device_type == "cpu":
        return Choice("cpu", "CPU tensor")
    if device_type == "cuda" and dtype in op.dtypes:
        if has_triton():
            return Choice("triton", f"CUDA tensor of {dtype}")
        return Choice(op.without_kernel, "CUDA tensor, but triton does not import")
    return Choice(op.without_kernel, f"no kernel of {op.name} for {dtype} on {device_type}")


def _check_triton_can_run(op: Op, device_type: str, dtype: torch.dtype) -> None:
    """Raise ValueError when a forced Triton kernel would fail with an obscure error."""
    if not has_triton():
        raise ValueError("EFF_KERNELS=triton, but triton is not installed; use auto, reference or cpu")
    if dtype not in op.dtypes:
        raise ValueError(
            f"EFF_KERNELS=triton, but there is no Triton kernel of {op.name} for {dtype}; use auto or reference"
        )
    if device_type == "cpu" and not interpreting():
        raise ValueError(
            "EFF_KERNELS=triton, but the tensor is on the CPU; set TRITON_INTERPRET=1 to interpret the kernels"
        )


def interpreting() -> bool:
    """Whether Triton kernels are interpreted; the interpreter's matrix product does not know bfloat16."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_triton() -> bool:
    """Whether the triton package imports."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
