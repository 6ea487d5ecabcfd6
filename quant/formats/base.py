"""What a format is: names, dtypes and shapes on disk, the words of ``quantization_config``, and the way back.
No torch at import."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.writer import TensorSpec
from quant.errors import CheckpointError, QuantError, clipped
from quant.models.adapter import fused_name
from quant.registry import Registry, lacks
from quant.schemes import BLOCK, ActivationScheme, Scheme, WeightScheme, scheme_of

if TYPE_CHECKING:
    import torch

    from quant.tensors import QuantizedTensor


@dataclass(frozen=True)
class Linear:
    """A quantized linear as a format sees it: ``name`` without ``.weight``, N outputs, K inputs, the numbers
    of weights and activations."""

    name: str
    n: int
    k: int
    scheme: WeightScheme
    activations: ActivationScheme | None = None

    @property
    def numbers(self) -> Scheme:
        """Weights and activations together, under their name."""
        return scheme_of(self.scheme, self.activations)


@dataclass(frozen=True)
class Found:
    """What a checkpoint says of itself: its quantized linears by name, and the format that wrote them.

    ``options`` holds what the format needs to read tensors back (GPTQ's zero-point convention, for one).
    """

    format: str
    linears: Mapping[str, Linear]
    options: Mapping[str, Any]


class Format(Protocol):
    """One on-disk format. ``quant_method`` is vLLM's word for it, or None where the result is an ordinary
    checkpoint."""

    name: str
    quant_method: str | None
    #: a second place for ``quantization_config`` that older readers of the format look in
    config_file: str | None
    #: whether calibrated scales of an FP8 KV cache have a place in it
    kv_cache: bool
    #: whether one file may hold several schemes
    mixed: bool

    def refuse(self, scheme: Scheme, target: str) -> str | None:
        """Why ``target`` ("vllm" or "other") cannot take this scheme in this format, or None."""
        ...

    def specs(self, linear: Linear, dtype: str) -> list[TensorSpec]:
        """The tensors that replace ``<name>.weight``, in file order; ``dtype`` is the model's."""
        ...

    def problems(self, linear: Linear) -> list[str]:
        """What in the shape the format cannot hold."""
        ...

    def pack(self, linear: Linear, tensor: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors of ``specs``, those in the model's dtype as ``dtype``."""
        ...

    def unpack(
        self, linear: Linear, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> QuantizedTensor:
        """Inverse of ``pack``; ``tensors`` has the names of the checkpoint."""
        ...

    def config(
        self, linears: Sequence[Linear], unquantized: Sequence[str], act_order: str, kv_cache: bool = False
    ) -> dict[str, Any] | None:
        """The ``quantization_config``; ``unquantized`` names the linears left alone, ``kv_cache`` says that
        scales of an FP8 cache are there."""
        ...

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Found:
        """Reads ``quantization_config`` and headers of a checkpoint of this format."""
        ...


#: Linears whose input is split over ranks under tensor parallelism; all others split their output.
_ROW_PARALLEL = re.compile(r"\.(o_proj|down_proj|out_proj|dense|dense_4h_to_h|fc2|c_proj|wo|w2)$")

_PARTS = (
    "name",
    "quant_method",
    "config_file",
    "kv_cache",
    "mixed",
    "refuse",
    "specs",
    "problems",
    "pack",
    "unpack",
    "config",
    "find",
)
#: Shards of a fused layer that another one follows.
NOT_LAST = (".q_proj", ".k_proj", ".gate_proj")

FormatRegistry: Registry[Format] = Registry("format", "quant.formats", lambda entry: lacks(entry, *_PARTS))


def require(tensors: Mapping[str, TensorInfo], name: str, linear: str) -> TensorInfo:
    """A tensor's header entry.

    Raises:
        CheckpointError: it is missing, which vLLM would turn into NaN without a word.
    """
    if name not in tensors:
        raise CheckpointError(
            f"{linear} is quantized but has no tensor {name!r}: the checkpoint is incomplete, make it again"
        )
    return tensors[name]


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


def quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where vLLM looks for it: ``quantization_config``, the one inside ``text_config``,
    ``compression_config``.

    Raises:
        CheckpointError: it is not an object.
    """
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        found = place.get("quantization_config")
        if found:
            return _an_object(found)
    found = config.get("compression_config")
    return _an_object(found) if found else None


def _an_object(found: object) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise CheckpointError(
            f"config.json: quantization_config is not an object but {str(found)[:60]!r}: repair it, or "
            "fetch the checkpoint again"
        )
    return found


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """Header name of the dtype that config.json states, in which vLLM keeps scales; None where it states none
    that weights are stored in."""
    text = config.get("text_config")
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    for place in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if place.get(key):
                return names.get(str(place[key]).removeprefix("torch."))
    return None


def find_format(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Found | None:
    """The format of a checkpoint and its quantized linears, or None where it is not quantized.

    Raises:
        CheckpointError: quantized in a way this build does not read.
    """
    quantization = quantization_config(config)
    if quantization is None:
        return None
    method = str(quantization.get("quant_method", "")).lower().replace("_", "-")
    for entry in FormatRegistry:
        if entry.quant_method is not None and entry.quant_method == method:
            try:
                return entry.find(quantization, tensors)
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
    readable = ", ".join(sorted(f.quant_method for f in FormatRegistry if f.quant_method))
    raise CheckpointError(
        f"the checkpoint is quantized as quant_method {method!r}, which is not read here; read are {readable}"
    )


def word_problems(linear: Linear, inputs: bool = True, outputs: bool = True) -> list[str]:
    """Sides that do not fill whole 32-bit words."""
    per = 32 if linear.scheme.bits == 3 else 32 // linear.scheme.bits
    return [
        f"{linear.name}: {count} {what} do not fill whole 32-bit words at {linear.scheme.bits} bits (a "
        f"multiple of {per} is needed): --ignore the layer"
        for count, what, asked in ((linear.k, "inputs", inputs), (linear.n, "outputs", outputs))
        if asked and count % per
    ]


def shape_problems(linears: Iterable[Linear], tensor_parallel: int) -> list[str]:
    """Group sizes that do not divide, whole and per rank; one line for each kind of layer."""
    linears = list(linears)
    members: dict[str, int] = {}
    for linear in linears:
        members[fused_name(linear.name)] = members.get(fused_name(linear.name), 0) + 1
    seen: dict[str, str] = {}
    for linear in linears:
        kind = re.sub(r"\.\d+\.", ".*.", linear.name)
        g, block = linear.scheme.group_size, linear.scheme.strategy == "block"
        if kind in seen:
            continue
        ignore = f"--ignore '{kind.rsplit('.', 1)[-1]}'"
        if g != -1 and linear.k % g:
            # of blocks too: the file may have a ragged last one, but vLLM's kernels quantize activations in
            # whole groups of 128
            if linear.scheme.number == "float":
                use = "--scheme w8a8-fp8"
            else:
                fits = [x for x in (128, 64, 32, 16, 8) if linear.k % x == 0 and x < g]
                use = f"--group-size {fits[0]} or -1" if fits else "--group-size -1"
            seen[kind] = f"{kind}: {linear.k} inputs do not divide into groups of {g}: use {use}, or {ignore}"
        elif (
            block
            and linear.n % BLOCK
            and members[fused_name(linear.name)] > 1
            and linear.name.endswith(NOT_LAST)
        ):
            seen[kind] = (
                f"{kind}: {linear.n} outputs do not divide into blocks of {BLOCK}, which vLLM demands of "
                "all shards of a fused layer but the last: "
                f"use --scheme w8a8-fp8, or {ignore}"
            )
        elif tensor_parallel > 1:
            row = _ROW_PARALLEL.search(linear.name)
            size, what = (linear.k, "inputs") if row else (linear.n, "outputs")
            unit = (g if g != -1 else 1) if row else BLOCK if block else 8
            if size % tensor_parallel or (size // tensor_parallel) % unit:
                allowed = [t for t in (1, 2, 4, 8, 16, 32) if size % t == 0 and (size // t) % unit == 0]
                pieces = f"groups of {g}" if row else f"blocks of {BLOCK}" if block else "words of 8"
                seen[kind] = (
                    f"{kind}: {size} {what} over --tensor-parallel {tensor_parallel} do not divide into "
                    f"{pieces}: "
                    "tensor parallel sizes that do: "
                    f"{', '.join(map(str, allowed)) or 'none'}{'' if linear.scheme.number == 'float' else '; or a smaller --group-size'}"
                )
    return list(seen.values())
