"""depthwise_conv beside torch's convolution in both memory formats and a Fourier convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_kernels.bench import Case, buffers
from eff_kernels.depthwise_conv import cpu, depthwise_conv, reference
from eff_kernels.depthwise_conv.library import OP

CPU_SHAPES = ((8, 64, 32, 13, False), (2, 96, 28, 31, False), (1, 32, 112, 31, False), (2, 96, 28, 13, True))
CUDA_SHAPES = ((64, 320, 28, 13, False), (32, 384, 28, 31, False), (64, 320, 28, 13, True))


def cases(device: torch.device) -> Iterator[Case]:
    """Yield inference and training of layers of large-kernel networks; only "all channels_last" gets other maps than we do."""
    for images, channels, side, kernel, trains in CPU_SHAPES if device.type == "cpu" else CUDA_SHAPES:
        generator = torch.Generator().manual_seed(0)
        shape = (images, channels, side, side)
        size = 4 * images * channels * side**2

        def make(_: int, shape: tuple[int, ...] = shape, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        inputs = buffers(make, size)
        weight = torch.randn(channels, 1, kernel, kernel, generator=generator).to(device) / kernel
        dy = make(0)
        last = [x.to(memory_format=torch.channels_last) for x in inputs]

        def torchs(x: Tensor, w: Tensor) -> Tensor:
            return reference.forward(x, w, None, 1)

        def fourier(x: Tensor, w: Tensor, side: int = side, kernel: int = kernel) -> Tensor:
            n = side + kernel - 1
            spectrum = torch.fft.rfft2(x, s=(n, n)) * torch.fft.rfft2(w[:, 0].flip(1, 2), s=(n, n))
            whole: Tensor = torch.fft.irfft2(spectrum, s=(n, n))
            return whole[..., kernel // 2 :, kernel // 2 :][..., :side, :side]

        def double(weight: Tensor = weight, x: Tensor = inputs[0], dy: Tensor = dy, trains: bool = trains) -> Any:
            return calls(torchs, [x.double()], weight.double(), dy.double(), trains)[0]()

        path = OP.choose(inputs[0])
        way = cpu.way(inputs[0], kernel, 1) if path.path == "cpu" else "direct kernel"
        yield Case(
            f"{'forward + backward' if trains else 'forward'}, {images} x {channels} x {side} x {side}, kernel {kernel}",
            calls(depthwise_conv, inputs, weight, dy, trains),
            {
                "conv2d": calls(torchs, inputs, weight, dy, trains),
                "conv2d, all channels_last": calls(torchs, last, weight, dy.to(memory_format=torch.channels_last), trains),
                "Fourier": calls(fourier, inputs, weight, dy, trains),
                "channels_last and back": calls(_there_and_back, inputs, weight, dy, trains),
            },
            path.by(way + (", weight gradient as a convolution" if trains and path.path == "cpu" else "")),
            moved=(4 if trains else 2) * size,
            reference=double,
            tolerance=1e-5,
        )  # fmt: skip


def _there_and_back(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(
        x.to(memory_format=torch.channels_last), weight, padding=weight.shape[-1] // 2, groups=len(weight)
    ).contiguous()


def calls(
    conv: Callable[[Tensor, Tensor], Tensor], inputs: list[Tensor], weight: Tensor, dy: Tensor, trains: bool
) -> list[Callable[[], Any]]:
    """Return the convolution of each input, with both gradients where it trains."""
    if not trains:
        return [lambda x=x: conv(x, weight) for x in inputs]  # type: ignore[misc]
    w = weight.clone().requires_grad_()
    leaves = [x.detach().requires_grad_() for x in inputs]
    return [lambda x=x: torch.autograd.grad(conv(x, w), (x, w), dy) for x in leaves]  # type: ignore[misc]
