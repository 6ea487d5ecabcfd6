"""Packing small integers into 32-bit words, and back. Pure functions, each with its inverse beside it.

Fields are filled from the lowest bits up. Bits that divide 32 never straddle a word; 3-bit values are one
little-endian stream in which 32 values take three words (AutoGPTQ's layout,
`qlinear_cuda.py::QuantLinear.pack`).
"""

from __future__ import annotations

import torch


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs unsigned values along the last dimension.

    Args:
        values: integers [..., K], each from 0 to 2^bits - 1.
        bits: 2, 3, 4 or 8. With 3 bits K must be a multiple of 32; otherwise the last word is padded with
            zero bits.

    Returns:
        int32 [..., ceil(K·bits / 32)].
    """
    *lead, k = values.shape
    if bits == 3:
        if k % 32:
            raise ValueError(f"3-bit packing takes multiples of 32 values, got {k}")
        fields = values.to(torch.int64).reshape(*lead, k // 32, 32)
        # value j lies at bit 3j of a 96-bit stream: ten or eleven whole values a word, values 10 and 21
        # straddle two
        words = []
        for w in range(3):
            word = torch.zeros(fields.shape[:-1], dtype=torch.int64, device=values.device)
            for j in range(32):
                shift = 3 * j - 32 * w
                if -3 < shift < 32:
                    word |= (fields[..., j] << shift if shift >= 0 else fields[..., j] >> -shift) & 0xFFFFFFFF
            words.append(word)
        return _to_int32(torch.stack(words, -1).reshape(*lead, 3 * (k // 32)))
    per_word = 32 // bits
    padded = -(-k // per_word) * per_word
    if padded != k:
        values = torch.nn.functional.pad(values, (0, padded - k))
    if bits == 4:
        # two nibbles to a byte, then bytes read as words: the same little-endian order, without 64-bit
        # intermediates
        return _words(pack_halves(values.to(torch.uint8)))
    if bits == 8:
        return _words(values.to(torch.uint8))
    fields = values.to(torch.int64).reshape(*lead, padded // per_word, per_word)
    shifts = torch.arange(0, 32, bits, device=values.device)
    return _to_int32((fields << shifts).sum(-1))


def unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes from 0 up, of int8 ones from -2^(bits-1) up: sums of bytes wrap."""
    return codes.view(torch.uint8) + 2 ** (bits - 1)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Inverse of :func:`pack`: uint8 [..., count] from int32 [..., W]."""
    *lead, w = words.shape
    if bits in (4, 8):
        flat = words.reshape(-1).view(torch.uint8)
        if bits == 4:
            flat = torch.stack([flat & 0xF, flat >> 4], -1)
        return flat.reshape(*lead, w * (32 // bits))[..., :count].contiguous()
    wide = words.to(torch.int64) & 0xFFFFFFFF
    if bits == 3:
        triples = wide.reshape(*lead, w // 3, 3)
        values = []
        for j in range(32):
            word, shift = divmod(3 * j, 32)
            value = triples[..., word] >> shift
            if shift > 29:
                value |= triples[..., word + 1] << (32 - shift)
            values.append(value & 7)
        return torch.stack(values, -1).reshape(*lead, (w // 3) * 32)[..., :count].to(torch.uint8)
    shifts = torch.arange(0, 32, bits, device=words.device)
    return (
        ((wide.unsqueeze(-1) >> shifts) & (2**bits - 1))
        .reshape(*lead, w * (32 // bits))[..., :count]
        .to(torch.uint8)
    )


def _words(data: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 4·W] read as int32 [..., W]. Flattened first: a side of length one may have a stride that a
    view as words refuses."""
    return data.reshape(-1).view(torch.int32).reshape(*data.shape[:-1], data.shape[-1] // 4)


def _to_int32(words: torch.Tensor) -> torch.Tensor:
    """The same 32 bits read as a signed word."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def pack_halves(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K/2] from 4-bit codes uint8 [..., K]: the even column in the low half of a byte."""
    # as words with the even column in the low byte: contiguous ones run many times as fast as columns with
    # gaps
    pairs = codes.reshape(-1).view(torch.int16)
    return (pairs | pairs >> 4).to(torch.uint8).view(*codes.shape[:-1], codes.shape[-1] // 2)


def unpack_halves(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack_halves`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)
