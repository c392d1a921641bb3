"""depthwise_conv on the CPU: oneDNN where it has fast code for the shape, a Fourier transform where that is less work.

Measured with one thread (AVX-512) over C 16 to 384, H 7 to 112, k 7 to 31, N 1 and 8. oneDNN's fast code ends at kernels of
13 for contiguous maps; above, only channels_last is fast, by a factor of 10 to 60. There a kernel of 31 takes less than one
of 13, and what is dilated is slower than the same kernel with the zeros written out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_kernels.depthwise_conv import reference

AS_IT_LIES, CHANNELS_LAST = "convolution in the format of x", "channels_last convolution"
WRITTEN_OUT, FOURIER = "channels_last convolution with the kernel's zeros written out", "Fourier transform"
LARGE = 15
"""From here on a kernel has its fast code with channels_last only."""
FOURIER_WORK = 31 * 80
"""Kernel side times map side from which the Fourier transform wins."""
_HALF = (torch.float16, torch.bfloat16)


def way(x: Tensor, kernel: int, dilation: int) -> str:
    """Return how the convolution is done."""
    span = dilation * (kernel - 1) + 1
    channels_last = not x.is_contiguous()
    if kernel == 3 and dilation > 1:
        return CHANNELS_LAST  # nine taps are few, wherever they lie
    if span * min(x.shape[2:]) >= FOURIER_WORK:
        return FOURIER
    if span >= LARGE:
        return CHANNELS_LAST if dilation == 1 else WRITTEN_OUT
    if dilation > 1:
        return CHANNELS_LAST
    if kernel == 13 and channels_last and x.shape[1] > 16:
        return WRITTEN_OUT  # to 15 taps: faster by up to 6
    return AS_IT_LIES


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Return (N, C, H, W); half precision is computed in float32."""
    if x.dtype in _HALF:
        return forward(x.float(), weight.float(), None if bias is None else bias.float(), dilation).to(x.dtype)
    if x.dtype == torch.float64:  # oneDNN has none of it
        return reference.forward(x, weight, bias, dilation)
    chosen = way(x, weight.shape[-1], dilation)
    if chosen == FOURIER:
        return fourier(x, weight, bias, dilation)
    if chosen == AS_IT_LIES:
        return reference.forward(x, weight, bias, dilation)
    if chosen == WRITTEN_OUT:
        weight, dilation = written_out(weight, dilation, LARGE), 1
    return reference.forward(x.contiguous(memory_format=torch.channels_last), weight, bias, dilation)


def weight_gradient(dy: Tensor, x: Tensor, kernel: int, dilation: int) -> Tensor:
    """Return (C, 1, k, k): the correlation of x and dy, a depthwise convolution of x with the "kernel" dy.

    Faster than oneDNN's own by up to 10; only k = 3 is not.
    """
    if x.dtype in _HALF:
        return weight_gradient(dy.float(), x.float(), kernel, dilation).to(x.dtype)
    if x.dtype == torch.float64 or kernel == 3 or not len(x):
        return reference.weight_gradient(dy, x, kernel, dilation)
    if kernel * min(x.shape[2:]) >= FOURIER_WORK:
        return _fourier_weight_gradient(dy, x, kernel, dilation)
    images, channels, height, width = x.shape
    pad = dilation * (kernel // 2)
    padded = F.pad(x.contiguous(), (pad, pad, pad, pad)).view(1, images * channels, height + 2 * pad, width + 2 * pad)
    maps = dy.contiguous().view(images * channels, 1, height, width)
    each = F.conv2d(padded, maps, None, dilation, groups=images * channels)  # the tap's distance is the stride
    return each.reshape(images, channels, 1, kernel, kernel).sum(0)


def written_out(weight: Tensor, dilation: int, least: int = 1) -> Tensor:
    """Return the kernel of dilation 1 with zeros between the taps, and around them up to the side `least` (odd)."""
    channels, _, kernel, _ = weight.shape
    span = dilation * (kernel - 1) + 1
    around = max(0, least - span) // 2
    out = weight.new_zeros(channels, 1, span + 2 * around, span + 2 * around)
    inside = slice(around, around + span, dilation)
    out[:, :, inside, inside] = weight
    return out


def fourier(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Return (N, C, H, W): the product of the spectra."""
    height, width = x.shape[2:]
    size, rows, columns = _circle(x, weight.shape[-1], dilation)
    kernel = x.new_zeros(len(weight), *size)
    kernel[:, rows, columns] = weight[:, 0]
    spectrum = torch.fft.rfft2(x.contiguous(), s=size).mul_(torch.fft.rfft2(kernel).conj())
    y: Tensor = torch.fft.irfft2(spectrum, s=size)[..., :height, :width]
    return y.contiguous() if bias is None else y + bias[:, None, None]


def _fourier_weight_gradient(dy: Tensor, x: Tensor, kernel: int, dilation: int) -> Tensor:
    size, rows, columns = _circle(x, kernel, dilation)
    spectrum = torch.fft.rfft2(x.contiguous(), s=size).mul_(torch.fft.rfft2(dy.contiguous(), s=size).conj())
    taps: Tensor = torch.fft.irfft2(spectrum.sum(0), s=size)[:, rows, columns]
    return taps.unsqueeze(1)


def _circle(x: Tensor, kernel: int, dilation: int) -> tuple[list[int], Tensor, Tensor]:
    """Return the transform's size, and the rows and columns where the kernel's taps lie.

    Taps above and left of the centre lie at the end, where negative indices wrap to. Zeros behind the map as wide as half
    the kernel therefore serve both of its sides; taps that share a place then are those that reach no value.
    """
    pad = dilation * (kernel // 2)
    size = [_fast_size(side + pad) for side in x.shape[2:]]
    offset = torch.arange(-pad, pad + 1, dilation, device=x.device)
    return size, (offset % size[0])[:, None], offset % size[1]


def _fast_size(least: int) -> int:
    """Return the next size whose prime factors are 2, 3 and 5."""
    size = least
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 1
