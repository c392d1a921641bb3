"""PSNR and SSIM as the restoration literature states them, and the meter of the task.

    PSNR = 10 log10(R^2 / mean((x - y)^2))                                   in dB, R = 1: images are in [0, 1]
    SSIM = mean over positions of (2 mx my + c1)(2 sxy + c2) / ((mx^2 + my^2 + c1)(sx^2 + sy^2 + c2))
           c1 = (0.01 R)^2, c2 = (0.03 R)^2, 11 x 11 Gaussian window with sigma 1.5, only where it fits whole
           (Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 2004); of colours: the mean over channels.

"Y" is the luma of ITU-R BT.601 in its studio range 16 to 235, as Matlab's rgb2ycbcr gives it: what
super-resolution papers measure on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from eff.data import Batch
from eff.errors import DataError
from eff.schemas import Metric, Metrics

IDENTICAL_DB = 100.0
"""What stands for the infinite PSNR of equal images, so that means stay finite."""
WINDOW, SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
_LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)
_LUMA_OFFSET = 16 / 255


def luma(image: Tensor) -> Tensor:
    """Return the BT.601 luma (N, 1, H, W), in [16/255, 235/255], of RGB images (N, 3, H, W) in [0, 1]."""
    weights = image.new_tensor(_LUMA).view(1, 3, 1, 1)
    return (image * weights).sum(1, keepdim=True) + _LUMA_OFFSET


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Return the PSNR in dB of each image for data range 1; 100 dB where nothing differs.

    Args:
        image: (N, C, H, W), floating point.
        target: like `image`.

    Returns:
        (N,), float64.
    """
    _check_same_shape(image, target)
    mse = (image.double() - target.double()).square().mean((1, 2, 3))
    return (-10 * mse.log10()).clamp(max=IDENTICAL_DB)


def ssim(image: Tensor, target: Tensor) -> Tensor:
    """Return the mean SSIM of each image for data range 1; see the module for the formula.

    Args:
        image: (N, C, H, W), floating point, sides of at least 11.
        target: like `image`.

    Returns:
        (N,), float64.

    Raises:
        DataError: the images are smaller than the window.
    """
    _check_same_shape(image, target)
    samples, channels, height, width = image.shape
    if min(height, width) < WINDOW:
        raise DataError(f"SSIM needs sides of at least {WINDOW} pixels, the images are {height}x{width}")
    x, y = (value.double().reshape(samples * channels, 1, height, width) for value in (image, target))
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blur(torch.cat((x, y, x * x, y * y, x * y))).chunk(5)
    product = mean_x * mean_y
    squares = mean_x.square() + mean_y.square()
    covariance, variances = mean_xy - product, mean_xx + mean_yy - squares
    score = (2 * product + _C1) * (2 * covariance + _C2) / ((squares + _C1) * (variances + _C2))
    return score.view(samples, -1).mean(1)


def _blur(x: Tensor) -> Tensor:
    """Return (N, 1, H - 10, W - 10): the Gaussian window where it fits whole."""
    offset = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    kernel = torch.exp(-0.5 * (offset / SIGMA).square())
    kernel = kernel / kernel.sum()
    return F.conv2d(F.conv2d(x, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))


def _check_same_shape(image: Tensor, target: Tensor) -> None:
    if image.shape != target.shape or image.ndim != 4:
        raise DataError(
            f"images {tuple(image.shape)} and targets {tuple(target.shape)} cannot be compared; "
            "both must be (N, C, H, W) of one shape"
        )


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
