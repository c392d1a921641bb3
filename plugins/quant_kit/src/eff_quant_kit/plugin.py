"""Declares the kit's file encoding to eff. Imports no torch."""

from __future__ import annotations

from typing import ClassVar

from eff.method import Extension


class QuantKit(Extension):
    """Teaches core to read files with bit-packed integer weights."""

    encodings: ClassVar = {"quant-packed": "eff_quant_kit.packed:unpack_state"}
