"""Products of 16-bit integers in 32-bit accumulators: short chains, whose sums go to float32.

    out = sum over chains c of float32(sum_{k in c} a[m, k] b[k, n]),  times 2^(E_a + E_b)

Two products of full-range operands fill 31 bits (2 * 32767^2 = 2^31 - 2 * 65535), so the guaranteed chain is 2; with r bits
of head-room it is floor((2^31 - 1) / (2^(15 - r) - 1)^2). The sums inside a chain are int32 arithmetic of the machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eff.errors import RunError
from eff_quant_dfp.fixed import Fixed, scaled

LOW, HIGH = -(2**31), 2**31 - 1
PIECE = 1 << 22
"""Partial sums held at once: 16 MiB of int32."""


def product(a: Fixed, b: Fixed, chain: int, overflow: str = "guaranteed", name: str = "product") -> tuple[Tensor, int]:
    """Return a @ b in float32 and how many partial sums left 32 bits.

    Args:
        a: codes of shape (G, M, K), int16.
        b: codes of shape (G, K, N), int16.
        chain: products per accumulation.
        overflow: "guaranteed" (the chain is known to be safe: nothing is checked), "wrap" (as int32 does), "saturate"
            (clipped after every pair of products) or "checked".
        name: for the error.

    Returns:
        Shape (G, M, N), float32; the count is 0 for "guaranteed".

    Raises:
        RunError: "checked" and a partial sum left 32 bits.
    """
    (groups, m, k), n = a.codes.shape, b.codes.shape[2]
    chain = min(chain, k)
    chains = -(-k // chain)
    left = _chains(a.codes, chain, chains)  # (G, chains, M, chain)
    right = _chains(b.codes.transpose(1, 2), chain, chains)  # (G, chains, N, chain)
    out = torch.zeros(groups, m, n, dtype=torch.float32, device=a.codes.device)
    overflows = 0
    at_once = max(1, PIECE // max(1, groups * m * n))
    for first in range(0, chains, at_once):
        one, other = left[:, first : first + at_once], right[:, first : first + at_once]
        sums, left_range = _sums(one, other, overflow)
        overflows += left_range
        if left_range and overflow == "checked":
            raise RunError(
                f"quant_dfp: {name}: {left_range} partial sums of {chain} products left 32 bits; use a shorter chain, "
                "a larger pre_shift, or overflow=saturate"
            )
        for partial in sums.unbind(1):  # in order: the float32 accumulator rounds after every chain
            out += partial.float()
    return scaled(out, a.exponent + b.exponent), overflows


def _chains(codes: Tensor, chain: int, chains: int) -> Tensor:
    """Return codes (G, R, K) as (G, chains, R, chain), int32, zeros behind the end."""
    groups, rows, k = codes.shape
    padded = torch.nn.functional.pad(codes.int(), (0, chains * chain - k))
    return padded.view(groups, rows, chains, chain).transpose(1, 2)


def _sums(left: Tensor, right: Tensor, overflow: str) -> tuple[Tensor, int]:
    """Return the partial sums (G, chains, M, N) and how many left 32 bits."""
    if overflow == "guaranteed":
        return left @ right.transpose(2, 3), 0
    if overflow == "saturate":
        return _saturated(left, right)
    exact = left.long() @ right.long().transpose(2, 3)
    wrong = int(((exact < LOW) | (exact > HIGH)).sum())
    return (left @ right.transpose(2, 3) if overflow == "wrap" else exact), wrong


def _saturated(left: Tensor, right: Tensor) -> tuple[Tensor, int]:
    """Add pairs of products, clipping to 32 bits after each."""
    total: Tensor | None = None
    clipped: Tensor | None = None
    for start in range(0, left.shape[-1], 2):
        pair = left[..., start : start + 2].long() @ right[..., start : start + 2].long().transpose(2, 3)
        exact = pair if total is None else total + pair
        total = exact.clamp(LOW, HIGH)
        hit = exact != total
        clipped = hit if clipped is None else clipped | hit
    assert total is not None and clipped is not None
    return total, int(clipped.sum())
