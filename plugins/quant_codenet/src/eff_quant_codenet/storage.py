"""Files of a quantized detector: bit-packed weights for eff, and ONNX with integer weights and quantize nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from eff.errors import UnsupportedModelError
from eff.exporting import onnx_agreement, onnx_export
from eff.run import Run
from eff_quant_codenet.deform import DeformConv2d
from eff_quant_codenet.quantize import PLUGIN
from eff_quant_codenet.quantizers import RunningRange
from eff_quant_kit.layers import quant_layers, replace_module
from eff_quant_kit.onnx_qdq import OnnxQuantizer, suit_runtimes, to_onnx_modules
from eff_quant_kit.packed import write_packed


def write(model: nn.Module, format: str, path: Path, run: Run) -> dict[str, Any]:
    """Write `packed` or `onnx`; return what a reader must know to decode it.

    Raises:
        UnsupportedModelError: the model is not quantized.
    """
    if not quant_layers(model):
        raise UnsupportedModelError(f"{PLUGIN}: {type(model).__name__} has no quantized layers, nothing to export")
    details = write_packed(model, path, run) if format == "packed" else _write_onnx(model, path, run)
    options = run.task.options
    return {**details, "rounded_offsets": rounds_offsets(model), "stride": options.stride, "top": options.top}


def rounds_offsets(model: nn.Module) -> bool:
    """Whether every deformable convolution samples at whole pixels, so that the graph needs gathers only."""
    return all(
        module.offset is None or module.round_offsets for module in model.modules() if isinstance(module, DeformConv2d)
    )


def _write_onnx(model: nn.Module, path: Path, run: Run) -> dict[str, Any]:
    exported = to_onnx_modules(model)
    for name, module in [
        (name, module) for name, module in exported.named_modules() if isinstance(module, RunningRange)
    ]:
        replace_module(exported, name, OnnxQuantizer(module))
    onnx_export(exported, path, run, rewrite=suit_runtimes)
    return onnx_agreement(model, path, run)
