"""GGUF's blocks of 32 with signed codes, read: ``P.blocks`` uint8 [N, bytes of a row], as the file has them.

Q4_0, Q5_0 and Q8_0, and Q4_1 where its minima are whole steps (:mod:`quant.gguf.blocks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.writer import TensorSpec
from quant.formats.base import FOREIGN, ForeignFormat, QuantizedLayers, Role, require
from quant.gguf.blocks import SCHEMES, codes_of, zeros_of
from quant.gguf.levels import BLOCK, row_bytes
from quant.gguf.reading import BLOCKS, interleaved_places
from quant.vllm.layers import Linear

if TYPE_CHECKING:
    import torch

    from quant.tensors import QuantizedTensor


class Gguf(ForeignFormat):
    name = "gguf"
    quant_method = "gguf"
    parts: ClassVar[Mapping[str, Role]] = {BLOCKS: "codes"}

    def specs(self, linear: Linear, dtype: str) -> list[TensorSpec]:
        """Of 8 bits the rows of Q8_0: those of Q5_0 are shorter, which a linear does not tell."""
        types = {4: "Q4_0" if linear.weights.symmetric else "Q4_1", 8: "Q8_0"}
        size = row_bytes(types[linear.weights.bits], linear.k)
        return [TensorSpec(f"{linear.name}.{BLOCKS}", "U8", (linear.n, size))]

    def unpack(
        self, linear: Linear, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> QuantizedTensor:
        import torch

        from quant.tensors import QuantizedTensor

        blocks = tensors[f"{linear.name}.{BLOCKS}"].numpy()
        heads = options["interleaved"].get(linear.name.rpartition(".")[2])
        if heads is not None:
            blocks = blocks[interleaved_places(linear.n, heads)]
        type_ = options["types"][linear.name]
        codes, scales = codes_of(blocks, type_)
        zeros = zeros_of(blocks) if type_ == "Q4_1" else None
        return QuantizedTensor(
            torch.from_numpy(codes),
            torch.from_numpy(scales),
            None if zeros is None else torch.from_numpy(zeros),
            linear.weights,
        )

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> QuantizedLayers:
        linears, types = {}, config["types"]
        require(tensors, types, BLOCKS)
        for name, type_ in types.items():
            rows, size = tensors[f"{name}.{BLOCKS}"].shape
            linears[name] = Linear(name, rows, size // row_bytes(type_, BLOCK) * BLOCK, SCHEMES[type_])
        return QuantizedLayers(
            self.name, linears, {"types": types, "interleaved": config.get("interleaved") or {}}
        )


FOREIGN[Gguf.name] = Gguf()
