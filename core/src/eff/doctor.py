"""What this installation has, and what to do about what it lacks."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from typing import Literal

from eff.errors import EffError
from eff.registry import EXTENSIONS, METHODS, discover, load_extensions, load_method
from eff.schemas import Schema

OPTIONAL = {
    "sklearn": ("digits data, claims", "pip install 'eff-core[digits]'"),
    "pyarrow": ("Parquet data", "pip install 'eff-core[hub]'"),
    "datasets": ("data from the Hub", "pip install 'eff-core[hub]'"),
    "onnx": ("ONNX export", "pip install 'eff-core[onnx]'"),
    "onnxscript": ("ONNX export", "pip install 'eff-core[onnx]'"),
    "onnxruntime": ("checking ONNX files", "pip install 'eff-core[onnx]'"),
    "matplotlib": ("plots of eff compare", "pip install 'eff-core[plots]'"),
    "ray": ("eff sweep", "pip install 'eff-core[sweep]'"),
    "cookiecutter": ("eff new", "pip install 'eff-core[new]'"),
}


class Finding(Schema):
    """One thing the doctor looked at."""

    what: str
    state: Literal["ok", "missing", "broken"]
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at Python, libraries, devices, Triton and every plugin."""
    return [*_machine(), *_libraries(), *_triton(), *_plugins()]


def _machine() -> list[Finding]:
    findings = [Finding(what="python", state="ok", detail=f"{platform.python_version()} on {platform.platform()}")]
    try:
        import torch
    except ImportError as error:
        return [*findings, Finding(what="torch", state="broken", detail=str(error), remedy="pip install torch")]
    findings.append(
        Finding(what="torch", state="ok", detail=f"{torch.__version__}, {torch.get_num_threads()} CPU threads")
    )
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        findings.append(
            Finding(what="accelerator", state="ok", detail=f"{device}, {torch.accelerator.device_count()} device(s)")
        )
    else:
        findings.append(
            Finding(
                what="accelerator",
                state="missing",
                detail="runs use the CPU",
                remedy="nothing to do, unless this machine has a GPU: then install the torch build for it",
            )
        )
    return findings


def _libraries() -> list[Finding]:
    found = []
    for name, (purpose, remedy) in OPTIONAL.items():
        try:
            version = getattr(importlib.import_module(name), "__version__", "installed")
            found.append(Finding(what=name, state="ok", detail=f"{version} ({purpose})"))
        except ImportError:
            found.append(Finding(what=name, state="missing", detail=f"needed for {purpose}", remedy=remedy))
    return found


def _triton() -> list[Finding]:
    if sys.platform != "linux":
        return [
            Finding(what="triton", state="missing", detail="GPU kernels need Linux; the plain torch paths are used")
        ]
    try:
        import triton
    except ImportError:
        return [
            Finding(
                what="triton",
                state="missing",
                detail="GPU kernels are off; the plain torch paths are used",
                remedy="pip install triton",
            )
        ]
    mode = "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled"
    return [Finding(what="triton", state="ok", detail=f"{triton.__version__}, {mode}")]


def _plugins() -> list[Finding]:
    found = []
    for row in discover(METHODS):
        try:
            load_method(row.name)
            found.append(Finding(what=row.name, state="ok", detail=f"{row.distribution} {row.version}"))
        except EffError as error:
            found.append(
                Finding(
                    what=row.name,
                    state="broken",
                    detail=str(error),
                    remedy=f"pip install --force-reinstall {row.distribution}, or pip uninstall it",
                )
            )
    _, broken = load_extensions()
    names = {row.name for row in broken}
    found += [
        Finding(what=row.name, state="ok", detail=f"extension, {row.distribution} {row.version}")
        for row in discover(EXTENSIONS)
        if row.name not in names
    ]
    found += [
        Finding(
            what=row.name, state="broken", detail=row.reason, remedy=f"pip install --force-reinstall {row.distribution}"
        )
        for row in broken
    ]
    return found
