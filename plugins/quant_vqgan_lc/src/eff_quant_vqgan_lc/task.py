"""Task `tokenization`: images to discrete tokens and back. Batches: image (N, C, H, W) in [0, 1], maybe label (N,)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn
from torch.nn import functional as F

from eff.data import Batch, Data
from eff.errors import DataError, RequestError, UnsupportedModelError, did_you_mean
from eff.files import atomic_path
from eff.image_quality import WINDOW, psnr, ssim
from eff.schemas import Metric, Metrics, Schema
from eff.tasks import Prediction, Task, check_image_shape, first_sample


class TokenizationOptions(Schema):
    """What a tokenizer's file remembers."""

    input_shape: tuple[int, int, int] = Field(description="Channels, height, width.")


class ReconstructionMeter:
    """Mean PSNR in dB and, from 11 pixels on, SSIM of reconstructions, clamped to [0, 1]."""

    def __init__(self) -> None:
        self.psnr: list[Tensor] = []
        self.ssim: list[Tensor] = []

    def update(self, output: Tensor, batch: Batch) -> None:
        """Take in one batch."""
        output, image = output.clamp(0, 1), batch["image"]
        self.psnr.append(psnr(output, image).cpu())
        if min(image.shape[-2:]) >= WINDOW:
            self.ssim.append(ssim(output, image).cpu())

    def compute(self) -> Metrics:
        """Return the means over all images.

        Raises:
            DataError: there were none.
        """
        if not self.psnr:
            raise DataError("no samples to measure on; the test split is empty")
        values = {"psnr": Metric(value=float(torch.cat(self.psnr).mean()), unit="dB", better="higher")}
        if self.ssim:
            values["ssim"] = Metric(value=float(torch.cat(self.ssim).mean()), better="higher")
        return Metrics(values=values)


class Tokenization(Task[TokenizationOptions]):
    """Models take and give images in [-1, 1]; outputs here are in [0, 1], not clamped."""

    name = "tokenization"
    options_type = TokenizationOptions
    headline = "psnr"
    input_names = ("image",)

    def model_options(self) -> dict[str, JsonValue]:
        """Return in_channels."""
        return {"in_channels": self.options.input_shape[0]}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return reconstructions (N, C, H, W)."""
        output: Tensor = model(2 * batch["image"] - 1)
        return (output + 1) / 2

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean absolute error."""
        return F.l1_loss(output, batch["image"])

    def meter(self) -> ReconstructionMeter:
        """Return a fresh meter."""
        return ReconstructionMeter()

    def module_inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return images in [-1, 1]."""
        return (2 * batch["image"] - 1,)

    def example_inputs(self, samples: int) -> tuple[Tensor, ...]:
        """Return seeded images in [-1, 1]."""
        return (2 * torch.rand(samples, *self.options.input_shape, generator=torch.Generator().manual_seed(0)) - 1,)

    def read_input(self, path: Path) -> Batch:
        """Return one image, resized to the model's input shape."""
        from eff.data.images import read_image

        return {"image": read_image(path, self.options.input_shape)[None]}

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the reconstruction and, from a tokenizer, its tokens (1, h, w)."""
        with torch.inference_mode():
            tokens = model.tokens(2 * batch["image"] - 1) if hasattr(model, "tokens") else None
            return self.forward(model, batch), tokens

    def show(self, output: Any, source: Path, out: Path | None) -> Prediction:
        """Return the PSNR and the first tokens; writes the reconstruction to `out` (the suffix says how)."""
        image, tokens = output
        image = image.clamp(0, 1).cpu()
        row: dict[str, JsonValue] = {"psnr": float(psnr(image, self.read_input(source)["image"]))}
        if tokens is not None:
            row |= {"tokens": "x".join(str(side) for side in tokens.shape[1:]), "different": len(tokens.unique())}
            row["first"] = " ".join(str(code) for code in tokens.flatten()[:6].tolist())
        if out is None:
            return Prediction(input=str(source), rows=[row | {"note": "-o FILE keeps the reconstruction"}])
        write_image(image[0], out)
        return Prediction(input=str(source), rows=[row], file=out)

    def check_fit(self, model: nn.Module, data: Data) -> None:
        """Compare shapes and run one sample through."""
        batch = first_sample(data)
        check_image_shape(data, batch, self.options.input_shape)
        sample = batch["image"]
        height, width = sample.shape[2:]
        factor = getattr(model, "factor", 1)
        if height % factor or width % factor:
            raise DataError(
                f"data '{data.spec}' has images of {height}x{width}, the model reduces sides {factor} times; "
                f"use ?size= with a multiple of {factor}"
            )
        output = self.tried(model, {"image": sample})
        if not isinstance(output, Tensor) or output.shape != sample.shape:
            made = tuple(output.shape[1:]) if isinstance(output, Tensor) else type(output).__name__
            raise UnsupportedModelError(
                f"{type(model).__name__} makes {made} of an image {tuple(sample.shape[1:])}; it does not reconstruct images"
            )


def write_image(image: Tensor, path: Path) -> None:
    """Write an image (C, H, W) in [0, 1] as 8 bits per channel, whole or not at all.

    Raises:
        RequestError: the suffix names no image format, or the folder does not exist.
    """
    from PIL import Image

    known = {suffix for suffix, format in Image.registered_extensions().items() if format in Image.SAVE}
    if path.suffix.lower() not in known:
        raise RequestError(
            f"{path}: '{path.suffix}' is no image format{did_you_mean(path.suffix, known)}; use .png or .jpg"
        )
    if not path.parent.is_dir():
        raise RequestError(f"{path}: there is no folder {path.parent}; create it first")
    pixels = (image * 255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0).copy())
    with atomic_path(path) as temporary:
        picture.save(temporary, format=Image.registered_extensions()[path.suffix.lower()])
