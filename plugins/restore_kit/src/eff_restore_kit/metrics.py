"""PSNR and SSIM of restored images, in colour and luma: the meter of the task. The formulas: `eff.image_quality`.

"Y" is the luma of ITU-R BT.601 in its studio range 16 to 235, as Matlab's rgb2ycbcr gives it: what
super-resolution papers measure on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eff.data import Batch
from eff.errors import DataError
from eff.image_quality import psnr, ssim
from eff.schemas import Metric, Metrics

_LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)
_LUMA_OFFSET = 16 / 255


def luma(image: Tensor) -> Tensor:
    """Return the BT.601 luma (N, 1, H, W), in [16/255, 235/255], of RGB images (N, 3, H, W) in [0, 1]."""
    weights = image.new_tensor(_LUMA).view(1, 3, 1, 1)
    return (image * weights).sum(1, keepdim=True) + _LUMA_OFFSET


class RestorationMeter:
    """Mean PSNR and SSIM of restored images against their targets, in colour and luma.

    Args:
        border: pixels left out at each side (super-resolution papers: the scale).
        rounded: compare 8-bit values, as written files have them.
        compares_input: also report the PSNR of the degraded input.
    """

    def __init__(self, border: int = 0, rounded: bool = False, compares_input: bool = True):
        self.border = border
        self.rounded = rounded
        self.compares_input = compares_input
        self.values: dict[str, list[Tensor]] = {}

    def update(self, output: Tensor, batch: Batch) -> None:
        """Take in restored images (N, C, H, W); `batch` has target, image and, for unequal images, sizes."""
        target = batch["target"]
        pairs = {"": output}
        if self.compares_input and batch["image"].shape == target.shape:
            pairs["input_"] = batch["image"]
        sizes = batch.get("sizes")
        for prefix, image in pairs.items():
            if sizes is None:
                self._add(prefix, image, target)
                continue
            for index, (height, width) in enumerate(sizes.tolist()):
                part = (slice(index, index + 1), slice(None), slice(height), slice(width))
                self._add(prefix, image[part], target[part])

    def _add(self, prefix: str, image: Tensor, target: Tensor) -> None:
        image, target = self._prepared(image), self._prepared(target)
        self._append(prefix + "psnr", psnr(image, target))
        self._append(prefix + "ssim", ssim(image, target))
        if image.shape[1] == 3 and not prefix:
            self._append("psnr_y", psnr(luma(image), luma(target)))
            self._append("ssim_y", ssim(luma(image), luma(target)))

    def _prepared(self, image: Tensor) -> Tensor:
        image = image.double().clamp(0, 1)
        if self.rounded:
            image = (image * 255).round() / 255
        edge = self.border
        return image[..., edge : image.shape[-2] - edge, edge : image.shape[-1] - edge] if edge else image

    def _append(self, name: str, values: Tensor) -> None:
        self.values.setdefault(name, []).append(values.cpu())

    def compute(self) -> Metrics:
        """Return the means over all images.

        Raises:
            DataError: there were none.
        """
        if not self.values:
            raise DataError("no samples to measure on; the test split is empty")
        order = ("psnr", "ssim", "psnr_y", "ssim_y", "input_psnr", "input_ssim")
        return Metrics(
            values={
                name: Metric(
                    value=float(torch.cat(self.values[name]).mean()),
                    unit="dB" if "psnr" in name else "",
                    better="neither" if name.startswith("input_") else "higher",
                )
                for name in order
                if name in self.values
            }
        )
