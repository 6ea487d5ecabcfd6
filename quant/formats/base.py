"""What a format is: names, dtypes and shapes on disk, the words of ``quantization_config``, and the way back.
No torch at import."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from quant.checkpoint.header import WIDE_FLOATS, TensorInfo
from quant.checkpoint.writer import TensorSpec
from quant.errors import CheckpointError, QuantError, clipped
from quant.registry import Registry, lacks
from quant.schemes import BLOCK, PRESETS, ActivationScheme, Scheme, WeightScheme
from quant.vllm.config import quantization_config, source_method
from quant.vllm.layers import (
    BuiltLayer,
    Linear,
    experts_transposed,
    ignored_names,
    is_head,
    stored_transposed,
)

if TYPE_CHECKING:
    import torch

    from quant.checkpoint.reader import Checkpoint
    from quant.tensors import QuantizedTensor

#: What a tensor of a linear holds: the fields of :class:`quant.tensors.QuantizedTensor`, and the weight's
#: shape.
Role = Literal["codes", "scales", "zeros", "group_index", "global_scale", "inputs", "shape"]
#: Says what is wrong with the bytes of a whole tensor, or None.
ValueCheck = Callable[[bytes], "str | None"]
#: Linears that a message names before it says "…".
_NAMED = 5


@dataclass(frozen=True)
class StackPart:
    """One expert of a stack.

    Attributes:
        codes: [rows, columns] as the file has them: float8, or E2M1 codes as uint8.
        scales: [⌈rows / sides[0]⌉, ⌈columns / sides[1]⌉], as :func:`quant.tensors.scale_values` takes them.
        sides: rows and columns that share one.
        divisor: fp32 [1], of all scales (NVFP4); None: none.
        inputs: fp32 [1], the scale of static activations, of E2M1 codes its divisor; None: none.
        zeros: zero points, as the scales; None: none.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    sides: tuple[int, int]
    divisor: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    zeros: torch.Tensor | None = None

    @property
    def turned(self) -> StackPart:
        """The same with rows and columns exchanged."""
        zeros = None if self.zeros is None else self.zeros.t()
        return replace(
            self, codes=self.codes.t(), scales=self.scales.t(), zeros=zeros, sides=self.sides[::-1]
        )

    def values(self) -> torch.Tensor:
        """fp32 [rows, columns]."""
        from quant.tensors import code_values, scale_values

        values = code_values(self.codes.contiguous())
        if self.zeros is not None:
            values -= self._spread(self.zeros.float())
        return values.mul_(self._spread(scale_values(self.scales, self.divisor)))

    def _spread(self, shared: torch.Tensor) -> torch.Tensor:
        """A number for each code, from those that several share."""
        rows, columns = self.codes.shape
        spread = shared.repeat_interleave(self.sides[0], 0)[:rows]
        return spread.repeat_interleave(self.sides[1], 1)[:, :columns]


@dataclass(frozen=True)
class Stack:
    """A matrix of every expert of a layer, quantized as one tensor.

    Attributes:
        name: of the tensor that it is in an ordinary checkpoint of the family.
        shape: of that one, [E, rows, columns].
        weights: its numbers.
        tensors: of the file that it is made of.
        sides: rows and columns of an expert that share a multiplier.
        part: one expert, laid out as ``shape``.
        inputs: how its inputs are rounded; None: not at all.
        inputs_last: the file has inputs as columns, whatever an ordinary file of the family has.
    """

    name: str
    shape: tuple[int, int, int]
    weights: WeightScheme
    tensors: tuple[str, ...]
    sides: tuple[int, int]
    part: Callable[[Checkpoint, int], StackPart]
    inputs: ActivationScheme | None = None
    inputs_last: bool = False

    @property
    def turned(self) -> Stack:
        """The same with rows and columns exchanged."""
        experts, rows, columns = self.shape
        own = self.part
        return replace(
            self,
            shape=(experts, columns, rows),
            sides=self.sides[::-1],
            part=lambda checkpoint, expert: own(checkpoint, expert).turned,
        )

    def read(self, checkpoint: Checkpoint, expert: int) -> torch.Tensor:
        """Values of one expert, fp32 of ``shape[1:]``."""
        return self.part(checkpoint, expert).values()


