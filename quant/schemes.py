"""What numbers a weight and an activation become, in vLLM's words, and one row for each scheme that has a
name. No torch here: planning and verification read schemes too.

The letters used everywhere: a linear computes ``y = x·Wᵀ`` with W of shape [N, K] (N outputs, K inputs);
``g`` is the group size along K, ``b`` the bits. An integer weight is stored as ``W = (q - z)·s`` with integer
codes q, scales s and zero points z; a float weight as ``W = f·s``, where f is an FP8 (E4M3) or FP4 (E2M1)
number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from math import ceil
from typing import Any, Literal

from quant.errors import UsageError
from quant.registry import Registry

BITS = (2, 3, 4, 8)
#: Rows and columns of one scale of the ``block`` strategy.
BLOCK = 128


@dataclass(frozen=True)
class WeightScheme:
    """The numbers of a weight.

    Attributes:
        bits: of one code.
        group_size: inputs that share a scale; -1: all of them (and see ``strategy``).
        symmetric: no zero points; floats always are.
        type: ``int``, or ``float`` (E4M3 at 8 bits, E2M1 at 4, the model's own dtype at 16).
        strategy: which weights share a scale, in compressed-tensors' words: ``group``, ``channel`` (an
            output's), ``tensor`` (all), ``block`` (128 × 128), ``tensor_group`` (groups whose scales are
            scaled by one number for the tensor). Empty: by the group size.
        scales: how scales are stored: ``model`` (the model's own dtype), or a dtype of a safetensors header:
            F32, F8_E4M3, or U8, which stands for powers of two (E8M0).
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    type: Literal["int", "float"] = "int"
    strategy: str = ""
    scales: str = "model"

    def __post_init__(self) -> None:
        if self.bits not in BITS and not (self.bits == 16 and self.type == "float"):
            raise UsageError(f"bits is {self.bits}: must be one of {', '.join(map(str, BITS))}")
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise UsageError(
                f"group size is {self.group_size}: must be -1 (one group per output channel) or a multiple "
                "of 8 from 8 up"
            )
        if not self.strategy:
            object.__setattr__(self, "strategy", "channel" if self.group_size == -1 else "group")
        if self.type == "float" and (self.bits not in (4, 8, 16) or not self.symmetric):
            raise UsageError(
                f"float weights have 4, 8 or 16 bits and no zero points, not {self.bits} bits, symmetric "
                f"{self.symmetric}"
            )

    @property
    def low(self) -> int:
        """Smallest code of integers; codes are signed, -2^(b-1) … 2^(b-1)-1."""
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def largest(self) -> float:
        """Largest magnitude of a code as a number: of E4M3 448, of E2M1 6, of integers ``high``."""
        return {4: 6.0, 8: 448.0}[self.bits] if self.type == "float" else float(self.high)

    def groups(self, k: int) -> int:
        """Number of groups over K inputs.

        Raises:
            UsageError: K is not a multiple of the group size (vLLM has no ragged last group; blocks may be
                ragged).
        """
        if self.group_size == -1:
            return 1
        if self.strategy == "block":
            return -(-k // self.group_size)
        if k % self.group_size:
            raise UsageError(
                f"{k} inputs do not divide into groups of {self.group_size}: use a group size that divides "
                f"{k}, or -1"
            )
        return k // self.group_size

    def scale_shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of the scales of a weight [N, K]."""
        if self.strategy == "tensor":
            return 1, 1
        return (-(-n // BLOCK) if self.strategy == "block" else n), self.groups(k)

    def bits_per_weight(self, k: int, scale_bits: int = 16) -> float:
        """Storage per weight with scales and zero points counted."""
        return self.bits + (scale_bits + (0 if self.symmetric else self.bits)) * self.groups(k) / k

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.bits == 16:
            return "weights as they are"
        group = f"g{self.group_size}" if self.strategy in ("group", "tensor_group") else self.strategy
        if self.type == "float":
            family = {"U8": "MXFP", "F8_E4M3": "NVFP"}.get(self.scales, "FP")
            return f"{family}{self.bits} {group}"
        return f"W{self.bits} {group} {'symmetric' if self.symmetric else 'asymmetric'}"


@dataclass(frozen=True)
class ActivationScheme:
    """The numbers of a linear's input, in compressed-tensors' words.

    ``dynamic``: scales are taken from each token's (or group's) values as they come; otherwise one calibrated
    scale is in the file. ``tensor_group`` (NVFP4) is dynamic under one calibrated number for the tensor.
    """

    bits: int = 8
    type: Literal["int", "float"] = "int"
    strategy: Literal["token", "tensor", "group", "tensor_group"] = "token"
    symmetric: bool = True
    dynamic: bool = True
    group_size: int | None = None
    scales: str = "F32"

    @property
    def calibrated(self) -> bool:
        """Whether the file holds a number that only calibration gives."""
        return not self.dynamic or self.strategy == "tensor_group"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        family = "INT" if self.type == "int" else {"U8": "MXFP", "F8_E4M3": "NVFP"}.get(self.scales, "FP")
        if self.bits == 16:
            return "weights as they are"
        group = f"g{self.group_size}" if self.group_size else self.strategy
        return (
            f"{family}{self.bits} {'dynamic' if self.dynamic else 'static'} "
            f"{group}{'' if self.symmetric else ' asymmetric'}"
        )


@dataclass(frozen=True)
class Scheme:
    """A named scheme. Without ``activations`` they stay in the model's own dtype (weight-only)."""

    name: str
    weights: WeightScheme
    activations: ActivationScheme | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "weights": self.weights.to_dict(),
            "activations": None if self.activations is None else self.activations.to_dict(),
        }

    @property
    def group_size_is_free(self) -> bool:
        """Whether the group size is the user's to choose: in weight-only integers."""
        return self.weights.type == "int" and self.activations is None

    def with_group_size(self, size: int) -> Scheme:
        """The same scheme with another group size, -1 for one group an output."""
        return replace(self, weights=replace(self.weights, group_size=size, strategy=""))

    @property
    def compute_format(self) -> str:
        """The number format in which weights and activations are multiplied where a GPU has kernels for it:
        ``fp8``, ``int8`` or ``fp4``; ``fp16`` where activations stay as they are."""
        if self.activations is None:
            return "fp16"
        return f"{'int' if self.activations.type == 'int' else 'fp'}{self.activations.bits}"

    def stored_tensors(self, n: int, k: int, width: int) -> dict[str, int]:
        """Bytes of what a compressed-tensors file holds of a linear [N, K], by the last part of the tensor's
        name.

        It is the sum over :meth:`quant.formats.Format.specs`, which planning does not ask because importing
        the formats takes a quarter of the time in which it answers.

        Args:
            width: bytes of a value in the model's own dtype.

        >>> PRESETS["w4a16"].stored_tensors(4096, 4096, 2)
        {'weight_packed': 8388608, 'weight_scale': 262144, 'weight_shape': 16}
        """
        return _stored_tensors(self.weights, self.activations, n, k, width)

    def stored_bytes(self, n: int, k: int, width: int) -> float:
        """Sum of :meth:`stored_tensors`."""
        return _stored_bytes(self.weights, self.activations, n, k, width)

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.weights}{f', activations {self.activations}' if self.activations else ''})"
        )


