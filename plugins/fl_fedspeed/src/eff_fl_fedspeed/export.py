"""The clients' offsets as a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safetensors.torch import save_file

from eff.run import Run
from eff_fl_fedspeed.client import OFFSET


def write_offsets(states: Mapping[int, dict[str, Any]], run: Run) -> None:
    """Write h_i of every client that took part, as `h.<number>`, into clients.safetensors."""
    offsets = {f"{OFFSET}.{index}": state[OFFSET].contiguous() for index, state in sorted(states.items())}
    with run.output("clients.safetensors", format="safetensors", clients=len(offsets)) as path:
        save_file(offsets, path)
