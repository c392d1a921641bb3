"""A picture of results: degraded, restored and target side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from eff.data import move_batch
from eff.modes import eval_mode

if TYPE_CHECKING:
    from torch import nn

    from eff.run import Run

_GAP, _SIDE, _TITLE = 4, 192, 18
_TITLES = ("degraded", "restored", "target")


def write_comparison(model: nn.Module, run: Run, name: str = "comparison.png", count: int = 4) -> None:
    """Write the first `count` test images into the run folder: one row each, with the PSNR of both.

    Does nothing where the run keeps no files now.
    """
    if not run.keeps_files or run.data is None or run.data.test is None:
        return
    from PIL import Image, ImageDraw

    from eff.image_quality import psnr

    split = run.data.test
    rows, notes = [], []
    with eval_mode(model):
        for index in range(min(count, len(split))):
            batch = move_batch(split.batch([index]), run.device)
            with torch.inference_mode():
                restored = run.forward(model, batch).clamp(0, 1)
            target = batch["target"]
            degraded = F.interpolate(batch["image"], size=target.shape[-2:], mode="nearest").clamp(0, 1)
            rows.append(torch.cat([_cell(part) for part in (degraded, restored, target)], dim=-1))
            notes.append([float(psnr(part, target)) for part in (degraded, restored)])
    sheet = (torch.cat(rows, dim=-2) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(sheet)
    draw = ImageDraw.Draw(image)
    for row, values in enumerate(notes):
        texts = [f"{title} {value:.2f} dB" for title, value in zip(_TITLES, values, strict=False)]
        for column, text in enumerate([*texts, _TITLES[-1]]):
            draw.text((column * (_SIDE + _GAP) + 2, row * (_SIDE + _GAP + _TITLE) + 3), text, fill=(0, 0, 0))
    with run.output(name, "png") as path:
        image.save(path, format="PNG")


def _cell(image: Tensor) -> Tensor:
    """Return (3, side + title + gap, side + gap) with the image below a white band."""
    scale = _SIDE / max(image.shape[-2:])
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    small = F.interpolate(image.cpu(), size=size, mode="bilinear" if scale < 1 else "nearest", antialias=scale < 1)[0]
    cell = torch.ones(3, _SIDE + _TITLE + _GAP, _SIDE + _GAP)
    cell[:, _TITLE : _TITLE + size[0], : size[1]] = small
    return cell
