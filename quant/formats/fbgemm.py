"""FBGEMM's FP8 (Llama 3.1 405B): one multiplier an output, activations by token under an upper bound.

``P.weight`` float8_e4m3fn [N, K], ``P.weight_scale`` fp32 [N, 1]. Source: transformers 5
`integrations/fbgemm_fp8.py`, vLLM's `quantization/fbgemm_fp8.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.writer import TensorSpec
from quant.formats.base import FOREIGN, ForeignFormat, QuantizedLayers, Role, names_listed
from quant.formats.scaled import multipliers, scaled_matrices, stacks
from quant.schemes import PRESETS
from quant.vllm.layers import Linear

if TYPE_CHECKING:
    import torch

    from quant.tensors import QuantizedTensor


class FbgemmFp8(ForeignFormat):
    name = "fbgemm_fp8"
    quant_method = "fbgemm-fp8"
    parts: ClassVar[Mapping[str, Role]] = {"weight": "codes", "weight_scale": "scales"}

    def specs(self, linear: Linear, dtype: str) -> list[TensorSpec]:
        return [
            TensorSpec(f"{linear.name}.weight", "F8_E4M3", (linear.n, linear.k)),
            TensorSpec(f"{linear.name}.weight_scale", "F32", linear.weights.scale_shape(linear.n, linear.k)),
        ]

    def unpack(
        self, linear: Linear, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> QuantizedTensor:
        from quant.tensors import QuantizedTensor

        scales = multipliers(tensors[f"{linear.name}.weight_scale"], linear.weights, linear.n, linear.k)
        return QuantizedTensor(tensors[f"{linear.name}.weight"], scales, None, linear.weights)

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> QuantizedLayers:
        names_listed(config, "modules_to_not_convert")
        inputs = PRESETS["w8a8-fp8"].activations
        matrices = scaled_matrices(tensors, "weight_scale")
        linears = {x.name: Linear(x.name, x.n, x.k, x.weights, inputs) for x in matrices}
        stored = {f"{x.name}.weight_scale": x.scale for x in matrices}
        stored = {own: name for own, name in stored.items() if own != name}
        return QuantizedLayers(self.name, linears, {}, stored, stacks(tensors))


FOREIGN[FbgemmFp8.name] = FbgemmFp8()