@dataclass(frozen=True)
class StackSlice:
    """A linear [N, K] of one expert of a stack: of the outputs ``first``, ``first + step``, … ``n`` of them.

    Attributes:
        transposed: outputs are the columns of the stack's parts, not their rows.
    """

    stack: Stack
    expert: int
    n: int
    k: int
    first: int = 0
    step: int = 1
    transposed: bool = False

    @property
    def sides(self) -> tuple[int, int]:
        """Outputs and inputs that share a multiplier."""
        return self.stack.sides[::-1] if self.transposed else self.stack.sides

    @property
    def scheme(self) -> WeightScheme | None:
        """Its numbers where its codes stand by themselves; None where it shares multipliers with other
        linears, or one for each input has no place in any scheme."""
        outputs, inputs = self.sides
        total = self.stack.shape[2 if self.transposed else 1]
        weights = self.stack.weights
        if weights.type == "int" or weights.strategy in ("group", "tensor_group"):
            return weights if outputs == 1 or weights.strategy == "tensor" else None
        if outputs >= total and inputs >= self.k:
            return PRESETS["w8a8-fp8-tensor"].weights
        if outputs == 1 and inputs >= self.k:
            return PRESETS["w8a8-fp8"].weights
        ragged = outputs > 1 and (self.step > 1 or self.first % outputs)
        if ragged or inputs < 8 or inputs % 8:
            return None
        if (outputs, inputs) == (BLOCK, BLOCK):
            return PRESETS["fp8-block"].weights
        group = gcd(self.k, inputs)  # a ragged last block is in groups as well
        return None if group % 8 else WeightScheme(8, group, True, "float", "group", "F32")

    def read(self, checkpoint: Checkpoint) -> QuantizedTensor:
        """Its codes and scales as they are stored."""
        from quant.tensors import InputParameters, QuantizedTensor

        scheme = self.scheme
        assert scheme is not None
        part = self.stack.part(checkpoint, self.expert)
        part = part.turned if self.transposed else part
        outputs = part.sides[0]
        taken = slice(self.first, self.first + self.step * self.n, self.step)
        if scheme.strategy == "tensor":
            scales = part.scales
        elif outputs == 1:
            scales = part.scales[taken]
        elif scheme.strategy == "block":
            scales = part.scales[self.first // outputs : -(-(self.first + self.n) // outputs)]
        else:
            scales = part.scales.repeat_interleave(outputs, 0)[taken]
        if scheme.strategy == "group" and part.sides[1] != scheme.group_size:
            each = part.sides[1] // scheme.group_size
            scales = scales.repeat_interleave(each, 1)[:, : self.k // scheme.group_size]
        inputs = None
        if part.inputs is not None and self.stack.inputs is not None and self.stack.inputs.calibrated:
            four = scheme.bits == 4
            inputs = InputParameters(**{"global_scale" if four else "scale": part.inputs.reshape(1)})
        scales = scales.reshape(scheme.scale_shape(self.n, self.k)).contiguous()
        codes = part.codes[taken].contiguous()
        zeros = None if part.zeros is None else part.zeros[taken].contiguous()
        return QuantizedTensor(codes, scales, zeros, scheme, None, part.divisor, inputs)


@dataclass(frozen=True)
class QuantizedLayers:
    """What a checkpoint says of itself: its quantized linears by name, and the format that wrote them.

    Attributes:
        format: its name.
        linears: by name.
        options: what the format needs to read tensors back (GPTQ's zero-point convention, for one).
        stored: tensors whose names differ from the format's own → the names that the file has.
        stacks: experts that are quantized as one tensor, by the name of the tensor that each stands for.
        slices: linears that are parts of such a tensor, by name: those of stacks that are taken apart.
    """

    format: str
    linears: Mapping[str, Linear]
    options: Mapping[str, Any]
    stored: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    slices: Mapping[str, StackSlice] = field(default_factory=dict)

    @property
    def form(self) -> Format:
        """The format itself."""
        return format_of(self.format)

    def tensor(self, name: str) -> str:
        """The file's name of a tensor, from the format's own."""
        return self.stored.get(name, name)

    @property
    def schemes(self) -> dict[str, int]:
        """How many matrices have which numbers, in words."""
        counts: dict[str, int] = {}
        for linear in self.linears.values():
            counts[str(linear.weights)] = counts.get(str(linear.weights), 0) + 1
        for stack in self.stacks.values():
            counts[str(stack.weights)] = counts.get(str(stack.weights), 0) + stack.shape[0]
        return counts


@dataclass(frozen=True)
class Contents:
    """What a format is told of a checkpoint, to put it into the words of its config.

    Attributes:
        linears: the quantized ones.
        unquantized: names of the linears that are left alone, none of them in ``linears``.
        kv_cache: the ``kv_cache_scheme`` of calibrated scales of an FP8 KV cache that are in the file, or
            None.
        settings: of the method that chose the codes, by name. ``act_order`` is ``static`` where columns were
            visited by importance with groups in natural order, ``group`` where groups follow that order.
        model_types: of the model's config and its parts, by which vLLM fuses linears.
    """

    linears: Sequence[Linear]
    unquantized: Sequence[str] = ()
    kv_cache: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    model_types: tuple[str, ...] = ()

    def left_alone(self, patterns: bool = False) -> list[str]:
        """What the config lists of them; see :func:`quant.vllm.layers.ignored_names`."""
        quantized = {linear.name for linear in self.linears}
        return ignored_names(self.unquantized, quantized, self.model_types, patterns)


class Format(ABC):
    """One on-disk format. A format derives from this class and says what differs from it; the abstract verbs
    are those that every format has words of its own for.

    Attributes:
        name: what ``--format`` is given.
        quant_method: vLLM's word for it in ``quantization_config``, or None where the result is an ordinary
            checkpoint.
        also: other words for it.
        parts: the tensors of a linear ``P``, by the last part of their names (``P.qweight``: ``qweight``),
            and what each holds. Readers take these and no others for a part of the linear.
        config_file: a second place for ``quantization_config`` that older readers of the format look in.
        own_keys: keys of a ``quantization_config`` that only this format has, by which a config of an older
            program that names no method is recognised.
        kv_cache: whether its config has a word for calibrated scales of an FP8 KV cache.
        stacked: whether it has all experts of a layer in the tensors of :meth:`stack_specs`, and names none.
        keeps_kv_cache: whether files of it hold such scales without a word in the config; they are kept where
            a file of the format is written anew.
    """

    name: ClassVar[str]
    quant_method: ClassVar[str | None]
    also: ClassVar[frozenset[str]] = frozenset()
    parts: ClassVar[Mapping[str, Role]]
    config_file: ClassVar[str | None] = None
    own_keys: ClassVar[frozenset[str]] = frozenset()
    kv_cache: ClassVar[bool] = False
    keeps_kv_cache: ClassVar[bool] = False
    stacked: ClassVar[bool] = False

    @abstractmethod
    def refuse(self, scheme: Scheme, target: str) -> str | None:
        """Why ``target`` ("vllm" or "other") cannot take this scheme in this format, or None."""

    @abstractmethod
    def specs(self, linear: Linear, dtype: str) -> list[TensorSpec]:
        """The tensors that replace ``<name>.weight``, in file order; ``dtype`` is the model's."""

    @abstractmethod
    def pack(self, linear: Linear, tensor: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors of ``specs``, those in the model's dtype as ``dtype``."""

    @abstractmethod
    def unpack(
        self, linear: Linear, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> QuantizedTensor:
        """Inverse of ``pack``; ``tensors`` has the names of the checkpoint."""

    @abstractmethod
    def config(self, contents: Contents) -> dict[str, Any] | None:
        """The ``quantization_config``; None of an ordinary checkpoint."""

    @abstractmethod
    def find(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> QuantizedLayers:
        """Reads ``quantization_config`` and headers of a checkpoint of this format.

        Raises:
            CheckpointError: they contradict each other, or are written in a way that is not read here.
        """

    def problems(self, linear: Linear) -> list[str]:
        """What the format cannot hold of a linear whose scheme it takes: its shape, or its place in the
        model."""
        return []

    def leaves(self, name: str) -> str | None:
        """Why a linear stays in 16 bits in every file of the format, or None."""
        return None

    def stack_specs(self, name: str, experts: int, rows: int, columns: int) -> list[TensorSpec]:
        """The tensors that replace a fused one of all experts of a layer, ``rows`` outputs and ``columns``
        inputs each: those of :meth:`pack` of one of them, by the last part of the name, with a first
        dimension of experts."""
        return []

    def together(self, schemes: Collection[Scheme]) -> bool:
        """Whether one file may hold linears of all these schemes."""
        return len(set(schemes)) <= 1

    def keeps_order(self, target: str) -> bool:
        """Whether ``target`` reads groups in activation order (a ``group_index``) from a file of this
        format."""
        return False

    def config_problems(
        self, config: Mapping[str, Any], layers: QuantizedLayers, members: Mapping[str, BuiltLayer]
    ) -> list[str]:
        """What vLLM refuses in a ``quantization_config``, or understands otherwise than the file means it.

        Args:
            layers: what :meth:`find` read.
            members: by the name of the layer that vLLM builds, the linears of the file that become it;
                see :func:`quant.vllm.layers.built_layers`.
        """
        return []

    def value_check(self, linear: Linear, last: str, options: Mapping[str, Any]) -> ValueCheck | None:
        """What the bytes of the tensor ``<name>.<last>`` are tested for besides what its role asks of every
        format; None: nothing."""
        return None

    def lasts(self, *roles: Role) -> tuple[str, ...]:
        """Last parts of the names of the tensors that have one of these roles."""
        return tuple(last for last, role in self.parts.items() if role in roles)


class ForeignFormat(Format):
    """A format of other programs: read, never written."""

    def refuse(self, scheme: Scheme, target: str) -> str | None:
        return None

    def pack(self, linear: Linear, tensor: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        raise AssertionError(f"{self.name} is read, not written")

    def config(self, contents: Contents) -> dict[str, Any] | None:
        raise AssertionError(f"{self.name} is read, not written")


#: Formats that are read alone, by name.
FOREIGN: dict[str, ForeignFormat] = {}


def format_of(name: str) -> Format:
    """The format that read a checkpoint.

    Raises:
        UsageError: no such format.
    """
    return FOREIGN[name] if name in FOREIGN else FormatRegistry.get(name)


def _no_format(entry: Any) -> str | None:
    if isinstance(entry, Format):
        return lacks(entry, "name", "quant_method", "parts")
    kind = f"the class {entry.__name__}" if isinstance(entry, type) else type(entry).__name__
    return f"it is not an object of a class derived from quant.formats.Format but {kind}"


FormatRegistry: Registry[Format] = Registry("format", "quant.formats", _no_format, named=True)


class IncompleteCheckpoint(CheckpointError):
    """Quantized linears lack tensors; ``problems`` has a line for each kind of tensor."""

    def __init__(self, missing: Sequence[tuple[str, str]]):
        (module, last), more = missing[0], len(missing) - 1
        super().__init__(
            f"{module} is quantized but has no tensor '{module}.{last}'"
            f"{f' (and {more} more)' if more else ''}: the checkpoint is incomplete, fetch its files again"
        )
        self.problems = missing_tensors(missing)


def missing_tensors(missing: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each kind of tensor that linears lack, from pairs of a linear and a name's last part."""
    kinds: dict[str, list[str]] = {}
    for module, last in sorted(missing):
        kinds.setdefault(last, []).append(module)
    return [
        f"{len(modules)} quantized linears have no {last} "
        f"({', '.join(modules[:_NAMED])}{', …' if len(modules) > _NAMED else ''}): "
        "the checkpoint is incomplete, fetch its files again"
        for last, modules in kinds.items()
    ]


def require(tensors: Mapping[str, TensorInfo], modules: Iterable[str], *lasts: str) -> None:
    """Demands the tensors ``<module>.<last>``.

    Raises:
        IncompleteCheckpoint: some are missing, which vLLM would turn into NaN without a word.
    """
    missing = [(m, last) for m in modules for last in lasts if f"{m}.{last}" not in tensors]
    if missing:
        raise IncompleteCheckpoint(missing)


def suffixed(names: Iterable[str], suffix: str) -> list[str]:
    """Module names of the tensors that end in ``suffix``, in order."""
    return sorted(n.removesuffix(suffix) for n in names if n.endswith(suffix))


def names_listed(config: Mapping[str, Any], key: str) -> list[str]:
    """A list of module names (some of them ``re:`` and a regular expression) in a quantization_config; empty
    where it is absent or null.

    Raises:
        CheckpointError: it is something else.
    """
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(n, str) for n in value):
        raise CheckpointError(
            f"config.json: quantization_config has {key} {clipped(value)}: a list of module names is "
            "needed: repair it"
        )
    for name in value:
        try:
            re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
        except re.error as error:
            raise CheckpointError(
                f"config.json: quantization_config has {key} {clipped(name)}: no regular expression "
                f"({error}): repair it"
            ) from error
    return value


@contextmanager
def _understood(method: str) -> Iterator[None]:
    """Turns what a format trips over in a hostile or damaged config into an error that names the config."""
    try:
        yield
    except CheckpointError:
        raise
    except (
        QuantError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        re.error,
    ) as error:
        raise CheckpointError(
            f"config.json: its quantization_config ({method}) cannot be understood: "
            f"{str(error)[:200]}: repair it, or fetch the checkpoint again"
        ) from error


class UnreadMethod(CheckpointError):
    """A ``quant_method`` that is not read here, which says nothing of whether an engine serves it."""

    def __init__(self, method: str):
        self.method = method
        entries = [*FormatRegistry, *FOREIGN.values()]
        readable = ", ".join(sorted(f.name for f in entries if f.quant_method))
        super().__init__(
            f"the checkpoint is quantized as quant_method {clipped(method)}, which is not read here; "
            f"read are {readable}: start from the original, or from a checkpoint in one of these"
        )


#: Header dtypes of codes that nothing but a scale makes values of.
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")


def find_format(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> QuantizedLayers | None:
    """The format of a checkpoint and its quantized linears, or None where it is not quantized.

    Raises:
        UnreadMethod: no format here has its quant_method.
        CheckpointError: quantized in a way this build does not read.
    """
    quantization = quantization_config(config)
    if quantization is None:
        # what MLX wrote has its own key, and its words in uint32
        if isinstance(config.get("quantization"), Mapping) and any(
            t.dtype == "U32" for t in tensors.values()
        ):
            raise UnreadMethod("mlx")
        for info in tensors.values():
            scale = scale_beside(info, tensors)
            integers = info.name.endswith(".weight") and len(info.shape) == 2 and info.dtype in _INTEGERS
            if scale is not None or integers:
                raise CheckpointError(
                    f"{info.name} is stored as {info.dtype}{f', beside {scale}' if scale else ''}: the file "
                    "is quantized, and config.json has no quantization_config that says how: fetch "
                    "config.json (and hf_quant_config.json or quantize_config.json, where there is one) of "
                    "this checkpoint again"
                )
        return None
    method = source_method(quantization) or ""
    # other packages' formats are imported last, where no other reads the file
    for entry in chain(FormatRegistry.loaded(), FOREIGN.values(), FormatRegistry):
        if entry.quant_method is not None and method in {entry.quant_method, *entry.also}:
            with _understood(method):
                return _turned(entry, quantization, config, tensors)
    raise UnreadMethod(method)


def _turned(
    entry: Format,
    quantization: Mapping[str, Any],
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
) -> QuantizedLayers:
    """:meth:`Format.find` for a format that need not know which families store weights [K, N]."""
    turned = {
        name: replace(info, shape=info.shape[::-1])
        for name, info in tensors.items()
        if name.endswith(".weight") and stored_transposed(config, name.removesuffix(".weight"))
    }
    layers = entry.find(quantization, {**tensors, **turned} if turned else tensors)
    linears = {
        name: replace(linear, transposed=True) if stored_transposed(config, name) else linear
        for name, linear in layers.linears.items()
    }
    # files that keep groups of inputs beside one another have the inputs last, whatever the family
    stacks = {
        name: stack.turned if stack.inputs_last and experts_transposed(config) else stack
        for name, stack in layers.stacks.items()
    }
    held = {name for stack in layers.stacks.values() for name in stack.tensors}
    unread = [
        name
        for name, info in tensors.items()
        if name.rpartition(".")[0] not in linears
        and name not in held
        and (
            (name.endswith(".weight") and len(info.shape) == 2 and info.dtype not in WIDE_FLOATS)
            or (info.dtype.startswith("F8_") and scale_beside(info, tensors) is not None)
        )
    ]
    if unread:
        more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
        raise CheckpointError(
            f"{unread[0]} is stored as {tensors[unread[0]].dtype}{more}, which is not read of quant_method "
            f"{entry.quant_method!r}: quantize the original"
        )
    return replace(layers, linears=linears, stacks=stacks)


def scale_beside(info: TensorInfo, tensors: Collection[str]) -> str | None:
    """The multiplier that lies beside a matrix of codes, in any format's spelling; None where there is none,
    or where the matrix holds values."""
    if len(info.shape) < 2 or info.dtype in WIDE_FLOATS:
        return None
    module, name = info.name.rpartition(".")[0], info.name
    spellings = [f"{name}{end}" for end in ("_scale", "_scale_inv", "_weight_scale", "_weight_scale_inv")]
    spellings += [f"{module}.{last}" for last in ("weight_scale", "weight_scale_inv", "scale", "scales")]
    spellings.append(f"{name.removesuffix('_blocks')}_scales")
    return next((s for s in spellings if s in tensors and s != name), None)


def config_problems(
    config: Mapping[str, Any], layers: QuantizedLayers, members: Mapping[str, BuiltLayer]
) -> list[str]:
    """:meth:`Format.config_problems` of the format that a checkpoint is in.

    Raises:
        CheckpointError: the config cannot be understood.
    """
    with _understood(layers.format):
        return layers.form.config_problems(config, layers, members)


def head_problems(config: Mapping[str, Any], layers: QuantizedLayers) -> list[str]:
    """Quantized output heads of which ``lm_head`` says nothing, by which vLLM knows those of GPTQ and AWQ
    files."""
    return [
        f"{name} is quantized, but lm_head is not true: vLLM would build it in full precision"
        for name in layers.linears
        if is_head(name) and not config.get("lm_head")
    ]


def constant_words(field: int, bits: int) -> ValueCheck:
    """Tests packed zero points of symmetric weights: every field of ``bits`` bits must be ``field``."""
    import numpy as np

    word = sum(field << shift for shift in range(0, 32, bits))
    return lambda data: (
        None
        if bool((np.frombuffer(data, "<u4") == word).all())
        else f"is not the constant {word:#010x} of symmetric weights"
    )


def word_problems(linear: Linear, inputs: bool = True, outputs: bool = True) -> list[str]:
    """Sides that do not fill whole 32-bit words."""
    per = 32 if linear.weights.bits == 3 else 32 // linear.weights.bits
    return [
        f"{linear.name}: {count} {what} do not fill whole 32-bit words at {linear.weights.bits} bits (a "
        f"multiple of {per} is needed): --ignore the layer"
        for count, what, asked in ((linear.k, "inputs", inputs), (linear.n, "outputs", outputs))
        if asked and count % per
    ]
