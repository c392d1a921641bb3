"""Packing: the bit order by hand, and rows against the stream, code by code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eff_kernels.packing import ROW_BITS, pack_bits, pack_rows, unpack_bits, unpack_rows


def test_codes_are_packed_little_endian():
    # 3-bit codes 1, 2, 3: bits 100 010 110 from the least significant -> 0b11010001, 0b0
    assert pack_bits(torch.tensor([1, 2, 3]), 3).tolist() == [0b11010001, 0]


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), data=st.data())
def test_unpacking_gives_back_what_was_packed(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    packed = pack_bits(torch.tensor(codes, dtype=torch.int32), bits)
    assert packed.numel() == -(-len(codes) * bits // 8)
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="pack_bits: codes has values from 0 to 4, expected 0 to 3"):
        pack_bits(torch.tensor([0, 4]), 2)
    with pytest.raises(ValueError, match="unpack_bits: packed has 1 bytes, expected 2 for 5 codes of 2 bits"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), 2, 5)
    with pytest.raises(ValueError, match="pack_bits: bits is 9, expected 1 to 8"):
        pack_bits(torch.tensor([0]), 9)
    with pytest.raises(TypeError, match="unpack_bits: bits is 2.5, expected an integer"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), 2.5, 1)
    with pytest.raises(TypeError, match="unpack_bits: packed is int32, expected uint8"):
        unpack_bits(torch.zeros(1, dtype=torch.int32), 2, 1)


def test_codes_in_float_are_refused_and_not_cut_off():
    for pack, codes in ((pack_bits, torch.tensor([0.5])), (pack_rows, torch.full((1, 8), 1.0))):
        with pytest.raises(TypeError, match=f"{pack.__name__}: codes is float32, expected uint8"):
            pack(codes, 4)
    assert pack_bits(torch.tensor([True, False, True]), 1).tolist() == [0b101]


@pytest.mark.parametrize("bits", ROW_BITS)
@pytest.mark.parametrize(("n", "k"), [(1, 8), (3, 24), (0, 8), (5, 1024)])
def test_rows_are_streams_of_their_own(bits, n, k):
    codes = torch.randint(0, 2**bits, (n, k), generator=torch.Generator().manual_seed(0))
    packed = pack_rows(codes, bits)
    assert packed.shape == (n, k * bits // 8) and packed.dtype == torch.uint8
    assert torch.equal(packed.flatten(), pack_bits(codes, bits))
    unpacked = unpack_rows(packed, bits)
    assert unpacked.dtype == torch.uint8 and torch.equal(unpacked.long(), codes)
    for row, line in zip(packed, codes, strict=True):
        assert unpack_bits(row, bits, k).tolist() == line.tolist()


@pytest.mark.parametrize("bits", ROW_BITS)
def test_every_bit_is_where_the_definition_says(bits):
    codes = torch.randint(0, 2**bits, (2, 16), generator=torch.Generator().manual_seed(1))
    stream = "".join(format(code, f"0{bits}b")[::-1] for code in codes.flatten().tolist())
    expected = [int(stream[start : start + 8][::-1], 2) for start in range(0, len(stream), 8)]
    assert pack_rows(codes, bits).flatten().tolist() == expected


@pytest.mark.parametrize("bits", ROW_BITS)
def test_unpacking_does_not_write_to_the_packed_rows(bits):
    packed = torch.full((2, 24), 255, dtype=torch.uint8)
    unpack_rows(packed, bits).zero_()
    assert (packed == 255).all()


def test_codes_that_hold_no_values_are_refused():
    with pytest.raises(TypeError, match="pack_rows: codes is list, expected"):
        pack_rows([[0] * 8], 4)
    for pack in (pack_bits, pack_rows):
        with pytest.raises(ValueError, match=f"{pack.__name__}: codes is on meta, expected a device that holds values"):
            pack(torch.zeros(1, 8, dtype=torch.uint8, device="meta"), 4)


def test_rows_that_do_not_fit_bytes_are_refused():
    with pytest.raises(
        ValueError, match=r"pack_rows: codes has shape \(2, 9\), expected \(N, K\) with K a multiple of 8"
    ):
        pack_rows(torch.zeros(2, 9, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="unpack_rows: bits is 5, expected one of 2, 3, 4, 8"):
        unpack_rows(torch.zeros(2, 5, dtype=torch.uint8), 5)
