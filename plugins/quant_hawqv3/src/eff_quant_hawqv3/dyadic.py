"""Dyadic numbers: every factor between two integer grids is m / 2^e (arXiv:2011.10680, sec. 3.2).

R = S_in / S_out = frac 2^x,  0.5 <= frac < 1        m = round_half_up(frac 2^31),  e = 31 - x
out = clip(round(q m / 2^e), low, high)
"""

from __future__ import annotations

import torch
from torch import Tensor

from eff.errors import RunError
from eff_kernels.int_matmul import dyadic

SMALLEST_RATIO = 2.0**-63


def factor(scale_in: Tensor, scale_out: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Return (m, e) of scale_in / scale_out: int64 with 1 <= m < 2^31 and 1 <= e <= 62, shaped like `scale_in`.

    Both scales are taken in float32, as deployment compilers hold them; their ratio is in float64. Channels whose
    ratio is below 2^-63 get 0.

    Raises:
        RunError: a scale is 0 or not finite, or the ratio is 2^30 or more; `where` names the tensor.
    """
    below, above = scale_in.detach().float().double(), scale_out.detach().float().double()
    ratio = below / above
    if not bool(torch.isfinite(ratio).all()) or bool((ratio <= 0).any()):
        raise RunError(f"quant_hawqv3: {where}: dead scale, a whole channel or tensor is 0; calibrate on other data")
    if bool((ratio >= 2.0**30).any()):
        raise RunError(
            f"quant_hawqv3: {where}: a scale grows by {float(ratio.max()):.3g} at once; its ranges do not fit"
        )
    m, e = dyadic(ratio.clamp_min(SMALLEST_RATIO))
    return torch.where(ratio < SMALLEST_RATIO, 0, m.long()), e.long()