@lru_cache(maxsize=4096)  # a model's blocks repeat a few shapes, and every plan asks for each of them
def _stored_bytes(weights: WeightScheme, inputs: ActivationScheme | None, n: int, k: int, width: int) -> int:
    return sum(_stored_tensors(weights, inputs, n, k, width).values())


def _stored_tensors(
    weights: WeightScheme, inputs: ActivationScheme | None, n: int, k: int, width: int
) -> dict[str, int]:
    if weights.bits == 16:
        return {"weight": n * k * width}
    words = weights.type == "int" and inputs is None  # int32, each row filled up to a whole one
    halves = weights.type == "float" and weights.bits == 4
    codes = 4 * n * ceil(k * weights.bits / 32) if words else n * ceil(k * weights.bits / 8)
    groups = 1 if weights.group_size == -1 else ceil(k / weights.group_size)
    rows = {"tensor": 1, "block": ceil(n / BLOCK)}.get(weights.strategy, n)
    each = {"model": width, "F32": 4}.get(weights.scales, 1)
    tensors = {
        "weight_packed" if words or halves else "weight": codes,
        "weight_scale": rows * groups * each,
    }
    if words and not weights.symmetric:
        tensors["weight_zero_point"] = 4 * ceil(n * weights.bits / 32) * groups
    if words:
        tensors["weight_shape"] = 16
    if weights.strategy == "tensor_group":
        tensors["weight_global_scale"] = 4
    if inputs is not None and inputs.strategy == "tensor_group":
        tensors["input_global_scale"] = 4
    elif inputs is not None and not inputs.dynamic:
        tensors["input_scale"] = 4
        if not inputs.symmetric:
            tensors["input_zero_point"] = 1
    return tensors


