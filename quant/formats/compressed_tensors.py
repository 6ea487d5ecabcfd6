"""compressed-tensors, format ``pack-quantized``: the road vLLM is built around, and the default.

Contract read from vLLM 0.32 (`schemes/compressed_tensors_wNa16.py`) and compressed-tensors 0.17 (`compressors/pack_quantized/`): for a linear
``P`` of [N, K] with groups of g,

==========================  =======  ========================  ==============================================
``P.weight_packed``         int32    [N, ceil(K·b/32)]         code + 2^(b-1), packed along K, lowest bits first
``P.weight_scale``          model's  [N, K/g]
``P.weight_zero_point``     int32    [ceil(N·b/32), K/g]       zero + 2^(b-1), packed along N; asymmetric only
``P.weight_shape``          int64    [2]                       N, K
==========================  =======  ========================  ==============================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.writer import TensorSpec
from quant.errors import CheckpointError
from quant.formats.base import FormatRegistry, Found, Linear, require, suffixed, word_problems
from quant.schemes import Scheme, WeightScheme

if TYPE_CHECKING:
    import torch

    from quant.tensors import QuantizedTensor

#: Group sizes that every vLLM kernel from compute capability 7.5 up takes; others run on single kernels only.
VLLM_GROUPS = (-1, 32, 64, 128)
#: Of a cache whose K and V have one calibrated scale a layer; with it vLLM's `--kv-cache-dtype auto` means FP8.
KV_CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


def arguments(scheme: WeightScheme) -> dict[str, Any]:
    """The ``weights`` object of a config group. vLLM forbids unknown keys in it, so only keys that every version knows are written."""
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "group_size": None if scheme.group_size == -1 else scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def read_arguments(weights: Mapping[str, Any], where: str) -> WeightScheme:
    """Inverse of :func:`arguments`.

    Raises:
        CheckpointError: a type, strategy or activation order that is not read here.
    """
    if weights.get("type", "int") != "int" or weights.get("strategy") not in ("group", "channel"):
        raise CheckpointError(
            f"{where}: weights of type {weights.get('type')!r}, strategy {weights.get('strategy')!r}: read are int with group or channel"
        )
    group = -1 if weights["strategy"] == "channel" else int(weights.get("group_size") or 0)
    return WeightScheme(int(weights.get("num_bits", 8)), group, bool(weights.get("symmetric", True)))


def matches(target: str, name: str) -> bool:
    """Whether a target or ignore entry names a module: exactly, or as ``re:`` with ``re.match``, as vLLM compares them."""
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


class CompressedTensors:
    name = "compressed-tensors"
    quant_method: str | None = "compressed-tensors"
    config_file: str | None = None
    kv_cache = True

    def refuse(self, scheme: Scheme, target: str) -> str | None:
        weights = scheme.weights
        if weights.number != "int" or scheme.activations is not None:
            return f"{scheme} is not written in this format"
        if weights.bits not in (4, 8):
            return f"pack-quantized holds 4 or 8 bits in a way that vLLM and compressed-tensors agree on, not {weights.bits}: use --format plain"
        if target == "vllm" and weights.group_size not in VLLM_GROUPS:
            return f"group size {weights.group_size} runs on single vLLM kernels only: use {', '.join(map(str, VLLM_GROUPS))}, or --target other"
        return None

    def problems(self, linear: Linear) -> list[str]:
        # vLLM allocates K·b/32 words a row, and N·b/32 of zero points: it has no place for a padded one
        return word_problems(linear, outputs=not linear.scheme.symmetric)

    def specs(self, linear: Linear, dtype: str) -> list[TensorSpec]:
        n, k, bits, groups = linear.n, linear.k, linear.scheme.bits, linear.scheme.groups(linear.k)
        specs = [
            TensorSpec(f"{linear.name}.weight_packed", "I32", (n, -(-k * bits // 32))),
            TensorSpec(f"{linear.name}.weight_scale", dtype, (n, groups)),
        ]
        if not linear.scheme.symmetric:
            specs.append(TensorSpec(f"{linear.name}.weight_zero_point", "I32", (-(-n * bits // 32), groups)))
        specs.append(TensorSpec(f"{linear.name}.weight_shape", "I64", (2,)))
        return specs

    def pack(self, linear: Linear, tensor: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        import torch

        from quant.formats.packing import pack

        bits, offset = tensor.scheme.bits, 2 ** (tensor.scheme.bits - 1)
        packed = {
            f"{linear.name}.weight_packed": pack(tensor.codes.to(torch.int16) + offset, bits),
            f"{linear.name}.weight_scale": tensor.scales.to(dtype),
            f"{linear.name}.weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
        }
        if tensor.zeros is not None:
            words = pack((tensor.zeros.to(torch.int16) + offset).t().contiguous(), bits)
            packed[f"{linear.name}.weight_zero_point"] = words.t().contiguous()
        return packed

    def unpack(self, linear: Linear, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> QuantizedTensor:
        import torch

        from quant.formats.packing import unpack
        from quant.tensors import QuantizedTensor

        bits, offset = linear.scheme.bits, 2 ** (linear.scheme.bits - 1)
        shape = tensors.get(f"{linear.name}.weight_shape")
        k = int(shape[1]) if shape is not None else linear.k
        codes = unpack(tensors[f"{linear.name}.weight_packed"], bits, k).to(torch.int16) - offset
        zeros = None
        if not linear.scheme.symmetric:
            words = tensors[f"{linear.name}.weight_zero_point"].t().contiguous()
            zeros = (unpack(words, bits, linear.n).to(torch.int16) - offset).to(torch.int8).t().contiguous()
        group_index = tensors.get(f"{linear.name}.weight_g_idx")
        return QuantizedTensor(codes.to(torch.int8), tensors[f"{linear.name}.weight_scale"], zeros, linear.scheme, group_index)

    def config(self, linears: Sequence[Linear], unquantized: Sequence[str], act_order: str, kv_cache: bool = False) -> dict[str, Any]:
        schemes = list(dict.fromkeys(linear.scheme for linear in linears))
        groups = {}
        for i, scheme in enumerate(schemes):
            # with one scheme the class name and a complete ignore list; with several, names alone: a class would catch what a name missed
            targets = ["Linear"] if len(schemes) == 1 else [x.name for x in linears if x.scheme == scheme]
            groups[f"group_{i}"] = {
                "targets": targets,
                "format": "pack-quantized",
                "weights": arguments(scheme),
                "input_activations": None,
                "output_activations": None,
            }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": groups,
            "ignore": list(unquantized),
            "kv_cache_scheme": dict(KV_CACHE) if kv_cache else None,
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "global_compression_ratio": None,
            "version": "0.17.0",
        }

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Found:
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError("quantization_config has no config_groups: compressed-tensors needs at least one")
        formats = {str(g.get("format") or config.get("format")) for g in groups.values()}
        if formats != {"pack-quantized"}:
            raise CheckpointError(f"compressed-tensors format {', '.join(sorted(formats))} is not read here; read is pack-quantized")
        linears = {}
        for name in suffixed(tensors, ".weight_packed"):
            scale = require(tensors, f"{name}.weight_scale", name)
            group = next((g for g in groups.values() if any(matches(t, name) for t in g.get("targets", []))), None)
            group = group or next((g for g in groups.values() if "Linear" in g.get("targets", [])), None)
            if group is None:
                raise CheckpointError(f"{name} has packed weights, but no config group targets it")
            scheme = read_arguments(group["weights"], name)
            packed = tensors[f"{name}.weight_packed"]
            if packed.dtype != "I32" or len(packed.shape) != 2 or len(scale.shape) != 2:
                raise CheckpointError(
                    f"{name}: weight_packed is {packed.dtype} {packed.shape}, weight_scale {scale.shape}: [N, words] of I32 and [N, groups]"
                )
            n, words = packed.shape
            # weight_shape is data, not header: K follows from the groups, or from the full words where there is one group a row
            k = scale.shape[1] * scheme.group_size if scheme.group_size != -1 else words * 32 // scheme.bits
            if not scheme.symmetric:
                require(tensors, f"{name}.weight_zero_point", name)
            linears[name] = Linear(name, n, k, scheme)
        return Found(self.name, linears, {})


FormatRegistry.add(CompressedTensors.name, CompressedTensors())
