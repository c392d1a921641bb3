"""Time, memory and seams of `eff predict` on a large photo.

    python plugins/restore_deanet/benchmarks/large_photo.py [--model deanet:base] [--megapixels 12] [--json]

A photo is put together from the ones that scikit-image brings, predicted by the command in a process of its own (whose
largest memory is measured), and a part of it, small enough for one pass, is predicted tiled and whole: the largest
difference is printed apart for all pixels and for those beside the tiles' edges. Weights are random unless
`--model` is a file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eff.checkpoint import save_checkpoint
from eff.exporting import make_header
from eff.models import ModelRequest, open_model
from eff.run import Run
from eff.session import Plugins

DATA = "eff_restore_kit.samples:scenes"
_CHILD = """
import resource, sys
from eff.cli import main
try:
    main(sys.argv[1:])
finally:
    print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def main() -> None:
    """Predict the large photo, then compare tiled with whole on a part of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deanet:base")
    parser.add_argument("--megapixels", type=float, default=12.0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    plugins = Plugins()
    opened = open_model(ModelRequest(arguments.model, data=DATA, needs_data=False), plugins)
    opened.model.eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = Run(opened.task, torch.device("cpu"), model_spec=opened.spec)
        run.applied = lambda: tuple(item.applied() for item in opened.applied)
        save_checkpoint(folder / "model.pt", make_header(run), opened.model.state_dict())
        width = 4 * round((arguments.megapixels * 1e6 * 4 / 3) ** 0.5 / 4)
        photo = make_photo(width * 3 // 4, width)
        Image.fromarray(photo).save(folder / "photo.jpg", quality=95)
        result = predict(folder) | {"model": arguments.model, "size": list(photo.shape[:2])}
    part = torch.from_numpy(photo[:1024, :1024]).permute(2, 0, 1)[None].float() / 255
    result |= seams(opened.task, opened.model, part)
    print(json.dumps(result) if arguments.json else "\\n".join(f"{key}: {value}" for key, value in result.items()))


def make_photo(height: int, width: int) -> np.ndarray:
    """Return real photos side by side, (height, width, 3) uint8."""
    from skimage import data, transform

    photos = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    half = (height // 2 + height % 2, width // 2 + width % 2)
    parts = [transform.resize(photo, half, order=3, anti_aliasing=True) for photo in photos]
    whole = np.concatenate([np.concatenate(parts[:2], 1), np.concatenate(parts[2:], 1)], 0)[:height, :width]
    return (whole.clip(0, 1) * 255).round().astype(np.uint8)


def predict(folder: Path) -> dict[str, float]:
    """Run `eff predict` as a user does; return seconds and peak memory."""
    command = [sys.executable, "-c", _CHILD, "predict", "model.pt", "photo.jpg", "-o", "out.png", "--device", "cpu"]
    started = time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    seconds = time.monotonic() - started
    assert (folder / "out.png").exists(), done.stderr
    peak = int(done.stdout.rpartition("PEAK")[2])
    return {"seconds": round(seconds, 1), "peak_gib": round(peak * 1024 / 2**30, 2)}


def seams(task: object, model: torch.nn.Module, image: torch.Tensor) -> dict[str, float]:
    """Return the largest difference between tiled and whole, of values in [0, 1]."""
    tiled = task.predict(model, {"image": image})  # type: ignore[attr-defined]
    whole_task = type(task)(task.options.model_copy(update={"tile": 4096}))  # type: ignore[attr-defined]
    whole = whole_task.predict(model, {"image": image})
    error = (tiled - whole).abs().amax(1)[0]
    tile = task.options.tile  # type: ignore[attr-defined]
    near = torch.zeros_like(error, dtype=torch.bool)
    for edge in range(tile, image.shape[-1], tile):
        near[edge - 32 : edge + 32] = True
        near[:, edge - 32 : edge + 32] = True
    jump = max(float((tiled - whole).diff(dim=dim).abs().max()) for dim in (-1, -2))
    return {
        "difference": float(error.max()),
        "difference_near_edges": float(error[near].max()),
        "largest_step_of_the_difference": jump,
        "output_range": float(whole.max() - whole.min()),
    }


if __name__ == "__main__":
    main()
