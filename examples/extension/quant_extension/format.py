"""A format of one byte a code: ``P.qweight`` int8 [N, K] and ``P.scales`` [N, G], without zero points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.writer import TensorSpec
from quant.formats.base import Contents, Format, QuantizedLayers, require, suffixed
from quant.schemes import Scheme, WeightScheme
from quant.vllm.layers import Linear

if TYPE_CHECKING:
    import torch

    from quant.tensors import QuantizedTensor


class Codes(Format):
    name = "codes"
    quant_method = "codes"
    parts = {"qweight": "codes", "scales": "scales"}

    def refuse(self, scheme: Scheme, target: str) -> str | None:
        if scheme.weights.type != "int" or not scheme.weights.symmetric or scheme.activations is not None:
            return f"holds symmetric integer weights alone, not {scheme}"
        return "vLLM does not know it: use --target other" if target == "vllm" else None

    def specs(self, linear: Linear, dtype: str) -> list[TensorSpec]:
        return [
            TensorSpec(f"{linear.name}.qweight", "I8", (linear.n, linear.k)),
            TensorSpec(f"{linear.name}.scales", dtype, linear.weights.scale_shape(linear.n, linear.k)),
        ]

    def pack(self, linear: Linear, tensor: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {f"{linear.name}.qweight": tensor.codes, f"{linear.name}.scales": tensor.scales.to(dtype)}

    def unpack(
        self, linear: Linear, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> QuantizedTensor:
        from quant.tensors import QuantizedTensor

        return QuantizedTensor(
            tensors[f"{linear.name}.qweight"], tensors[f"{linear.name}.scales"], None, linear.weights
        )

    def config(self, contents: Contents) -> dict[str, Any]:
        weights = contents.linears[0].weights
        return {"quant_method": "codes", "bits": weights.bits, "group_size": weights.group_size}

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> QuantizedLayers:
        scheme = WeightScheme(int(config["bits"]), int(config["group_size"]))
        linears, coded = {}, suffixed(tensors, ".qweight")
        require(tensors, coded, "scales")
        for name in coded:
            n, k = tensors[f"{name}.qweight"].shape
            linears[name] = Linear(name, n, k, scheme)
        return QuantizedLayers(self.name, linears, {})


codes = Codes()