_FP8_TOKEN = ActivationScheme(8, "float", "token")
_FP8_GROUP = ActivationScheme(8, "float", "group", group_size=BLOCK)
_NVFP4_INPUTS = ActivationScheme(4, "float", "tensor_group", group_size=16, scales="F8_E4M3")
_MX_INPUTS = {bits: ActivationScheme(bits, "float", "group", group_size=32, scales="U8") for bits in (4, 8)}
_NVFP4 = WeightScheme(4, 16, True, "float", "tensor_group", "F8_E4M3")


def _fp8(strategy: str) -> WeightScheme:
    return WeightScheme(8, BLOCK if strategy == "block" else -1, True, "float", strategy, "F32")


#: What method ``none`` makes: weights in the model's own dtype. No preset, because nothing is quantized.
UNQUANTIZED = Scheme("none", WeightScheme(16, -1, True, "float", "channel"))


@dataclass(frozen=True)
class SchemeRow:
    """A scheme that has a name, with all that its numbers do not say.

    Attributes:
        methods: values of ``--method`` that make it, the preferred one first. Eight bits of weights are
            within noise when simply rounded, so the method that needs no data comes first there. Empty: vLLM
            has no kernel, so that it leaves only as ``plain`` or for other engines.
        title: what it is, in a list of recommendations; empty: :meth:`Scheme.__str__`.
        rank: its place among the schemes that are recommended unasked, most precise first; None: it is
            planned only where it is asked for.
        native: recommended only where the GPU computes in it, because unpacking its weights gives no gain
            over a simpler scheme.
        needs: recipe keys without which it is not good.
        suits: recipe keys that a job which reads calibration text takes along, because some models need them
            and no other loses by them; a choice by layers goes without.
        default_of: methods whose scheme it is where none is named; asked of quant's own rows alone.
        finer: name of the scheme that layers take which lose too much in this one; empty: 16 bits.
    """

    scheme: Scheme
    methods: tuple[str, ...] = ()
    title: str = ""
    rank: int | None = None
    native: bool = False
    needs: Mapping[str, str] = field(default_factory=dict)
    suits: Mapping[str, str] = field(default_factory=dict)
    default_of: tuple[str, ...] = ()
    finer: str = ""

    @property
    def name(self) -> str:
        return self.scheme.name


#: Methods of schemes of few bits, the preferred one first.
SOLVED = ("yaqa", "gptq", "minmax")
_FP8, _ROUNDED = ("fp8",), ("minmax", "gptq")

#: Of 4-bit inputs: an outlier takes the range of all others of its group.
_SMOOTHED = {"outlier_suppression": "smooth_quant", "alpha": "auto"}

