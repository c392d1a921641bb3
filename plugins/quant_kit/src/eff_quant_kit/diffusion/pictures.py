"""Samples side by side."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor


def draw_samples(path: Path, rows: dict[str, Tensor], count: int = 10) -> None:
    """Write a picture with one row of samples (N, C, H, W) in [-1, 1] per name; columns start from the same noise."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = min(count, *(len(samples) for samples in rows.values()))
    figure = Figure(figsize=(1.4 + 0.8 * count, 0.95 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, samples) in zip(axes, rows.items(), strict=True):
        for axis, sample in zip(line, samples, strict=False):
            image = ((sample.cpu().clamp(-1, 1) + 1) / 2).movedim(0, -1)
            axis.imshow(image[..., 0] if image.shape[-1] == 1 else image[..., :3], cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, format="png", dpi=110)
