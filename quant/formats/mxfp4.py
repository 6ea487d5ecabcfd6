"""gpt-oss' own MXFP4: the experts of a layer as two tensors, everything else as it was.

``Q_blocks`` uint8 [E, rows, G, 16]: E2M1 codes of 32 values, the even one in the low half of a byte;
``Q_scales`` uint8 [E, rows, G]: exponent + 127. In an ordinary checkpoint of the family they are ``Q``
[E, 32·G, rows]. Source: transformers 5 `integrations/mxfp4.py::convert_moe_packed_tensors`; the numbers are
those of OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.writer import TensorSpec
from quant.errors import CheckpointError
from quant.formats.base import Contents, Format, FormatRegistry, QuantizedLayers, Role, Stack, StackPart
from quant.schemes import PRESETS, Scheme
from quant.vllm.layers import Linear

if TYPE_CHECKING:
    import torch

    from quant.checkpoint.reader import Checkpoint
    from quant.tensors import QuantizedTensor

_WEIGHTS = PRESETS["mxfp4a16"].weights
_GROUP = _WEIGHTS.group_size


class Mxfp4(Format):
    name = "mxfp4"
    quant_method = "mxfp4"
    also = frozenset({"gpt-oss-mxfp4"})
    stacked = True
    #: of one expert; a file has those of all experts in one tensor, see :meth:`stack_specs`
    parts: ClassVar[Mapping[str, Role]] = {"blocks": "codes", "scales": "scales"}

    def refuse(self, scheme: Scheme, target: str) -> str | None:
        return None if scheme.weights == _WEIGHTS and scheme.activations is None else "use --scheme mxfp4a16"

    def leaves(self, name: str) -> str | None:
        return None if ".experts." in name else f"--format {self.name} has a place for routed experts alone"

    def specs(self, linear: Linear, dtype: str) -> list[TensorSpec]:
        groups = linear.k // _GROUP
        return [
            TensorSpec(f"{linear.name}.blocks", "U8", (linear.n, groups, _GROUP // 2)),
            TensorSpec(f"{linear.name}.scales", "U8", (linear.n, groups)),
        ]

    def stack_specs(self, name: str, experts: int, rows: int, columns: int) -> list[TensorSpec]:
        groups = columns // _GROUP
        return [
            TensorSpec(f"{name}_blocks", "U8", (experts, rows, groups, _GROUP // 2)),
            TensorSpec(f"{name}_scales", "U8", (experts, rows, groups)),
        ]

    def pack(self, linear: Linear, tensor: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        from quant.formats.packing import pack_halves

        blocks = pack_halves(tensor.codes).view(linear.n, linear.k // _GROUP, _GROUP // 2)
        return {f"{linear.name}.blocks": blocks, f"{linear.name}.scales": tensor.scales}

    def unpack(
        self, linear: Linear, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> QuantizedTensor:
        from quant.formats.packing import unpack_halves
        from quant.tensors import QuantizedTensor

        codes = unpack_halves(tensors[f"{linear.name}.blocks"].reshape(linear.n, linear.k // 2))
        return QuantizedTensor(codes, tensors[f"{linear.name}.scales"], None, _WEIGHTS)

    def config(self, contents: Contents) -> dict[str, Any]:
        # as published files have it: one pattern for all blocks, attention as a whole
        left = (re.sub(r"\.\d+\.", ".*.", x) for x in contents.unquantized if ".experts." not in x)
        named = dict.fromkeys(re.sub(r"(?<=\.self_attn)\..*", "", x) for x in left)
        return {"quant_method": self.quant_method, "modules_to_not_convert": [*named]}

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> QuantizedLayers:
        linears = {}
        for name, blocks in tensors.items():
            if not name.endswith("_blocks") or blocks.dtype != "U8":
                continue
            stem = name.removesuffix("_blocks")
            scales = tensors.get(f"{stem}_scales")
            if scales is None:
                raise CheckpointError(
                    f"{name} has no {stem}_scales beside it: the checkpoint is incomplete, fetch its files "
                    "again"
                )
            shape = blocks.shape
            if len(shape) != 4 or shape[3] != 16 or scales.dtype != "U8" or scales.shape != shape[:3]:
                raise CheckpointError(
                    f"{name} is {blocks.dtype} {shape}, {stem}_scales {scales.dtype} {scales.shape}: U8 "
                    "[E, rows, G, 16] and U8 [E, rows, G] are needed"
                )
            experts, rows, groups = shape[:3]
            linears[stem] = Stack(
                stem,
                (experts, 32 * groups, rows),
                _WEIGHTS,
                (name, scales.name),
                (32, 1),
                partial(_expert, stem),
            )
        return QuantizedLayers(self.name, {}, {}, stacks=linears)


def _expert(stem: str, checkpoint: Checkpoint, expert: int) -> StackPart:
    """One expert, [32·G, rows]."""
    from quant.formats.packing import unpack_halves

    blocks = checkpoint.read_index(f"{stem}_blocks", expert)
    rows, groups = blocks.shape[:2]
    codes = unpack_halves(blocks.reshape(rows, groups * 16))
    return StackPart(codes, checkpoint.read_index(f"{stem}_scales", expert), (1, 32)).turned


FormatRegistry.add(Mxfp4.name, Mxfp4())
