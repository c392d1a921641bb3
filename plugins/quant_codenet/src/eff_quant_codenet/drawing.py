"""Pictures of detections: boxes drawn into a photo, and a sheet of test images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from eff.data import move_batch
from eff.errors import RequestError
from eff.files import atomic_path
from eff.modes import eval_mode

if TYPE_CHECKING:
    from torch import nn

    from eff.run import Run

SHEET = "detections.png"
_COLUMNS, _IMAGES, _SIDE = 4, 12, 192
_OBJECT = (40, 200, 60)
_COLOURS = ((230, 60, 60), (50, 110, 240), (240, 150, 30), (170, 60, 200), (20, 170, 170), (150, 110, 60))


def draw_photo(source: Path, out: Path, rows: list[dict[str, Any]]) -> None:
    """Write the photo with boxes to `out`; its suffix says the format.

    Raises:
        RequestError: the suffix names no image format, or the folder does not exist.
    """
    known = {suffix for suffix, format in Image.registered_extensions().items() if format in Image.SAVE}
    if out.suffix.lower() not in known:
        raise RequestError(f"{out}: '{out.suffix}' is no image format; use .png or .jpg")
    if not out.parent.is_dir():
        raise RequestError(f"{out}: there is no folder {out.parent}; create it first")
    with Image.open(source) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(sorted({row["class"] for row in rows}))}
    pen = ImageDraw.Draw(image)
    for row in rows:
        box = [row["left"], row["top"], row["right"], row["bottom"]]
        _box(pen, box, colours[row["class"]], f"{row['class']} {row['score']:.2f}", max(1, min(image.size) // 200))
    with atomic_path(out) as temporary:
        image.save(temporary, format=Image.registered_extensions()[out.suffix.lower()])


def write_sheet(model: nn.Module, run: Run, name: str = SHEET) -> None:
    """Write the first test images into the run folder: objects green, detections above the threshold in another colour.

    Does nothing where the run keeps no files now.
    """
    if not run.keeps_files or run.data is None or run.data.test is None:
        return
    split, task = run.data.test, run.task
    batch = move_batch(split.batch(range(min(_IMAGES, len(split)))), run.device)
    with eval_mode(model), torch.inference_mode():
        found = task.detections(run.forward(model, batch))
    count, (height, width) = len(batch["image"]), batch["image"].shape[-2:]
    scale = max(1.0, _SIDE / max(height, width))
    cell = (round(width * scale) + 4, round(height * scale) + 4)
    sheet = Image.new("RGB", (_COLUMNS * cell[0], -(-count // _COLUMNS) * cell[1]), (255, 255, 255))
    for index in range(count):
        image = _picture(batch["image"][index]).resize((cell[0] - 4, cell[1] - 4), Image.Resampling.BILINEAR)
        pen = ImageDraw.Draw(image)
        for box, label in zip(batch["boxes"][index].tolist(), batch["label"][index].tolist(), strict=True):
            if label >= 0:
                _box(pen, [side * scale for side in box], _OBJECT, "", 1)
        for box, score, label in zip(*(part[index].tolist() for part in found), strict=True):
            if score >= task.options.threshold:
                text = f"{task.options.classes[label]} {score:.2f}"
                _box(pen, [side * scale for side in box], _COLOURS[label % len(_COLOURS)], text, 1)
        sheet.paste(image, (index % _COLUMNS * cell[0], index // _COLUMNS * cell[1]))
    with run.output(name, "png") as path:
        sheet.save(path, format="PNG")


def _picture(image: Tensor) -> Image.Image:
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _box(pen: ImageDraw.ImageDraw, box: list[float], colour: tuple[int, int, int], text: str, width: int) -> None:
    left, top, right, bottom = box
    pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=width)
    if text:
        pen.text((left + width + 1, max(0, top)), text, fill=colour)
