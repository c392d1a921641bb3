"""Declares the restoration task and its data sources to eff. Imports no torch."""

from __future__ import annotations

from typing import ClassVar

from eff.method import Extension


class RestoreKit(Extension):
    """Adds the task "restoration" and the sources `photos:` and `pairs:`."""

    tasks: ClassVar = {"restoration": "eff_restore_kit.task:Restoration"}
    data_sources: ClassVar = {
        "photos": "eff_restore_kit.sources:load_photos",
        "pairs": "eff_restore_kit.sources:load_pairs",
    }