#: quant's own schemes by name; :data:`SchemeRegistry` has those of other packages, too. The names are those
#: that vLLM's and llm-compressor's users know; w2a16 and w3a16 have no vLLM kernel.
SCHEMES = {
    row.name: row
    for row in (
        SchemeRow(
            Scheme("w4a16", WeightScheme(4, 128, True)),
            SOLVED,
            "4-bit weights (GPTQ, AWQ)",
            rank=4,
            finer="w8a16",
        ),
        SchemeRow(
            Scheme("w4a16-asym", WeightScheme(4, 128, False)),
            SOLVED,
            default_of=("awq",),  # asymmetric, as its paper and its users have it
            finer="w8a16",
        ),
        SchemeRow(Scheme("w8a16", WeightScheme(8, 128, True)), _ROUNDED, "8-bit weights", rank=2),
        SchemeRow(Scheme("w8a16-asym", WeightScheme(8, 128, False)), _ROUNDED),
        SchemeRow(Scheme("w3a16", WeightScheme(3, 128, True)), finer="w4a16"),
        SchemeRow(Scheme("w2a16", WeightScheme(2, 128, True)), finer="w3a16"),
        SchemeRow(
            Scheme("w8a8-int8", WeightScheme(8, -1, True, scales="F32"), ActivationScheme()),
            _ROUNDED,
            "INT8 weights and activations",
            rank=3,
            native=True,
            # eight-bit integer activations lose their outliers without smoothing
            needs={"outlier_suppression": "smooth_quant"},
        ),
        SchemeRow(
            Scheme("w8a8-fp8", _fp8("channel"), _FP8_TOKEN),
            _FP8,
            "FP8 weights and activations",
            rank=1,
            native=True,
            default_of=("fp8",),
        ),
        SchemeRow(Scheme("w8a8-fp8-tensor", _fp8("tensor"), _FP8_TOKEN), _FP8),
        SchemeRow(Scheme("fp8-block", _fp8("block"), _FP8_GROUP), _FP8),
        SchemeRow(Scheme("w8a16-fp8", _fp8("channel")), _FP8),
        SchemeRow(
            Scheme("nvfp4", _NVFP4, _NVFP4_INPUTS),
            SOLVED,
            "NVFP4 weights and activations",
            rank=5,
            native=True,
            suits=_SMOOTHED,
            finer="w8a8-fp8",
        ),
        SchemeRow(Scheme("nvfp4a16", _NVFP4), SOLVED, finer="w8a16-fp8"),
        SchemeRow(
            Scheme("mxfp4", WeightScheme(4, 32, True, "float", "group", "U8"), _MX_INPUTS[4]),
            SOLVED,
            suits=_SMOOTHED,
            finer="mxfp8",
        ),
        SchemeRow(
            Scheme("mxfp4a16", WeightScheme(4, 32, True, "float", "group", "U8")),
            SOLVED,
            finer="w8a16-fp8",
        ),
        SchemeRow(
            Scheme("mxfp8", WeightScheme(8, 32, True, "float", "group", "U8"), _MX_INPUTS[8]), _ROUNDED
        ),
    )
}
#: Name → scheme of quant's own, without what only its row knows.
PRESETS = {name: row.scheme for name, row in SCHEMES.items()}
#: The checkpoint as it is, among what is recommended.
AS_IT_IS = SchemeRow(UNQUANTIZED, title="16 bits, as it is", rank=0)
#: The scheme where neither it nor a method with one of its own is named.
DEFAULT_SCHEME = "w4a16"


def _no_row(entry: Any) -> str | None:
    """Why something is no row of a scheme, or None."""
    if not isinstance(entry, SchemeRow):
        return f"it is not a quant.schemes.SchemeRow but {type(entry).__name__}"
    numbers = (entry.scheme.weights, entry.scheme.activations)
    same = [s.name for s in (UNQUANTIZED, *PRESETS.values()) if (s.weights, s.activations) == numbers]
    return f"its numbers are those of scheme {same[0]!r}" if same else None


#: Every scheme that ``--scheme`` takes.
SchemeRegistry: Registry[SchemeRow] = Registry("scheme", "quant.schemes", _no_row, named=True)
for _row in SCHEMES.values():
    SchemeRegistry.add(_row.name, _row)


def row_of(scheme: Scheme) -> SchemeRow:
    """The row of a scheme, whose single fields may differ from the preset's; one that makes nothing where no
    preset has its name."""
    named = {row.name: row for row in (AS_IT_IS, *SchemeRegistry.loaded())}
    return replace(named.get(scheme.name, SchemeRow(scheme)), scheme=scheme)


def candidates() -> list[SchemeRow]:
    """What is recommended unasked, most precise first."""
    ranked = [(row.rank, row) for row in (AS_IT_IS, *SchemeRegistry) if row.rank is not None]
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


def default_scheme(method: str) -> str:
    """The name of a method's scheme where none is named.

    >>> default_scheme("awq"), default_scheme("gptq")
    ('w4a16-asym', 'w4a16')
    """
    return next((row.name for row in SCHEMES.values() if method in row.default_of), DEFAULT_SCHEME)


def scheme_of(weights: WeightScheme, activations: ActivationScheme | None = None) -> Scheme:
    """The scheme that these numbers make, under the name of the preset they are, or of the nearest one. Of
    other packages' schemes those count that were asked for by name."""
    rows = SchemeRegistry.loaded()
    # a mixture has tens of thousands of linears
    return _named(weights, activations, tuple(map(id, rows)))[0]


