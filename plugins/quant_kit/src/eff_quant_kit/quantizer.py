"""The fake quantizer: a module that rounds to integer multiples of a scale and stays in float."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eff.errors import RunError
from eff_kernels.fake_quant import fake_quant

SMALLEST_SCALE = 1e-8
"""Floor of every scale: below it division overflows float32."""


def integer_range(bits: int, signed: bool, narrow_range: bool = False) -> tuple[int, int]:
    """Return the smallest and largest level of a `bits`-bit integer.

    Args:
        bits: 2 to 16.
        signed: two's complement, else from 0.
        narrow_range: signed only: drop the smallest level, so that the range is symmetric.

    Raises:
        ValueError: bits outside 2..16 (a signed 1-bit range has no positive level).
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"bits must be between 2 and 16, got {bits}")
    if not signed:
        return 0, 2**bits - 1
    largest = 2 ** (bits - 1) - 1
    return (-largest if narrow_range else -largest - 1), largest


class Quantizer(nn.Module):
    """Quantizes a tensor with one scale, or one per index of `axis`, and maybe an offset.

    State: `scale`, `offset` (where there is one) and the flag `initialised`, so that a reloaded
    quantizer is not initialised again. `grad_scale` multiplies the gradients of scale and offset.
    """

    offset: nn.Parameter | None

    def __init__(
        self,
        bits: int,
        signed: bool = True,
        *,
        channels: int | None = None,
        axis: int | None = None,
        narrow_range: bool = False,
        with_offset: bool = False,
    ):
        super().__init__()
        self.bits = bits
        self.axis = axis
        self.narrow_range = narrow_range
        self.name = ""
        """The layer and role, for messages; set by the walk."""
        self.set_signed(signed)
        shape = () if axis is None else (channels or 0,)
        self.scale = nn.Parameter(torch.ones(shape))
        self.offset = nn.Parameter(torch.zeros(shape)) if with_offset else None
        self.initialised: Tensor
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))
        self.grad_scale = 1.0
        self.channel_bits: tuple[int, ...] | None = None
        """Bits of each channel where they differ; `bits` is then the most of them."""

    @property
    def mean_bits(self) -> float:
        """Bits per value, averaged over the channels."""
        return self.bits if self.channel_bits is None else sum(self.channel_bits) / len(self.channel_bits)

    def set_signed(self, signed: bool) -> None:
        """Choose the signed or the unsigned range."""
        self.signed = signed
        self.q_min, self.q_max = integer_range(self.bits, signed, self.narrow_range)

    def set_scale(self, scale: Tensor, offset: Tensor | None = None) -> bool:
        """Take initial values, in place so that an optimiser keeps its parameter.

        Returns:
            Whether a scale had to be lifted to `SMALLEST_SCALE` (a tensor of zeros).

        Raises:
            RunError: a value is NaN or infinite.
        """
        if not bool(torch.isfinite(scale).all()):
            raise RunError(
                f"{self.name}: the tensor to initialise from holds NaN or infinity; check the data and the weights"
            )
        with torch.no_grad():
            self.scale.copy_(scale.clamp(min=SMALLEST_SCALE))
            if self.offset is not None and offset is not None:
                self.offset.copy_(offset)
            self.initialised.fill_(True)
        return bool((scale < SMALLEST_SCALE).any())

    def levels(self, x: Tensor) -> Tensor:
        """Return the integer levels of `x`, as int32."""
        scale, offset = self._spread(self.scale.detach(), x), self._spread(self.offset, x)
        u = x.detach().float() if offset is None else x.detach().float() - offset.detach()
        return (u / scale).clamp(self.q_min, self.q_max).round().to(torch.int32)

    def _spread(self, value: Tensor | None, x: Tensor) -> Tensor | None:
        if value is None or self.axis is None:
            return value
        return value.view([-1 if index == self.axis else 1 for index in range(x.ndim)])

    def clip_fraction(self, x: Tensor) -> float:
        """Return the share of `x` that lies outside the range."""
        scale, offset = self._spread(self.scale.detach(), x), self._spread(self.offset, x)
        u = (x if offset is None else x - offset) / scale
        return float(((u < self.q_min) | (u > self.q_max)).double().mean())

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` fake-quantized, in its dtype.

        Raises:
            RunError: not initialised.
        """
        if not torch.compiler.is_compiling() and not self.initialised:
            raise RunError(
                f"{self.name or 'quantizer'}: used before it was initialised; apply the method with data first"
            )
        return fake_quant(
            x, self.scale, self.q_min, self.q_max, offset=self.offset, axis=self.axis, grad_scale=self.grad_scale
        )

    def extra_repr(self) -> str:
        """Return bits and range for printing."""
        return f"bits={self.bits}, levels=[{self.q_min}, {self.q_max}], axis={self.axis}"


def quantizers_of(model: nn.Module) -> list[Quantizer]:
    """Return all quantizers of a model, in module order."""
    return [module for module in model.modules() if isinstance(module, Quantizer)]


def keep_scales_positive(model: nn.Module) -> int:
    """Lift scales below `SMALLEST_SCALE` to it; return how many quantizers needed it."""
    fired = 0
    with torch.no_grad():
        for quantizer in quantizers_of(model):
            if bool((quantizer.scale < SMALLEST_SCALE).any()):
                quantizer.scale.clamp_(min=SMALLEST_SCALE)
                fired += 1
    return fired
