"""The task "restoration": a degraded image in, a clear one out."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image
from pydantic import Field, JsonValue, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from eff.data import Batch, Data
from eff.data.images import Shape, native_shape, read_image
from eff.errors import DataError, RequestError, UnsupportedModelError, did_you_mean
from eff.files import atomic_path
from eff.modes import eval_mode, gradients_for
from eff.schemas import Schema
from eff.tasks import Prediction, Task
from eff_restore_kit.metrics import RestorationMeter
from eff_restore_kit.tiling import BLEND, Tiling, held_averages, measure_context, restore_in_tiles

_TILE_SHARE = 4  # the context is at most a quarter of the tile


class RestorationOptions(Schema):
    """What a restoring model's file remembers."""

    channels: int = Field(3, description="1 (grey) or 3 (RGB).")
    degradation: str = Field("", description="What the model undoes, e.g. haze.")
    scale: int = Field(1, ge=1, description="Side of the output / side of the input.")
    size: tuple[int, int] = Field((64, 64), description="Height and width of training crops.")
    multiple: int = Field(1, ge=1, description="The network takes sides that are multiples of this.")
    smallest: int = Field(1, ge=1, description="The smallest side the network takes.")
    tile: int = Field(480, ge=64, description="Photos larger than this many pixels squared are restored in tiles.")
    context: int | None = Field(None, ge=0, description="Pixels of a tile's edge not trusted; unset: measured.")
    border: int = Field(0, ge=0, description="Pixels at the edges left out of the metrics.")
    rounded: bool = Field(False, description="Measure on 8-bit values.")

    @model_validator(mode="after")
    def _values_fit(self) -> RestorationOptions:
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if self.context is not None and 2 * self.context + BLEND + self.multiple > self.tile:
            raise ValueError(f"a context of {self.context} leaves nothing of a tile of {self.tile}")
        return self


