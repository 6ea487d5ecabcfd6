"""``plain``: an ordinary checkpoint whose weights are the quantized values, rounded once to the source's
dtype.

Any engine runs it. It is how schemes that no engine loads (2 and 3 bits) are judged, and the reference that
served checkpoints are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.writer import TensorSpec
from quant.formats.base import FormatRegistry, QuantizedLayers
from quant.schemes import Scheme
from quant.vllm.layers import Linear

if TYPE_CHECKING:
    import torch

    from quant.tensors import QuantizedTensor


class Plain:
    name = "plain"
    quant_method: str | None = None
    config_file: str | None = None
    kv_cache = False
    mixed = True

    def refuse(self, scheme: Scheme, target: str) -> str | None:
        return None

    def problems(self, linear: Linear) -> list[str]:
        return []

    def specs(self, linear: Linear, dtype: str) -> list[TensorSpec]:
        return [TensorSpec(f"{linear.name}.weight", dtype, (linear.n, linear.k))]

    def pack(self, linear: Linear, tensor: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {f"{linear.name}.weight": tensor.dequantize().to(dtype)}

    def unpack(
        self, linear: Linear, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> QuantizedTensor:
        raise AssertionError("a plain checkpoint has no quantized linears to unpack")

    def config(
        self, linears: Sequence[Linear], unquantized: Sequence[str], act_order: str, kv_cache: bool = False
    ) -> None:
        return None

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> QuantizedLayers:
        return QuantizedLayers(self.name, {}, {})


FormatRegistry.add(Plain.name, Plain())
