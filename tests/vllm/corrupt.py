"""Mistakes that a writer of formats can make: each changes values and leaves every name, dtype and shape as
it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def _edit(path: Path, names: Callable[[str], bool], change: Callable[[torch.Tensor], torch.Tensor]) -> int:
    """Changes every tensor whose name is chosen; returns how many."""
    count = 0
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        for name in [n for n in tensors if names(n)]:
            changed = change(tensors[name])
            assert changed.shape == tensors[name].shape and changed.dtype == tensors[name].dtype
            assert not torch.equal(changed, tensors[name]), name
            tensors[name] = changed.contiguous()
            count += 1
        save_file(tensors, file, metadata={"format": "pt"})
    return count


def _swap_nibbles(words: torch.Tensor) -> torch.Tensor:
    """The two values of every byte change places: the order in which a packer fills it."""
    data = words.contiguous().view(torch.uint8)
    return ((data >> 4) | (data << 4)).view(torch.int32)


def _add_one_to_zeros(words: torch.Tensor) -> torch.Tensor:
    """Every packed 4-bit zero point one higher (15 stays): GPTQ's v1 against v2."""
    data = words.contiguous().view(torch.uint8)
    low, high = data & 0xF, data >> 4
    return ((low + (low < 15)) | ((high + (high < 15)) << 4)).view(torch.int32)


def nibble_order(path: Path, only: str) -> int:
    return _edit(path, lambda n: only in n and n.endswith(("weight_packed", "qweight")), _swap_nibbles)


def zero_points(path: Path, only: str) -> int:
    return _edit(path, lambda n: only in n and n.endswith(("weight_zero_point", "qzeros")), _add_one_to_zeros)


def scales_of_the_wrong_output(path: Path, only: str) -> int:
    """Scales shifted by one output channel: the rows of [N, groups], the columns of GPTQ's [groups, N]."""
    shifted = _edit(path, lambda n: only in n and n.endswith("weight_scale"), lambda t: t.roll(1, 0))
    return shifted + _edit(path, lambda n: only in n and n.endswith(".scales"), lambda t: t.roll(1, 1))


def scales_of_the_wrong_group(path: Path, only: str) -> int:
    """Scales in reverse order of groups."""
    reversed_ = _edit(
        path, lambda n: only in n and n.endswith(("weight_scale", "weight_scale_inv")), lambda t: t.flip(1)
    )
    return reversed_ + _edit(path, lambda n: only in n and n.endswith(".scales"), lambda t: t.flip(0))


def input_scales_of_half_the_range(path: Path, only: str) -> int:
    """The largest magnitude divided by 255 where 127.5 is meant."""
    return _edit(path, lambda n: only in n and n.endswith("input_scale"), lambda t: t / 2)


def input_zero_points_of_unsigned_codes(path: Path, only: str) -> int:
    """128 higher, as codes from 0 to 255 would have them."""
    return _edit(
        path,
        lambda n: only in n and n.endswith("input_zero_point"),
        lambda t: (t.view(torch.uint8) ^ 0x80).view(torch.int8),
    )


def cache_scales_not_divided(path: Path, only: str) -> int:
    """The largest magnitude itself, where its 448th is meant."""
    return _edit(path, lambda n: only in n and n.endswith(("k_scale", "v_scale")), lambda t: t * 448)
