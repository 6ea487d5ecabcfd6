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
from quant.registry import Registry, lacks
from quant.schemes import Scheme
from quant.vllm.config import quantization_config
from quant.vllm.layers import Linear

if TYPE_CHECKING:
    import torch

    from quant.tensors import QuantizedTensor


@dataclass(frozen=True)
class QuantizedLayers:
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

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> QuantizedLayers:
        """Reads ``quantization_config`` and headers of a checkpoint of this format."""
        ...


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


def find_format(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> QuantizedLayers | None:
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
    per = 32 if linear.weights.bits == 3 else 32 // linear.weights.bits
    return [
        f"{linear.name}: {count} {what} do not fill whole 32-bit words at {linear.weights.bits} bits (a "
        f"multiple of {per} is needed): --ignore the layer"
        for count, what, asked in ((linear.k, "inputs", inputs), (linear.n, "outputs", outputs))
        if asked and count % per
    ]
