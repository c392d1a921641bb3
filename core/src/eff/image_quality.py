"""PSNR and SSIM, as the literature on images states them.

PSNR = 10 log10(R^2 / mean((x - y)^2))                                   in dB, R = 1: images are in [0, 1]
SSIM = mean over positions of (2 mx my + c1)(2 sxy + c2) / ((mx^2 + my^2 + c1)(sx^2 + sy^2 + c2))
       c1 = (0.01 R)^2, c2 = (0.03 R)^2, 11 x 11 Gaussian window with sigma 1.5, only where it fits whole
       (Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 2004); of colours: the mean over channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from eff.errors import DataError

IDENTICAL_DB = 100.0
"""What stands for the infinite PSNR of equal images, so that means stay finite."""
WINDOW, SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


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
