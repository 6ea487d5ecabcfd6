"""What numbers a weight becomes, in vLLM's words. No torch here: planning and verification read schemes too.

The letters used everywhere: a linear computes ``y = x·Wᵀ`` with W of shape [N, K] (N outputs, K inputs); ``g`` is the group size along
K, ``b`` the bits, and a weight is stored as ``W = (q - z)·s`` with integer codes q, scales s and zero points z.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from quant.errors import UsageError, one_of

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class WeightScheme:
    """Integer weights with one scale per group of ``group_size`` inputs, or per output channel when ``group_size`` is -1."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"bits is {self.bits}: must be one of {', '.join(map(str, BITS))}")
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise UsageError(f"group size is {self.group_size}: must be -1 (one group per output channel) or a multiple of 8 from 8 up")

    @property
    def strategy(self) -> Literal["channel", "group"]:
        return "channel" if self.group_size == -1 else "group"

    @property
    def low(self) -> int:
        """Smallest code; codes are signed, -2^(b-1) … 2^(b-1)-1."""
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def groups(self, k: int) -> int:
        """Number of groups over K inputs.

        Raises:
            UsageError: K is not a multiple of the group size (vLLM has no ragged last group).
        """
        if self.group_size == -1:
            return 1
        if k % self.group_size:
            raise UsageError(f"{k} inputs do not divide into groups of {self.group_size}: use a group size that divides {k}, or -1")
        return k // self.group_size

    def bits_per_weight(self, k: int, scale_bits: int = 16) -> float:
        """Storage per weight with scales and zero points counted."""
        return self.bits + (scale_bits + (0 if self.symmetric else self.bits)) * self.groups(k) / k

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"W{self.bits} {group} {'symmetric' if self.symmetric else 'asymmetric'}"


@dataclass(frozen=True)
class Scheme:
    """A named scheme: the number format of the weights; activations stay in the model's own dtype (weight-only)."""

    name: str
    weights: WeightScheme

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "weights": self.weights.to_dict()}

    def __str__(self) -> str:
        return f"{self.name} ({self.weights})"


#: Name → scheme. The names are those vLLM's and llm-compressor's users know; w2a16 and w3a16 have no vLLM kernel and leave only as `plain`
#: or for other engines.
PRESETS = {
    "w4a16": Scheme("w4a16", WeightScheme(4, 128, True)),
    "w4a16-asym": Scheme("w4a16-asym", WeightScheme(4, 128, False)),
    "w8a16": Scheme("w8a16", WeightScheme(8, 128, True)),
    "w8a16-asym": Scheme("w8a16-asym", WeightScheme(8, 128, False)),
    "w3a16": Scheme("w3a16", WeightScheme(3, 128, True)),
    "w2a16": Scheme("w2a16", WeightScheme(2, 128, True)),
}


def scheme_of(weights: WeightScheme) -> Scheme:
    """The scheme that these weights make, under the name a preset of the same bits and symmetry has."""
    suffix = "" if weights.symmetric else "-asym"
    return Scheme(f"w{weights.bits}a16{suffix}", weights)


def resolve_scheme(
    name: str | None = None, *, bits: int | None = None, group_size: int | None = None, symmetric: bool | None = None
) -> Scheme:
    """A preset with single fields overridden.

    >>> str(resolve_scheme("w4a16", group_size=64))
    'w4a16 (W4 g64 symmetric)'

    Raises:
        UsageError: unknown name; or a field that contradicts the name (``w4a16`` with 8 bits).
    """
    if name is not None and name not in PRESETS:
        raise one_of("scheme", name, sorted(PRESETS))
    base = PRESETS[name] if name else PRESETS["w4a16"]
    if name and bits is not None and bits != base.weights.bits:
        raise UsageError(f"scheme {name} has {base.weights.bits} bits, --bits says {bits}: give one of the two")
    if name and name.endswith("-asym") and symmetric:
        raise UsageError(f"scheme {name} is asymmetric, --symmetric contradicts it: use {name.removesuffix('-asym')}")
    changes: dict[str, Any] = {k: v for k, v in dict(bits=bits, group_size=group_size, symmetric=symmetric).items() if v is not None}
    return scheme_of(replace(base.weights, **changes))