@lru_cache(maxsize=1024)
def _named(
    weights: WeightScheme, activations: ActivationScheme | None, _: tuple[int, ...]
) -> tuple[Scheme, list[SchemeRow]]:
    """:func:`scheme_of`, told apart by the identities of the rows that are loaded; which come along, so that
    no other row gets the identity of one that is remembered."""
    rows = SchemeRegistry.loaded()
    return _nearest(weights, activations, [row.scheme for row in rows]), rows


def _nearest(
    weights: WeightScheme, activations: ActivationScheme | None, presets: Sequence[Scheme]
) -> Scheme:
    for preset in (UNQUANTIZED, *presets):
        if (preset.weights, preset.activations) == (weights, activations):
            return preset
    if weights.type == "int" and activations is None:
        return Scheme(f"w{weights.bits}a16{'' if weights.symmetric else '-asym'}", weights)
    for preset in presets:
        if preset.weights == weights and (preset.activations is None) == (activations is None):
            return Scheme(preset.name, weights, activations)
    kind = {"int": "int", "float": "fp"}[weights.type]
    inputs = "16" if activations is None else f"{activations.bits}"
    return Scheme(f"w{weights.bits}a{inputs}-{kind}{weights.bits}", weights, activations)


def resolve_scheme(
    name: str | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    activations: str | None = None,
    symmetric_activations: bool | None = None,
) -> Scheme:
    """A scheme of :data:`SchemeRegistry` with single fields overridden.

    Args:
        activations: ``dynamic`` or ``static``.
        symmetric_activations: False: integer activations with a zero point.

    >>> str(resolve_scheme("w4a16", group_size=64))
    'w4a16 (W4 g64 symmetric)'

    Raises:
        UsageError: unknown name, or one of another package that is at fault; or fields that contradict the
            name (``w4a16`` with 8 bits), all of them at once.
    """
    base = SchemeRegistry.get(name or DEFAULT_SCHEME).scheme
    weights, inputs = base.weights, base.activations
    wrong = []
    if name and bits is not None and bits != weights.bits:
        wrong.append(f"scheme {name} has {weights.bits} bits, --bits says {bits}: give one of the two")
    if name and name.endswith("-asym") and symmetric:
        wrong.append(
            f"scheme {name} is asymmetric, --symmetric contradicts it: use {name.removesuffix('-asym')}"
        )
    if symmetric is False and (weights.type == "float" or inputs is not None):
        wrong.append(
            f"scheme {base.name} has no zero points for weights, --asymmetric contradicts it: use "
            "w4a16-asym or w8a16-asym"
        )
    if (
        group_size is not None
        and (weights.type == "float" or inputs is not None)
        and group_size != weights.group_size
    ):
        wrong.append(
            f"scheme {base.name} shares scales by {weights.strategy}, which is fixed: leave --group-size "
            f"{group_size} out"
        )
    if inputs is None and (activations is not None or symmetric_activations is not None):
        wrong.append(
            f"scheme {base.name} leaves activations as they are: --activations needs a scheme such as "
            "w8a8-int8 or w8a8-fp8"
        )
    elif inputs is not None:
        if activations == "static" and (inputs.group_size is not None):
            wrong.append(
                f"scheme {base.name} scales activations in groups of {inputs.group_size}, which is always "
                "dynamic: leave --activations out"
            )
        if symmetric_activations is False and inputs.type == "float":
            wrong.append(
                f"scheme {base.name} has float activations, which have no zero point: only w8a8-int8 has "
                "--asymmetric-activations"
            )
    if wrong:
        raise UsageError("; ".join(wrong))
    changes: dict[str, Any] = {
        k: v for k, v in dict(bits=bits, group_size=group_size, symmetric=symmetric).items() if v is not None
    }
    if changes:
        weights = replace(
            weights, **changes, strategy=weights.strategy if weights.type == "float" or inputs else ""
        )
    if inputs is not None and activations == "static":
        inputs = replace(inputs, dynamic=False, strategy="tensor")
    if inputs is not None and symmetric_activations is False:
        inputs = replace(inputs, symmetric=False)
    return scheme_of(weights, inputs)
