"""``plain``: an ordinary checkpoint whose weights are the quantized values, rounded once to the source's
dtype.

Any engine runs it. It is how schemes that no engine loads (2 and 3 bits) are judged, and the reference that
served checkpoints are compared with.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.writer import TensorSpec
from quant.formats.base import Contents, Format, FormatRegistry, QuantizedLayers, Role
from quant.schemes import Scheme
from quant.vllm.layers import Linear

if TYPE_CHECKING:
    import torch

    from quant.tensors import QuantizedTensor


class Plain(Format):
    name = "plain"
    quant_method = None
    #: nothing in it is a part of a quantized linear
    parts: ClassVar[Mapping[str, Role]] = {}

    def refuse(self, scheme: Scheme, target: str) -> str | None:
        return None

    def together(self, schemes: Collection[Scheme]) -> bool:
        return True

    def keeps_order(self, target: str) -> bool:
        return True  # the values are in natural order, whatever the groups were

    def specs(self, linear: Linear, dtype: str) -> list[TensorSpec]:
        return [TensorSpec(f"{linear.name}.weight", dtype, linear.stored_shape)]

    def pack(self, linear: Linear, tensor: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        value = tensor.dequantize().to(dtype)
        return {f"{linear.name}.weight": value.t().contiguous() if linear.transposed else value}

    def unpack(
        self, linear: Linear, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> QuantizedTensor:
        raise AssertionError("a plain checkpoint has no quantized linears to unpack")

    def config(self, contents: Contents) -> None:
        return None

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> QuantizedLayers:
        return QuantizedLayers(self.name, {}, {})


FormatRegistry.add(Plain.name, Plain())
