"""The export format `kvcache`: the compressed cache of one text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from eff.run import Run
from eff_quant_zipcache.storage import save_cache


def write_cache(model: nn.Module, path: Path, run: Run) -> dict[str, Any]:
    """Write the cache of the first test window; where there are no data, of seeded random tokens."""
    if run.data is not None and run.data.test is not None:
        ids = run.data.test.batch([0])["input_ids"]
    else:
        ids = run.task.example_inputs(1)[0]
    cache = model.make_cache()  # type: ignore[operator]
    with torch.inference_mode():
        model(input_ids=ids.to(run.device), past_key_values=cache)
    return {**save_cache(cache, ids, path), "needs_base": True}
