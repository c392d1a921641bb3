"""Number formats of a few bits: symmetric integers and floating point.

Dotzel, Wu, Li, Umar, Ni, Abdelfattah et al.: FLIQS, AutoML 2024, arXiv:2308.03290.
    intB:  n = 2^(B-1) - 1,  s = amax / n,  clip(round(x / s), -n - 1, n) s
    eXmY:  v = x f_max / amax,  E = max(floor(log2 |v|), 1 - bias),  clip(round(v / 2^(E-Y)) 2^(E-Y), f_max),  back by amax / f_max
Ties go to even. Subnormals come from the max. e4m3 gives up its top code, e5m2 its top exponent (NaN, infinity).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eff_quant_fliqs.config import FORMAT

SHARES = tuple(index / 10 for index in range(1, 11))


@dataclass(frozen=True)
class Format:
    """One format."""

    name: str
    bits: int
    exponent: int = 0
    """Exponent bits; 0 of an integer."""

    @property
    def mantissa(self) -> int:
        """Mantissa bits of a floating-point format."""
        return self.bits - 1 - self.exponent

    @property
    def bias(self) -> int:
        """Bias of the exponent, 2^(e-1) - 1."""
        return int(2 ** (self.exponent - 1)) - 1

    @property
    def largest(self) -> float:
        """Largest magnitude: n of an integer, f_max of a floating-point format."""
        if not self.exponent:
            return 2 ** (self.bits - 1) - 1
        top = 2**self.exponent - 1 - self.bias
        if self.name == "e5m2":
            top -= 1
        fraction = 2 - 2.0**-self.mantissa
        return float(2.0**top * (1.75 if self.name == "e4m3" else fraction))

    def levels(self, symmetric: bool = False) -> Tensor:
        """Return all values, in units of the scale, in rising order, float32."""
        if not self.exponent:
            return torch.arange(-self.largest - (0 if symmetric else 1), self.largest + 1)
        exponents = torch.arange(2**self.exponent)
        fractions = torch.arange(2**self.mantissa) / 2**self.mantissa
        normal = (1 + fractions) * 2.0 ** (exponents[1:, None] - self.bias)
        values = torch.cat([(fractions * 2.0 ** (1 - self.bias)), normal.flatten()])
        values = values[values <= self.largest]
        return torch.cat([-values[1:].flip(0), values])

    def round(self, u: Tensor, symmetric: bool = False) -> Tensor:
        """Return `u`, in units of the scale, rounded to the format."""
        if not self.exponent:
            return u.round().clamp(-self.largest - (0 if symmetric else 1), self.largest)
        power = (torch.frexp(u).exponent - 1).clamp(min=1 - self.bias)
        step = torch.ldexp(torch.ones_like(u), power - self.mantissa)
        return ((u / step).round() * step).clamp(-self.largest, self.largest)


def parse(name: str) -> Format:
    """Return the format called `name`, which the options have checked."""
    found = FORMAT.fullmatch(name)
    assert found
    if found[1]:
        return Format(name, int(found[1]))
    return Format(name, 1 + int(found[2]) + int(found[3]), int(found[2]))


def magnitude(x: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """Return max|x| over `dims`, kept as 1; over everything for None."""
    return x.detach().abs().amax() if dims is None else x.detach().abs().amax(dims, keepdim=True)


def scale_of(amax: Tensor, format: Format) -> Tensor:
    """Return the scale of a largest magnitude; 1 for a tensor of zeros, which stays zero."""
    return torch.where(amax > 0, amax / format.largest, torch.ones_like(amax))


def quantize(x: Tensor, format: Format, scale: Tensor, symmetric: bool = False) -> Tensor:
    """Return `x` in a format; the gradient passes unchanged, also outside the range."""
    rounded = format.round(x.detach() / scale, symmetric) * scale
    return x + (rounded.to(x.dtype) - x).detach()


def best_share(w: Tensor, format: Format, dims: tuple[int, ...] | None, symmetric: bool) -> float:
    """Return the share of the largest magnitude, 0.1 to 1, of least squared error."""
    amax = magnitude(w, dims)
    errors = []
    for share in SHARES:
        found = quantize(w.detach(), format, scale_of(amax * share, format), symmetric)
        errors.append(float((found - w.detach()).square().sum()))
    return SHARES[errors.index(min(errors))]
