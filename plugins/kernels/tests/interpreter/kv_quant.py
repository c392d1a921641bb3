"""The kernel of kv_quant against the reference, in the interpreter or on a GPU; see test_kernels_triton.py."""

import pytest
import torch

from eff_kernels.kv_quant import kv_quantize, kv_quantize_parts, reference, triton_kernel
from eff_kernels.testing import device

DEVICE = device()


def compare(length, dim=8, queries=2, bits=4, batch=2, heads=3, factor=1.0, counts=None):
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(batch, heads, length, dim, generator=generator).to(DEVICE) for _ in range(2))
    everything = torch.arange(length).expand(batch, heads, -1).to(DEVICE)
    cache = kv_quantize(keys, values, everything, (bits, bits))
    query = factor * torch.randn(batch, heads, queries, dim, generator=generator).to(DEVICE)
    arguments = (query, *cache.parts[0].tensors(), cache.value_channel, counts, bits, bits)
    for found, expected in zip(triton_kernel.attend(*arguments), reference.attend(*arguments), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)  # sums in another order


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 200])
def test_lengths_around_the_block(length, bits):
    compare(length, bits=bits)


@pytest.mark.parametrize("queries", [1, 15, 16, 17])
def test_queries_around_the_block(queries):
    compare(70, queries=queries, batch=1, heads=1)


@pytest.mark.parametrize("dim", [4, 12, 32, 80])
def test_channels_off_powers_of_two(dim):
    compare(40, dim=dim, batch=1, heads=2)


def test_scores_so_large_that_one_token_takes_all():
    compare(100, factor=100.0, batch=1, heads=1)


def test_heads_split_over_programs(monkeypatch):
    monkeypatch.setattr(triton_kernel, "ENOUGH", 3)
    compare(300, batch=1, heads=1)


def test_sequences_with_fewer_tokens_and_with_none():
    compare(70, counts=torch.tensor([41, 0], dtype=torch.int32).to(DEVICE))


def test_keys_and_values_of_different_widths():
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 40, 8, generator=generator).to(DEVICE) for _ in range(2))
    every = torch.ones(1, 2, 40, dtype=torch.bool).to(DEVICE)
    cache = kv_quantize_parts(keys, values, [(every, 2, 4)])
    arguments = (keys[:, :, :3].contiguous(), *cache.parts[0].tensors(), cache.value_channel, None, 2, 4)
    for found, expected in zip(triton_kernel.attend(*arguments), reference.attend(*arguments), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
