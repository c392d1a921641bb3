"""What weight_only_matmul means, in plain torch; every kernel must agree with it. Written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.packing import unpack_bits


def dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K); computed in float32, float64 where that is asked for."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    n, k = len(packed), packed.shape[1] * 8 // bits
    levels = unpack_bits(packed, bits, n * k).view(n, scale.shape[1], -1).to(wide)
    zero = 2 ** (bits - 1) if zero_point is None else zero_point.to(wide)[:, :, None]
    return ((levels - zero) * scale.to(wide)[:, :, None]).view(n, k).to(dtype)


def forward(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return x (M, K) times the transposed weight, (M, N)."""
    return _product(x, dequantize(packed, scale, zero_point, bits, x.dtype).t())


def backward(grad: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return the gradient of x, (M, K), from that of the result, (M, N)."""
    return _product(grad, dequantize(packed, scale, zero_point, bits, grad.dtype))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply with sums in float32, or wider."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return (a.to(wide) @ b.to(wide)).to(a.dtype)
