"""NVIDIA ModelOpt's checkpoints: FP8, NVFP4 and MXFP8, of one kind or mixed.

For a linear ``P`` of [N, K] (vLLM's `quantization/modelopt.py`):

=========================  =====================  =============  =============================================
FP8                        ``P.weight``           float8_e4m3fn  [N, K]
                           ``P.weight_scale``     fp32           one number
FP8_PER_CHANNEL_PER_TOKEN  ``P.weight_scale``     fp32           [N]
FP8_PB_WO                  ``P.weight_scale``     fp32           [⌈N/128⌉, 1, ⌈K/128⌉, 1]
NVFP4, W4A16_NVFP4         ``P.weight``           uint8          [N, K/2], the even input in the low half
                           ``P.weight_scale``     float8_e4m3fn  [N, K/16]
                           ``P.weight_scale_2``   fp32           one number, a multiplier
MXFP8                      ``P.weight_scale``     uint8          [N, K/32], exponent + 127
static inputs              ``P.input_scale``      fp32           one number, a multiplier
=========================  =====================  =============  =============================================

Dtypes and shapes tell them apart; ``quant_algo`` is asked only whether the rest of the file can be told.
Releases up to 0.29 say what they did in ``hf_quant_config.json`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from quant.checkpoint.header import WIDE_FLOATS, TensorInfo
from quant.checkpoint.writer import TensorSpec
from quant.errors import CheckpointError, clipped
from quant.formats.base import (
    FOREIGN,
    ForeignFormat,
    IncompleteCheckpoint,
    QuantizedLayers,
    Role,
    Stack,
    StackPart,
    names_listed,
    suffixed,
)
from quant.formats.scaled import (
    BLOCKS,
    MX,
    STATIC,
    TENSOR,
    multipliers,
    number_of,
    ordinary_name,
    scaled_matrices,
    stacks,
)
from quant.schemes import PRESETS, ActivationScheme, WeightScheme
from quant.vllm.layers import BuiltLayer, Linear, is_head
from quant.vllm.lists import part_or_wildcard

if TYPE_CHECKING:
    import torch

    from quant.checkpoint.reader import Checkpoint
    from quant.tensors import QuantizedTensor

_NVFP4 = PRESETS["nvfp4"]
#: Ways of storing numbers that are read, as ``quant_algo`` names them.
_ALGORITHMS = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_BLOCK_SCALES", "NVFP4", "W4A16_NVFP4", "MXFP8",
    "MIXED_PRECISION",
)  # fmt: skip


class ModelOpt(ForeignFormat):
    name = "modelopt"
    quant_method = "modelopt"
    also = frozenset({"modelopt-fp4", "modelopt-mxfp8", "modelopt-mixed"})
    parts: ClassVar[Mapping[str, Role]] = {
        "weight": "codes",
        "weight_scale": "scales",
        "weight_scale_2": "global_scale",
        "input_scale": "inputs",
    }
    own_keys = frozenset({"quant_algo"})
    keeps_kv_cache = True

    def specs(self, linear: Linear, dtype: str) -> list[TensorSpec]:
        n, k, weights, name = linear.n, linear.k, linear.weights, linear.name
        if weights == _NVFP4.weights:
            specs = [
                TensorSpec(f"{name}.weight", "U8", (n, k // 2)),
                TensorSpec(f"{name}.weight_scale", "F8_E4M3", (n, k // 16)),
                TensorSpec(f"{name}.weight_scale_2", "F32", (1,)),
            ]
        else:
            rows, columns = weights.scale_shape(n, k)
            shapes: dict[str, tuple[int, ...]] = {
                "tensor": (1,),
                "channel": (n,),
                "block": (rows, 1, columns, 1),
            }
            specs = [
                TensorSpec(f"{name}.weight", "F8_E4M3", (n, k)),
                TensorSpec(
                    f"{name}.weight_scale",
                    "U8" if weights == MX else "F32",
                    shapes.get(weights.strategy, (rows, columns)),
                ),
            ]
        if linear.activations is not None and linear.activations.calibrated:
            specs.append(TensorSpec(f"{name}.input_scale", "F32", (1,)))
        return specs

    def unpack(
        self, linear: Linear, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> QuantizedTensor:
        from quant.formats.packing import unpack_halves
        from quant.tensors import InputParameters, QuantizedTensor

        name, weights = linear.name, linear.weights
        codes, scales = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        given = tensors.get(f"{name}.input_scale")
        if linear.activations is None or not linear.activations.calibrated:
            given = None
        if weights == _NVFP4.weights:
            inputs = (
                None if given is None else InputParameters(global_scale=given.float().reshape(1).reciprocal())
            )
            divisor = tensors[f"{name}.weight_scale_2"].float().reshape(1).reciprocal()
            return QuantizedTensor(unpack_halves(codes), scales, None, weights, None, divisor, inputs)
        inputs = None if given is None else InputParameters(scale=given.float().reshape(1))
        scales = multipliers(scales, weights, linear.n, linear.k)
        return QuantizedTensor(codes, scales, None, weights, inputs=inputs)

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> QuantizedLayers:
        names_listed(config, "ignore")
        algorithm = str(config.get("quant_algo") or "").upper()
        # where every tensor is in a wide dtype, the config is left over from another life of the folder
        quantized = any(i.dtype not in WIDE_FLOATS and len(i.shape) > 1 for i in tensors.values())
        if quantized and algorithm not in _ALGORITHMS:
            raise CheckpointError(
                f"ModelOpt quant_algo {clipped(config.get('quant_algo'))} is not read here; read are "
                f"{', '.join(_ALGORITHMS)}: start from the original"
            )
        if scaled := next((n for n in tensors if n.endswith("pre_quant_scale")), None):
            raise CheckpointError(
                f"{scaled}: a factor that inputs are to be scaled by (AWQ of ModelOpt) is not read here: "
                "start from the original"
            )
        linears, stored = {}, {}
        for x in scaled_matrices(tensors, "weight_scale"):
            inputs = _inputs(x.weights, f"{x.name}.input_scale" in tensors)
            linears[x.name] = Linear(x.name, x.n, x.k, x.weights, inputs)
            if x.scale != f"{x.name}.weight_scale":
                stored[f"{x.name}.weight_scale"] = x.scale
        for name in suffixed(tensors, ".weight_scale_2"):
            if len(getattr(tensors.get(f"{name}.weight"), "shape", ())) != 3:
                linears[name] = self._nvfp4(name, tensors)
        packed = next(
            (
                n
                for n, i in tensors.items()
                if n.endswith("weight") and i.dtype == "U8" and len(i.shape) == 2 and n[:-7] not in linears
            ),
            None,
        )
        if packed:
            raise IncompleteCheckpoint([(packed.removesuffix(".weight"), "weight_scale_2")])
        stacked = stacks(tensors) | nvfp4_stacks(tensors)
        return QuantizedLayers(self.name, dict(sorted(linears.items())), {}, stored, stacked)

    def config_problems(
        self, config: Mapping[str, Any], layers: QuantizedLayers, members: Mapping[str, BuiltLayer]
    ) -> list[str]:
        """Names that vLLM leaves out of quantization: wildcards, or parts of its own names. Of a mixed file
        it quantizes what is listed alone."""
        listed = [str(n) for n in config.get("ignore") or []]
        problems = []
        if str(config.get("quant_algo") or "").upper() == "MIXED_PRECISION":
            return []
        for fused, built in members.items():
            for name in built.linears:
                left = any(part_or_wildcard(x, n) for x in listed for n in (name, fused))
                if name in layers.linears and left:
                    problems.append(f"{name} is quantized, but the list of what is left out names it")
                # of others vLLM's model classes may say that they are no part of it: routers, towers
                elif name not in layers.linears and not left and (is_head(name) or len(built.linears) > 1):
                    problems.append(
                        f"{name} is not quantized, but the list of what is left out does not name it: vLLM "
                        "would look for its scale"
                    )
        return problems

    @staticmethod
    def _nvfp4(name: str, tensors: Mapping[str, TensorInfo]) -> Linear:
        """An NVFP4 linear as its headers say.

        Raises:
            CheckpointError: they contradict each other.
        """
        missing = [(name, last) for last in ("weight", "weight_scale") if f"{name}.{last}" not in tensors]
        if missing:
            raise IncompleteCheckpoint(missing)
        codes, scale, number = (tensors[f"{name}.{x}"] for x in ("weight", "weight_scale", "weight_scale_2"))
        n, half = codes.shape if len(codes.shape) == 2 else (0, 0)
        if codes.dtype != "U8" or scale.dtype != "F8_E4M3" or scale.shape != (n, half // 8) or half % 8:
            raise CheckpointError(
                f"{name}: weight is {codes.dtype} {codes.shape}, weight_scale {scale.dtype} {scale.shape}: "
                "U8 [N, K/2] and F8_E4M3 [N, K/16] are needed"
            )
        if number.shape not in ((), (1,)):
            raise CheckpointError(f"{number.name} is {number.shape}: one number is needed")
        static = f"{name}.input_scale" in tensors
        return Linear(name, n, 2 * half, _NVFP4.weights, _NVFP4.activations if static else None)


def nvfp4_stacks(tensors: Mapping[str, TensorInfo]) -> dict[str, Stack]:
    """Experts of a layer in one NVFP4 tensor: codes uint8, two in a byte along the inputs, which are the last
    dimension or (Llama 4) the one before; multipliers E4M3 of 16 inputs each, laid out alike; and one for
    each expert, or for all.

    Raises:
        CheckpointError: numbers that are missing, or do not fit the codes.
    """
    found = {}
    for name, codes in tensors.items():
        stem = name.removesuffix(".weight")
        if codes.dtype != "U8" or len(codes.shape) != 3 or stem.endswith(("_blocks", "_scale", "_scales")):
            continue
        joint = f"{stem}." if stem != name else f"{stem}_"
        scale, second = (tensors.get(f"{joint}{x}") for x in ("weight_scale", "weight_scale_2"))
        if scale is None or second is None:
            raise CheckpointError(
                f"{name} is {codes.dtype} {codes.shape}, and {joint}weight_scale and {joint}weight_scale_2 "
                "are not both beside it: the checkpoint is incomplete, fetch its files again"
            )
        experts, rows, columns = codes.shape
        last = scale.shape == (experts, rows, columns // 8) and columns % 8 == 0
        before = scale.shape == (experts, rows // 8, columns) and rows % 8 == 0
        if scale.dtype != "F8_E4M3" or last == before or prod(second.shape) not in (1, experts):
            raise CheckpointError(
                f"{name} is {codes.dtype} {codes.shape}, its multipliers {scale.dtype} {scale.shape} and "
                f"{second.shape}: F8_E4M3 [E, N, K/16] or [E, K/16, N] and one an expert are needed"
            )
        number = f"{joint}input_scale" if f"{joint}input_scale" in tensors else None
        own = (name, scale.name, second.name, *([number] if number else []))
        whole = ordinary_name(name)
        found[whole] = Stack(
            whole,
            (experts, rows, 2 * columns) if last else (experts, 2 * rows, columns),
            _NVFP4.weights,
            own,
            (1, 16) if last else (16, 1),
            partial(_expert, name, scale.name, second.name, number, last),
            _NVFP4.activations if number else None,
            inputs_last=last,
        )
    return found


def _expert(
    name: str, scale: str, second: str, number: str | None, last: bool, checkpoint: Checkpoint, expert: int
) -> StackPart:
    """One expert of :func:`nvfp4_stacks`."""
    from quant.formats.packing import unpack_halves

    codes, scales = checkpoint.read_index(name, expert), checkpoint.read_index(scale, expert)
    if not last:
        codes, scales = codes.t().contiguous(), scales.t()
    divisor = number_of(checkpoint, second, expert).reciprocal()
    inputs = None if number is None else number_of(checkpoint, number, expert).reciprocal()
    part = StackPart(unpack_halves(codes), scales, (1, 16), divisor, inputs)
    return part if last else part.turned


def _inputs(weights: WeightScheme, static: bool) -> ActivationScheme | None:
    """How the inputs of an FP8 linear are rounded."""
    if weights == TENSOR:
        return STATIC if static else PRESETS["w8a8-fp8-tensor"].activations
    name = "mxfp8" if weights == MX else "fp8-block" if weights == BLOCKS else "w8a8-fp8"
    return PRESETS[name].activations


FOREIGN[ModelOpt.name] = ModelOpt()
