"""Every Triton kernel: in the interpreter against its reference, and ahead of time for sm_80 and sm_90."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed; GPU kernels are Linux only")

from eff_kernels.testing import TARGETS, compile_for, kernel_modules, kernels_of  # noqa: E402

FILES = sorted(Path(__file__).with_name("interpreter").glob("*.py"))
CASES = [
    pytest.param(kernel, signature, constants, target, id=f"{kernel.__name__}-{signature.get('x_ptr', '')}-sm{target}")
    for module in kernel_modules()
    for kernel, variants in module.AHEAD_OF_TIME.items()
    for signature, constants in variants
    for target in TARGETS
]


@pytest.mark.parametrize(("kernel", "signature", "constants", "target"), CASES)
def test_kernel_compiles_ahead_of_time(kernel, signature, constants, target, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert compile_for(kernel, signature, constants, target)[:4] == b"\x7fELF"


def test_no_kernel_is_left_out_of_ahead_of_time_compilation():
    for module in kernel_modules():
        left_out = [name for name, kernel in kernels_of(module).items() if kernel not in module.AHEAD_OF_TIME]
        assert not left_out, f"{module.__name__}: {left_out}"


def run_cases(**environment):
    """Run tests/interpreter in a process of its own; return how many passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    done = subprocess.run(
        [*command, *map(str, FILES)], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-500:]
    return int(passed[1])


def test_every_kernel_module_has_interpreter_cases():
    assert {file.stem for file in FILES} == {module.__name__.split(".")[1] for module in kernel_modules()}


def test_kernels_agree_with_their_reference_in_the_interpreter():
    assert run_cases(TRITON_INTERPRET="1", TRITON_DEFAULT_FP_FUSION="0") >= 10 * len(FILES)


@pytest.mark.skipif(not __import__("torch").cuda.is_available(), reason="no CUDA device")
def test_kernels_agree_with_their_reference_on_a_gpu():
    assert run_cases(EFF_KERNELS_TEST_DEVICE="cuda") >= 10 * len(FILES)
