"""vLLM's native ``fp8``: the layout of DeepSeek's and Qwen's own FP8 checkpoints, read and written.

Contract read from vLLM 0.32 (`quantization/fp8.py::Fp8Config, Fp8LinearMethod`,
`utils/fp8_utils.py::validate_fp8_block_shape`). For a linear ``P`` of [N, K]:

======================  ==================  ==================================================================
``P.weight``            float8_e4m3fn       [N, K]
``P.weight_scale_inv``  fp32                [⌈N/128⌉, ⌈K/128⌉] with ``weight_block_size``: a multiplier
``P.weight_scale``      fp32                [1] (or a scalar), without
``P.input_scale``       fp32                [1], with ``activation_scheme`` static
======================  ==================  ==================================================================

Read are other spellings, dtypes and block sizes as well: see :mod:`quant.formats.scaled`.

A file holds one scheme. Linears left alone are listed by their whole names: vLLM compares them exactly. It
never quantizes the output head. Scales of an FP8 KV cache are read from such a file, but its config has no
word for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.writer import TensorSpec
from quant.errors import CheckpointError, clipped
from quant.formats.base import (
    FOREIGN,
    Contents,
    ForeignFormat,
    Format,
    FormatRegistry,
    QuantizedLayers,
    Role,
    names_listed,
)
from quant.formats.scaled import INPUT_SCALES, STATIC, multipliers, scaled_matrices, spelled, stacks
from quant.schemes import BLOCK, PRESETS, Scheme, WeightScheme
from quant.vllm.layers import BuiltLayer, Linear, is_head, is_linear

if TYPE_CHECKING:
    import torch

    from quant.tensors import QuantizedTensor

_BLOCKS, _TENSOR = PRESETS["fp8-block"], PRESETS["w8a8-fp8-tensor"]


def _scale_name(scheme: WeightScheme) -> str:
    return "weight_scale_inv" if scheme.strategy in ("block", "group") else "weight_scale"


class Fp8(Format):
    name = "fp8"
    quant_method = "fp8"
    also = frozenset({"deepseek-v4-fp8"})
    parts: ClassVar[Mapping[str, Role]] = {
        "weight": "codes",
        "weight_scale": "scales",
        "weight_scale_inv": "scales",
        "input_scale": "inputs",
    }
    keeps_kv_cache = True

    def refuse(self, scheme: Scheme, target: str) -> str | None:
        if scheme.weights not in (_BLOCKS.weights, _TENSOR.weights):
            return (
                "a native fp8 file holds FP8 weights with one scale a tensor or a block of 128 × 128: "
                "use --format compressed-tensors"
            )
        if scheme.activations is None:
            return "a native fp8 file always has FP8 activations: use --format compressed-tensors"
        known = (_BLOCKS.activations,) if scheme.weights == _BLOCKS.weights else (_TENSOR.activations, STATIC)
        if scheme.activations not in known:
            return (
                f"a native fp8 file has no word for activations {scheme.activations}: use --format "
                "compressed-tensors"
            )
        return None

    def problems(self, linear: Linear) -> list[str]:
        if is_head(linear.name):
            return [
                f"{linear.name}: vLLM leaves the output head of a native fp8 file in full precision: use "
                "--format compressed-tensors"
            ]
        return []

    def config_problems(
        self, config: Mapping[str, Any], layers: QuantizedLayers, members: Mapping[str, BuiltLayer]
    ) -> list[str]:
        """Names that vLLM compares exactly, with its own of a fused layer and with those of the file."""
        ignored = {str(n) for n in config.get("ignored_layers") or config.get("modules_to_not_convert") or []}
        problems = []
        for fused, built in members.items():
            for name in built.linears:
                named = fused in ignored or (name in ignored and not built.by_name)
                if name in layers.linears and named:
                    problems.append(f"{name} is quantized, but ignored_layers names it")
                elif name not in layers.linears and not named and is_linear(name):
                    problems.append(
                        f"{name} is not quantized, but ignored_layers does not name it: vLLM would look for "
                        "its scale"
                    )
        return problems

    def specs(self, linear: Linear, dtype: str) -> list[TensorSpec]:
        n, k, scheme, name = linear.n, linear.k, linear.weights, linear.name
        scale = (1,) if scheme.strategy == "tensor" else scheme.scale_shape(n, k)
        specs = [
            TensorSpec(f"{name}.weight", "F8_E4M3", linear.stored_shape),
            TensorSpec(f"{name}.{_scale_name(scheme)}", "F32", scale),
        ]
        if linear.activations == STATIC:
            specs.append(TensorSpec(f"{name}.input_scale", "F32", (1,)))
        return specs

    def pack(self, linear: Linear, tensor: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        name, scales = linear.name, tensor.scales.float()
        packed = {
            f"{name}.weight": tensor.codes.t().contiguous() if linear.transposed else tensor.codes,
            f"{name}.{_scale_name(tensor.scheme)}": scales.reshape(1)
            if tensor.scheme.strategy == "tensor"
            else scales,
        }
        if tensor.inputs is not None and tensor.inputs.scale is not None:
            packed[f"{name}.input_scale"] = tensor.inputs.scale.float()
        return packed

    def unpack(
        self, linear: Linear, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> QuantizedTensor:
        from quant.tensors import InputParameters, QuantizedTensor

        name, scheme = linear.name, linear.weights
        given = tensors.get(f"{name}.input_scale")
        inputs = (
            None
            if given is None or linear.activations != STATIC
            else InputParameters(scale=given.float().reshape(1))
        )
        stored, sides = tensors[f"{name}.{_scale_name(scheme)}"], options.get("block", (BLOCK, BLOCK))
        scales = multipliers(stored, scheme, linear.n, linear.k, sides)
        codes = tensors[f"{name}.weight"]
        codes = codes.t().contiguous() if linear.transposed else codes
        return QuantizedTensor(codes, scales, None, scheme, inputs=inputs)

    def config(self, contents: Contents) -> dict[str, Any]:
        kinds = {(x.weights, x.activations) for x in contents.linears}
        if len(kinds) > 1:
            raise AssertionError("one scheme a native fp8 file")
        ((scheme, activations),) = kinds
        config: dict[str, Any] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "static" if activations == STATIC else "dynamic",
            "ignored_layers": contents.left_alone(),
            # transformers' word for the same list
            "modules_to_not_convert": contents.left_alone(),
        }
        return config | ({"weight_block_size": [BLOCK, BLOCK]} if scheme.strategy == "block" else {})

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> QuantizedLayers:
        block, activations = config.get("weight_block_size"), config.get("activation_scheme")
        for key in ("ignored_layers", "modules_to_not_convert"):
            names_listed(config, key)
        whole = isinstance(block, list) and len(block) == 2 and all(type(x) is int and x > 0 for x in block)
        if block is not None and not whole:
            raise CheckpointError(
                f"fp8 weight_block_size is {clipped(block)}: rows and columns of a block are needed, such as "
                "[128, 128]: repair config.json"
            )
        sides = None if block is None else (block[0], block[1])
        if activations not in ("dynamic", "static") or (block is not None and activations == "static"):
            raise CheckpointError(
                f"fp8 activation_scheme is {clipped(activations)}{' with blocks' if block else ''}: it is "
                "dynamic, or static with one scale a tensor"
            )
        row = _TENSOR if block is None else _BLOCKS
        inputs = STATIC if activations == "static" else row.activations
        linears, stored = {}, {}
        for x in scaled_matrices(tensors, _scale_name(row.weights), sides):
            linears[x.name] = Linear(x.name, x.n, x.k, x.weights, inputs)
            stored[f"{x.name}.{_scale_name(x.weights)}"] = x.scale
            if (number := spelled(tensors, x.name, INPUT_SCALES)) is not None:
                stored[f"{x.name}.input_scale"] = number
        stored = {own: name for own, name in stored.items() if own != name}
        usual = sides in (None, (BLOCK, BLOCK))
        return QuantizedLayers(
            self.name if usual else Fp8Blocks.name,
            linears,
            {} if usual else {"block": sides},
            stored,
            stacks(tensors, sides),
        )


class Fp8Blocks(ForeignFormat):
    """The same with blocks of another size than 128 × 128: read alone."""

    name = "fp8-blocks"
    quant_method = None
    parts = Fp8.parts
    keeps_kv_cache = True

    def specs(self, linear: Linear, dtype: str) -> list[TensorSpec]:
        # the shape of the multipliers has been compared with the size that the config states
        return [TensorSpec(f"{linear.name}.weight", "F8_E4M3", (linear.n, linear.k))]

    def unpack(
        self, linear: Linear, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> QuantizedTensor:
        return _FP8.unpack(linear, tensors, options)

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> QuantizedLayers:
        return _FP8.find(config, tensors)

    def config_problems(
        self, config: Mapping[str, Any], layers: QuantizedLayers, members: Mapping[str, BuiltLayer]
    ) -> list[str]:
        return _FP8.config_problems(config, layers, members)


_FP8 = FormatRegistry.add(Fp8.name, Fp8())
FOREIGN[Fp8Blocks.name] = Fp8Blocks()
