"""The rotation in Triton: a program takes some tokens of one head; cos and sin of their segments come from a small table."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.dispatch import TRITON_DTYPES
from eff_kernels.rotate_keys.reference import segment_of

TOKENS = 16


@triton.jit
def rotate_kernel(
    key_ptr, cos_ptr, sin_ptr, segment_ptr, out_ptr, length, dim, half, heads, segments, of_batch,
    INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = token < length
    segment = tl.load(segment_ptr + token, mask=inside, other=0)
    table = ((head // heads) * of_batch * segments + segment)[:, None] * half
    base = (head * length + token)[:, None] * dim
    u = tl.arange(0, HALF)[None, :]
    mask = inside[:, None] & (u < half)
    c = tl.load(cos_ptr + table + u, mask=mask, other=1.0)
    s = tl.load(sin_ptr + table + u, mask=mask, other=0.0)
    first, second = u, u + half
    if INTERLEAVED:
        first, second = 2 * u, 2 * u + 1
    a = tl.load(key_ptr + base + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(key_ptr + base + second, mask=mask, other=0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + base + first, (a * c - b * s).to(kind), mask=mask)
    tl.store(out_ptr + base + second, (a * s + b * c).to(kind), mask=mask)
    if REST > 0:
        r = tl.arange(0, REST)[None, :] + 2 * half
        mask = inside[:, None] & (r < dim)
        tl.store(out_ptr + base + r, tl.load(key_ptr + base + r, mask=mask, other=0.0), mask=mask)


def rotate(keys: Tensor, cos: Tensor, sin: Tensor, lengths: list[int], interleaved: bool) -> Tensor:
    """Return the rotated keys; arguments as in the reference."""
    keys = keys.contiguous()
    batch, heads, length, dim = keys.shape
    half, segments = cos.shape[-1], cos.shape[1]
    out = torch.empty_like(keys)
    if not keys.numel():
        return out
    rest, segment = dim - 2 * half, segment_of(lengths, keys.device)
    rotate_kernel[(batch * heads, triton.cdiv(length, TOKENS))](
        keys, cos.contiguous(), sin.contiguous(), segment, out, length, dim, half, heads, segments, int(len(cos) > 1),
        INTERLEAVED=interleaved, TOKENS=TOKENS, HALF=triton.next_power_of_2(half),
        REST=triton.next_power_of_2(rest) if rest else 0,
    )  # fmt: skip
    return out


_KINDS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_SIZES = dict.fromkeys(("length", "dim", "half", "heads", "segments", "of_batch"), "i32")
AHEAD_OF_TIME = {
    rotate_kernel: [
        (
            {
                "key_ptr": _KINDS[kind], "cos_ptr": "*fp32", "sin_ptr": "*fp32", "segment_ptr": "*i64",
                "out_ptr": _KINDS[kind], **_SIZES,
            },
            {"INTERLEAVED": interleaved, "TOKENS": TOKENS, "HALF": 64, "REST": rest},
        )
        for kind in TRITON_DTYPES
        for interleaved, rest in ((False, 0), (True, 64))
    ]
}  # fmt: skip
"""Signatures and constants that each kernel is compiled with ahead of time in the tests."""
