"""Compiling Triton kernels ahead of time, without a GPU, and finding those that nobody compiles."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from typing import Any

import torch

import eff_kernels

TARGETS = (80, 90)
"""Compute capabilities (sm_80, sm_90) that every kernel must compile for."""


def kernel_modules() -> Iterator[Any]:
    """Yield every `triton_kernel` module of the package."""
    for found in pkgutil.walk_packages(eff_kernels.__path__, "eff_kernels."):
        if found.name.endswith(".triton_kernel"):
            yield importlib.import_module(found.name)


def kernels_of(module: Any) -> dict[str, Any]:
    """Return the `@triton.jit` functions that a module defines."""
    from triton.runtime.jit import KernelInterface

    return {name: value for name, value in vars(module).items() if isinstance(value, KernelInterface)}


def compile_for(kernel: Any, signature: dict[str, str], constants: dict[str, Any], capability: int) -> bytes:
    """Compile one kernel for one CUDA capability and return the cubin.

    Raises:
        Exception: the kernel does not compile; Triton's own error.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    full = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature=full,
        constexprs={(kernel.arg_names.index(key),): value for key, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    cubin: bytes = compiled.asm["cubin"]
    return cubin


def device() -> torch.device:
    """Return where kernel cases run: on a GPU with EFF_KERNELS_TEST_DEVICE=cuda, else interpreted on the CPU."""
    return torch.device(os.environ.get("EFF_KERNELS_TEST_DEVICE", "cpu"))
