"""Packing against a reference that works bit by bit, and against worked vectors."""

from __future__ import annotations

import pytest
import torch

from quant.formats.packing import pack, pack_halves, unpack, unpack_halves, unsigned

BITS = (2, 3, 4, 8)


def slow_pack(values: list[int], bits: int) -> list[int]:
    """One bit at a time, value after value, lowest first, into a stream that is then read as little-endian
    words of 32."""
    stream = [value >> bit & 1 for value in values for bit in range(bits)]
    stream += [0] * (-len(stream) % 32)
    words = [
        sum(bit << place for place, bit in enumerate(stream[start : start + 32]))
        for start in range(0, len(stream), 32)
    ]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def random_values(shape: tuple[int, ...], bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("bits", "count"),
    [(b, n) for b in BITS for n in (1, 5, 8, 16, 31, 32, 33, 64, 96, 100) if b != 3 or n % 32 == 0],
)
def test_packing_equals_the_bit_by_bit_reference_and_unpacks_again(bits: int, count: int) -> None:
    values = random_values((3, count), bits)
    words = pack(values, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [slow_pack(row, bits) for row in values.tolist()]
    again = unpack(words, bits, count)
    assert again.dtype == torch.uint8
    assert torch.equal(again.long(), values)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64, torch.uint8])
def test_any_integer_dtype_and_any_leading_shape_and_stride_packs_alike(
    bits: int, dtype: torch.dtype
) -> None:
    values = random_values((2, 3, 64), bits).clamp(max=127)
    wanted = pack(values, bits)
    assert torch.equal(pack(values.to(dtype), bits), wanted)
    assert torch.equal(pack(values.transpose(0, 1), bits), wanted.transpose(0, 1))
    assert torch.equal(unpack(wanted.transpose(0, 1), bits, 64), values.transpose(0, 1).to(torch.uint8))


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_and_the_smallest_values_fill_and_clear_every_bit(bits: int) -> None:
    assert pack(torch.full((64,), 2**bits - 1), bits).tolist() == [-1] * (2 * bits)
    assert pack(torch.zeros(64, dtype=torch.int64), bits).tolist() == [0] * (2 * bits)


@pytest.mark.parametrize(
    ("bits", "values", "words"),
    [
        (4, range(8), [0x76543210]),
        (4, range(16), [0x76543210, 0xFEDCBA98]),
        (4, range(10), [0x76543210, 0x00000098]),
        (8, [1, 2, 3, 4], [0x04030201]),
        (8, [0, 127, 128, 255], [0xFF807F00]),
        (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
        (3, [7] * 10 + [0] * 22, [0x3FFFFFFF, 0, 0]),
        (3, [0] * 10 + [7] + [0] * 21, [0xC0000000, 0x1, 0]),
    ],
)
def test_worked_vectors(bits: int, values: list[int], words: list[int]) -> None:
    packed = pack(torch.tensor(list(values)), bits)
    assert [w & 0xFFFFFFFF for w in packed.tolist()] == words


def test_three_bits_in_odd_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="3-bit packing takes multiples of 32 values, got 40"):
        pack(torch.zeros(40, dtype=torch.int64), 3)


@pytest.mark.parametrize("bits", BITS)
def test_signed_codes_become_unsigned_ones(bits: int) -> None:
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8)
    assert unsigned(codes, bits).tolist() == list(range(2**bits))
    assert unsigned(codes.view(2, -1).t(), bits).tolist() == torch.arange(2**bits).view(2, -1).t().tolist()


def test_halves_of_bytes_hold_the_even_column_below() -> None:
    codes = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    packed = pack_halves(codes)
    assert packed.dtype == torch.uint8 and packed.flatten().tolist() == [
        low | high << 4 for low, high in codes.tolist()
    ]
    assert torch.equal(unpack_halves(packed), codes)
