"""Moving cached keys of rotary position embeddings: R_{p+d} R_p^-1 = R_d, one rotation for all that move together.

    (a, b) -> (a cos - b sin, a sin + b cos),  angle = d theta_u

(He et al., PIE, arXiv:2407.03157; Su et al., RoFormer, arXiv:2104.09864.) Pairs (u, u + R/2), or (2u, 2u + 1) where
interleaved. Memory bound: reads and writes each key once.

Drift: angles are computed in float64 from the whole offset, so a shift is exact to rounding: float32 keys that are shifted
n times differ from the one shift by the sum by at most n 2^-22 of their norm (1000 shifts: 2.4e-4 in theory, 1e-5 as
measured). Half precision rounds every time (2^-9 for bfloat16): there, keep the keys that were never shifted and the sum of
the offsets, and rotate these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eff_kernels.checks import FLOATS, check_count, check_device, check_dtype, check_finite, check_flag, check_shape
from eff_kernels.rotate_keys import library

__all__ = ["rotate_keys"]

_INTEGERS = (torch.int64, torch.int32)


def rotate_keys(
    keys: Tensor,
    offsets: int | Sequence[int] | Tensor,
    inv_freq: Tensor,
    *,
    lengths: Sequence[int] | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Return the keys as if their tokens stood `offsets` positions further; the rotation is computed in float32.

    Differentiable in `keys`. NaN in a key stays in its pair.

    Args:
        keys: rotated keys (batch, heads, length, dim); float16, bfloat16, float32 or float64 (which is computed in float64).
        offsets: d of each segment, negative to the left: a number, (segments,), or (batch, segments); integers, a tensor
            on the device of the keys.
        inv_freq: theta, (R / 2,) with R <= dim even, as the model has it: with linear or frequency-wise scaling, without
            attention factors; finite (looked at on the CPU only, and not under torch.compile). Channels from R on stay as
            they are (partial rotary).
        lengths: tokens of each segment, in order; together `length`. None: one segment.
        interleaved: pairs (2u, 2u + 1) (GPT-J) instead of (u, u + R / 2) (LLaMA).

    Returns:
        Like `keys`, contiguous.

    Raises:
        TypeError: a wrong dtype, or an offset or length that is no integer.
        ValueError: a shape or device does not fit, lengths do not add up, or inv_freq is not finite (CPU).
    """
    op = "rotate_keys"
    check_dtype(op, "keys", keys, FLOATS)
    check_shape(op, "keys", keys, ("batch", "heads", "length", "dim"))
    check_dtype(op, "inv_freq", inv_freq, FLOATS)
    check_shape(op, "inv_freq", inv_freq, ("R / 2",))
    batch, _, length, dim = keys.shape
    if not 0 < 2 * len(inv_freq) <= dim:
        raise ValueError(f"{op}: inv_freq has {len(inv_freq)} entries, expected 1 to {dim // 2} for {dim} channels")
    check_device(op, "inv_freq", inv_freq, "keys", keys)
    if isinstance(offsets, Tensor):
        check_device(op, "offsets", offsets, "keys", keys)
    try:
        moved = torch.as_tensor(offsets, device=keys.device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{op}: offsets is {offsets!r}, expected 64-bit integers") from error
    check_dtype(op, "offsets", moved, _INTEGERS)
    if lengths is not None and not isinstance(lengths, Sequence):
        raise TypeError(f"{op}: lengths is {lengths!r}, expected a sequence of counts")
    segments = [length] if lengths is None else list(lengths)
    for index, count in enumerate(segments if lengths is not None else ()):
        check_count(op, f"lengths[{index}]", count, 0)
    if sum(segments) != length:
        raise ValueError(f"{op}: lengths are {segments}, expected counts that add up to {length}")
    moved = moved.expand(len(segments)) if moved.ndim == 0 else moved
    if moved.shape not in ((len(segments),), (batch, len(segments))):
        raise ValueError(
            f"{op}: offsets has shape {tuple(moved.shape)}, expected ({len(segments)},) or ({batch}, {len(segments)})"
        )
    check_finite(op, "inv_freq", inv_freq)
    check_flag(op, "interleaved", interleaved)
    # float64: a position of 10^5 times a frequency of 1 leaves float32 an error of 0.004 in the angle.
    angle = moved.view(-1, len(segments), 1).double() * inv_freq.double()
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    result: Tensor = library.rotate_op(keys, angle.cos().to(wide), angle.sin().to(wide), segments, interleaved)
    return result
