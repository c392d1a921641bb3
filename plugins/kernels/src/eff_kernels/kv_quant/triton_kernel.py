"""Attention over packed codes in Triton: a program reads some tokens of one head and keeps a running softmax.

Programs that share a head write partial results, which are merged in a fixed order. Products are of three tf32 products
(tf32x3), as exact as float32: codes are integers below 256, which tf32 holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.kv_quant.reference import finite

TOKENS = 32
ENOUGH = 256
"""Programs that fill a GPU; heads are only split where there are fewer."""
QUERIES = 16
"""Queries of a program: the least that a matrix product takes."""


@triton.jit
def attend_kernel(
    query_ptr, offset_ptr, key_ptr, value_ptr, scale_ptr, low_ptr, counts_ptr, sum_ptr, largest_ptr, total_ptr,
    heads, queries, tokens, dim, tokens_per_program,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    batch = head // heads
    row = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    d = tl.arange(0, DIM)
    seen = (row < queries)[:, None] & (d < dim)[None, :]
    query = tl.load(query_ptr + (head * queries + row)[:, None] * dim + d[None, :], mask=seen, other=0.0)
    offset = tl.load(offset_ptr + head * queries + row, mask=row < queries, other=0.0)
    keys_per_byte: tl.constexpr = 8 // KEY_BITS
    values_per_byte: tl.constexpr = 8 // VALUE_BITS
    key_shift = ((d % keys_per_byte) * KEY_BITS)[None, :]
    value_shift = ((d % values_per_byte) * VALUE_BITS)[None, :]
    count = tl.load(counts_ptr + batch)
    sums = tl.zeros((QUERIES, DIM), tl.float32)
    lows = tl.zeros((QUERIES,), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    for first in range(0, tokens_per_program, TOKENS):
        t = part * tokens_per_program + first + tl.arange(0, TOKENS)
        inside = (t < count) & (first + tl.arange(0, TOKENS) < tokens_per_program)
        row_of_token = (head * tokens + t)[:, None]
        key_place = row_of_token * (dim // keys_per_byte) + (d // keys_per_byte)[None, :]
        value_place = row_of_token * (dim // values_per_byte) + (d // values_per_byte)[None, :]
        mask = inside[:, None] & (d < dim)[None, :]
        keys = (tl.load(key_ptr + key_place, mask=mask, other=0).to(tl.int32) >> key_shift) & ((1 << KEY_BITS) - 1)
        scores = tl.dot(query, tl.trans(keys.to(tl.float32)), input_precision="tf32x3") + offset[:, None]
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, axis=1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        fade = tl.exp(largest - safe)
        weights = tl.exp(scores - safe[:, None])
        scale = tl.load(scale_ptr + batch * tokens + t, mask=inside, other=0.0)
        low = tl.load(low_ptr + batch * tokens + t, mask=inside, other=0.0)
        values = (tl.load(value_ptr + value_place, mask=mask, other=0).to(tl.int32) >> value_shift) & (
            (1 << VALUE_BITS) - 1
        )
        total = total * fade + tl.sum(weights, axis=1)
        lows = lows * fade + tl.sum(weights * low[None, :], axis=1)
        product = tl.dot(weights * scale[None, :], values.to(tl.float32), input_precision="tf32x3")
        sums = sums * fade[:, None] + product
        largest = new
    out = (head * parts + part) * queries + row
    tl.store(sum_ptr + out[:, None] * dim + d[None, :], sums + lows[:, None], mask=seen)
    tl.store(largest_ptr + out, largest, mask=row < queries)
    tl.store(total_ptr + out, total, mask=row < queries)


def attend(
    query: Tensor, key_codes: Tensor, key_scale: Tensor, key_low: Tensor, value_codes: Tensor, value_scale: Tensor,
    value_low: Tensor, channel: Tensor | None, counts: Tensor | None, key_bits: int, value_bits: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what the reference does; arguments as there."""
    batch, heads, queries, dim = query.shape
    tokens = key_codes.shape[2]
    scaled = (query * key_scale[:, None]).contiguous()
    offset = (query * key_low[:, None]).sum(-1)
    blocks = triton.cdiv(tokens, TOKENS)
    splits = max(1, min(blocks, ENOUGH // (batch * heads)))
    per_program = triton.cdiv(blocks, splits) * TOKENS
    splits = triton.cdiv(tokens, per_program)
    if counts is None:
        counts = torch.full((batch,), tokens, dtype=torch.int32, device=query.device)
    sums = torch.empty(batch, heads, splits, queries, dim, dtype=torch.float32, device=query.device)
    largest = torch.empty(batch, heads, splits, queries, dtype=torch.float32, device=query.device)
    totals = torch.empty_like(largest)
    attend_kernel[(batch * heads, splits, triton.cdiv(queries, QUERIES))](
        scaled, offset, key_codes.contiguous(), value_codes.contiguous(), value_scale.contiguous(), value_low.contiguous(),
        counts.contiguous(), sums, largest, totals, heads, queries, tokens, dim, per_program,
        KEY_BITS=key_bits, VALUE_BITS=value_bits, QUERIES=QUERIES, TOKENS=TOKENS, DIM=max(16, triton.next_power_of_2(dim)),
    )  # fmt: skip
    top = largest.amax(2)
    factor = (largest - finite(top)[:, :, None]).exp()
    out = (sums * factor[..., None]).sum(2)
    return out if channel is None else out * channel[:, None], top, (totals * factor).sum(2)


AHEAD_OF_TIME = {
    attend_kernel: [
        (
            {
                "query_ptr": "*fp32", "offset_ptr": "*fp32", "key_ptr": "*u8", "value_ptr": "*u8", "scale_ptr": "*fp32",
                "low_ptr": "*fp32", "counts_ptr": "*i32", "sum_ptr": "*fp32", "largest_ptr": "*fp32", "total_ptr": "*fp32", "heads": "i32",
                "queries": "i32", "tokens": "i32", "dim": "i32", "tokens_per_program": "i32",
            },
            {"KEY_BITS": bits, "VALUE_BITS": bits, "QUERIES": QUERIES, "TOKENS": TOKENS, "DIM": 128},
        )
        for bits in (2, 4)
    ]
}  # fmt: skip
"""Signatures and constants that each kernel is compiled with ahead of time in the tests."""