class Restoration(Task[RestorationOptions]):
    """Batches: image (N, C, H, W) float32, mostly in [0, 1]; target (N, C, s H, s W); sizes where they are unequal."""

    name = "restoration"
    options_type = RestorationOptions
    headline = "psnr"

    def __init__(self, options: RestorationOptions):
        super().__init__(options)
        self._context = options.context

    def model_options(self) -> dict[str, JsonValue]:
        """Return in_channels, and scale where it is not 1."""
        options = self.options
        known: dict[str, JsonValue] = {"in_channels": options.channels}
        return known | ({"scale": options.scale} if options.scale != 1 else {})

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return restored images, not clamped.

        In training all at once. Otherwise large images go through one by one and in tiles, and images of
        different sizes without their padding.
        """
        image, sizes = batch["image"], batch.get("sizes")
        area = image.shape[-2] * image.shape[-1]
        limit = self.options.tile**2
        if torch.is_grad_enabled() or (sizes is None and image.shape[0] * area <= limit):
            return self._padded(model, image)
        if sizes is None and area <= limit:
            return torch.cat([self._padded(model, part) for part in image.split(max(1, limit // area))])
        scale = self.options.scale
        out: Tensor = image.new_zeros(*image.shape[:2], scale * image.shape[-2], scale * image.shape[-1])
        for index in range(len(image)):
            height, width = (side // scale for side in sizes[index].tolist()) if sizes is not None else image.shape[-2:]
            restored = self.restore(model, image[index : index + 1, :, :height, :width])
            out[index, :, : scale * height, : scale * width] = restored[0]
        return out

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the restored image, clamped to [0, 1], whatever its size."""
        with torch.inference_mode():
            return self.restore(model, batch["image"]).clamp_(0, 1)

    def restore(self, model: nn.Module, image: Tensor) -> Tensor:
        """Return one restored image (1, C, s H, s W), in tiles where it is large."""
        options = self.options
        height, width = image.shape[-2:]
        if height * width <= options.tile**2:
            return self._padded(model, image)
        padded = self._pad(image)
        tiling = self.tiling(model, image.device)
        with held_averages(model, model, padded, options.multiple):
            restored = restore_in_tiles(model, padded, tiling, options.scale)
        return restored[..., : options.scale * height, : options.scale * width].to(image.device)

    def tiling(self, model: nn.Module, device: torch.device) -> Tiling:
        """Return how to cut large images for this model; its context is measured once."""
        options = self.options
        tile = options.tile // options.multiple * options.multiple
        if self._context is None:
            with torch.inference_mode(False), gradients_for(model, ()):  # only the image's is wanted
                side = max(64 // options.multiple, 1) * options.multiple  # any image: averages only have to be constant
                patch = torch.rand(1, options.channels, side, side, generator=torch.Generator().manual_seed(1))
                with held_averages(model, model, patch.to(device), options.multiple):
                    self._context = measure_context(
                        model, options.channels, tile // _TILE_SHARE, options.multiple, str(device)
                    )
        return Tiling(tile, self._context, BLEND, options.multiple)

    def _pad(self, image: Tensor) -> Tensor:
        """Return the image with its right and bottom mirrored to the next multiple."""
        height, width = image.shape[-2:]
        bottom, right = (-height) % self.options.multiple, (-width) % self.options.multiple
        return F.pad(image, (0, right, 0, bottom), mode="reflect") if bottom or right else image

    def _padded(self, model: nn.Module, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        scale = self.options.scale
        output: Tensor = model(self._pad(image))
        return output[..., : scale * height, : scale * width]

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean absolute error."""
        return F.l1_loss(output, batch["target"])

    def meter(self) -> RestorationMeter:
        """Return a fresh meter."""
        return RestorationMeter(self.options.border, self.options.rounded)

    def example_inputs(self, samples: int) -> tuple[Tensor, ...]:
        """Return seeded images (samples, C, h, w) in [0, 1], of the size of a training crop."""
        options = self.options
        height, width = (math.ceil(side / options.scale / options.multiple) * options.multiple for side in options.size)
        return (torch.rand(samples, options.channels, height, width, generator=torch.Generator().manual_seed(0)),)

    def read_input(self, path: Path) -> Batch:
        """Return one photo in its own size.

        Raises:
            DataError: no image, transparent, or smaller than the network takes.
        """
        options = self.options
        shape: Shape = (options.channels, *native_shape(path, str(path))[1:])
        if min(shape[1:]) < options.smallest:
            raise DataError(
                f"{path}: is {shape[1]}x{shape[2]} pixels, the model needs sides of at least {options.smallest}"
            )
        if _is_transparent(path):
            raise DataError(f"{path}: has transparent pixels, which the model cannot see; save it without transparency")
        return {"image": read_image(path, shape)[None]}

    def show(self, output: Tensor, source: Path, out: Path | None) -> Prediction:
        """Write the restored image to `out` (the suffix says how), or say what it would be."""
        height, width = output.shape[-2:]
        if out is None:
            row: dict[str, JsonValue] = {
                "restored": f"{height}x{width}",
                "mean": float(output.mean()),
                "note": "-o FILE keeps it",
            }
            return Prediction(input=str(source), rows=[row])
        write_image(output[0], out)
        return Prediction(input=str(source), file=out)

    def check_fit(self, model: nn.Module, data: Data) -> None:
        """Run one sample through; compare channels and sizes."""
        options = self.options
        split = data.test if data.test is not None else data.split("train")
        batch = split.batch([0])
        image, target = batch["image"], batch["target"]
        if image.shape[1] != options.channels:
            raise DataError(f"data '{data.spec}' has {image.shape[1]} channels, the model expects {options.channels}")
        if min(image.shape[-2:]) < options.smallest:
            raise DataError(
                f"data '{data.spec}' has images of {image.shape[-2]}x{image.shape[-1]}, the model needs sides of at "
                f"least {options.smallest}; use a larger ?size="
            )
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        part = image[:, :, : options.tile, : options.tile].to(device)
        with eval_mode(model), torch.no_grad():
            output = self._padded(model, part)
        expected = (1, target.shape[1], options.scale * part.shape[-2], options.scale * part.shape[-1])
        if not isinstance(output, Tensor) or tuple(output.shape) != expected:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UnsupportedModelError(
                f"{type(model).__name__} makes {found} of an image {tuple(part.shape)}, the targets are {expected}; "
                "it does not restore this data"
            )


def _is_transparent(path: Path) -> bool:
    with Image.open(path) as image:
        if "A" not in image.mode and "transparency" not in image.info:
            return False
        lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
        return int(lowest) < 255


def write_image(image: Tensor, path: Path) -> None:
    """Write an image (C, H, W) in [0, 1] as 8 bits per channel, whole or not at all.

    Raises:
        RequestError: the suffix names no image format, or the folder does not exist.
    """
    known = {suffix for suffix, format in Image.registered_extensions().items() if format in Image.SAVE}
    suffix = path.suffix.lower()
    if suffix not in known:
        raise RequestError(f"{path}: '{suffix}' is no image format{did_you_mean(suffix, known)}; use .png or .jpg")
    if not path.parent.is_dir():
        raise RequestError(f"{path}: there is no folder {path.parent}; create it first")
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(array).save(temporary, format=Image.registered_extensions()[suffix])
