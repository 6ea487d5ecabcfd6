"""The AWQ layout that vLLM serves (AutoAWQ's GEMM version), and AutoAWQ's two older packings, which are read
so that they can be converted.

For a linear ``P`` of [N, K] with G groups (AutoAWQ `modules/linear/gemm.py::WQLinear_GEMM.from_linear`, vLLM
0.32 `quantization/auto_awq.py`):

==============  ======  ==========  ============================================================
``P.qweight``   int32   [K, N/8]    code + 8, packed along N; nibble i of word c is output 8c + o(i)
``P.qzeros``    int32   [G, N/8]    zero + 8, packed likewise, nothing subtracted
``P.scales``    16 bit  [G, N]
==============  ======  ==========  ============================================================

with o = 0, 2, 4, 6, 1, 3, 5, 7. vLLM never reads ``version``: a GEMV file would load and compute garbage. So
the tensors' shapes decide here:

* ``gemv`` (`gemv.py::WQLinear_GEMV`): qweight int32 [N, K/8] and qzeros int32 [N, Z] packed along K, lowest
  bits first; scales [N, 8·Z];
* ``gemv_fast`` (`gemv_fast.py::WQLinear_GEMVFast`): qweight int16 [N/4, K], scales and qzeros = -zero·scale,
  both 16-bit floats [8·Z, N].

Both pad groups up to 8·Z. GEMM's qzeros has one row a group, theirs one row (column) an output, so no file
fits two of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.writer import TensorSpec
from quant.errors import CheckpointError, clipped
from quant.formats.base import (
    Contents,
    Format,
    FormatRegistry,
    QuantizedLayers,
    Role,
    ValueCheck,
    constant_words,
    head_problems,
    names_listed,
    require,
    suffixed,
    word_problems,
)
from quant.schemes import Scheme, WeightScheme
from quant.vllm.kernels import GROUP_SIZES
from quant.vllm.layers import BuiltLayer, Linear, fused_layers, is_head
from quant.vllm.lists import part

if TYPE_CHECKING:
    import torch

    from quant.tensors import QuantizedTensor

#: Output 8c + ORDER[i] lies in nibble i of word c; output 8c + j in nibble REVERSED[j].
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
REVERSED = (0, 4, 1, 5, 2, 6, 3, 7)


def _left_out(
    config: Mapping[str, Any], layers: QuantizedLayers, members: Mapping[str, BuiltLayer]
) -> list[str]:
    """Quantized linears that ``modules_to_not_convert`` leaves out: vLLM looks for its entries inside the
    names of linears, and of the layers that it fuses of them (`quant_utils.py::is_layer_skipped`)."""
    listed = names_listed(config, "modules_to_not_convert")
    layer_of = {name: layer for layer, built in members.items() for name in built.linears}
    problems = []
    for name in layers.linears:
        asked = [layer_of.get(name, name), *([] if ".experts." in name else [name])]
        hit = next((x for x in listed if any(part(x, n) for n in asked)), None)
        if hit is not None:
            problems.append(
                f"{name} is quantized, but modules_to_not_convert has {hit!r}, which is a part of "
                f"{' or of '.join(dict.fromkeys(asked))}: vLLM would build it in 16 bits. List whole names"
            )
    return problems


class AWQ(Format):
    name = "awq"
    quant_method = "awq"
    also = frozenset({"auto-awq", "awq-marlin"})
    parts: ClassVar[Mapping[str, Role]] = {"qweight": "codes", "qzeros": "zeros", "scales": "scales"}
    own_keys = frozenset({"w_bit", "zero_point"})

    def refuse(self, scheme: Scheme, target: str) -> str | None:
        weights = scheme.weights
        if weights.type != "int" or scheme.activations is not None:
            return (
                f"an AWQ file holds integer weights and leaves activations alone, not {scheme}: use "
                "--format compressed-tensors"
            )
        if weights.bits != 4:
            return f"AWQ files hold 4 bits, not {weights.bits}: use --format compressed-tensors"
        if target == "vllm" and weights.group_size not in GROUP_SIZES:
            return (
                f"group size {weights.group_size} of an AWQ file runs on single vLLM kernels only: use "
                f"{', '.join(map(str, GROUP_SIZES))}, "
                "or --target other"
            )
        return None

    def problems(self, linear: Linear) -> list[str]:
        return word_problems(linear, inputs=False)

    def together(self, schemes: Collection[Scheme]) -> bool:
        # zero points are always in the file: those of symmetric weights are in the middle
        return len({(replace(s.weights, symmetric=True), s.activations) for s in schemes}) <= 1

    def config_problems(
        self, config: Mapping[str, Any], layers: QuantizedLayers, members: Mapping[str, BuiltLayer]
    ) -> list[str]:
        older = sorted(set(layers.options["packing"].values()) - {"gemm"})
        return [
            f"the words are packed as AutoAWQ's {packing}: vLLM reads every AWQ file as gemm; quant "
            "export-vllm converts it"
            for packing in older
        ] + [*head_problems(config, layers), *_left_out(config, layers, members)]

    def value_check(self, linear: Linear, last: str, options: Mapping[str, Any]) -> ValueCheck | None:
        packed = options["packing"][linear.name] == "gemm"  # the others pad, and store floats
        if self.parts[last] == "zeros" and linear.weights.symmetric and packed:
            return constant_words(8, 4)
        return None

    def specs(self, linear: Linear, dtype: str) -> list[TensorSpec]:
        n, k, groups = linear.n, linear.k, linear.weights.groups(linear.k)
        return [
            TensorSpec(f"{linear.name}.qweight", "I32", (k, n // 8)),
            TensorSpec(f"{linear.name}.qzeros", "I32", (groups, n // 8)),
            TensorSpec(f"{linear.name}.scales", dtype, (groups, n)),
        ]

    def pack(self, linear: Linear, tensor: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        import torch

        zeros = torch.zeros_like(tensor.scales, dtype=torch.int8) if tensor.zeros is None else tensor.zeros
        return {
            f"{linear.name}.qweight": _interleave(tensor.codes.t() + 8),
            f"{linear.name}.qzeros": _interleave(zeros.t() + 8),
            f"{linear.name}.scales": tensor.scales.to(dtype).t().contiguous(),
        }

    def unpack(
        self, linear: Linear, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> QuantizedTensor:
        from quant.tensors import QuantizedTensor

        words, zeros, scales = (tensors[f"{linear.name}.{x}"] for x in ("qweight", "qzeros", "scales"))
        codes, zeros, scales = _UNPACK[options["packing"][linear.name]](linear, words, zeros, scales)
        if linear.weights.symmetric and bool(zeros.any()):
            raise CheckpointError(
                f"{linear.name}.qzeros: zero_point is false, but zero points other than 8 are stored: some "
                "readers use them and some do not; "
                "set zero_point in config.json to what the checkpoint was made with"
            )
        return QuantizedTensor(codes, scales, None if linear.weights.symmetric else zeros, linear.weights)

    def config(self, contents: Contents) -> dict[str, Any]:
        sizes = list(dict.fromkeys(linear.weights.group_size for linear in contents.linears))
        if len(sizes) > 1:
            raise AssertionError("one group size an AWQ file")
        # Without a list vLLM looks which layers hold words, which is never wrong; other readers take every
        # linear of a block. Readers look for the names as parts of others, so a list whose entries are parts
        # of quantized names (a router `mlp.gate`) would hit those too.
        listed = [n for n in contents.unquantized if not is_head(n)]
        names = [linear.name for linear in contents.linears]
        quantized = {*names, *fused_layers(names, contents.model_types)}
        usable = bool(listed) and not any(n in q for n in listed for q in quantized)
        config = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": sizes[0],
            # symmetric weights have zero points of 8: without them vLLM leaves Marlin, and its CPU and GPU
            # paths differ
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": contents.left_alone() if usable else None,
        }
        # a word of vLLM's, which other readers do not know
        return config | ({"lm_head": True} if any(is_head(x.name) for x in contents.linears) else {})

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> QuantizedLayers:
        bits = config.get("bits", config.get("w_bit"))
        if bits is None or int(bits) != 4:
            raise CheckpointError(f"the AWQ quantization_config says bits {clipped(bits)}: AWQ files hold 4")
        stated = int(config.get("group_size", config.get("q_group_size", 0)))
        if stated != -1 and stated < 8:
            raise CheckpointError(
                f"the AWQ quantization_config says group_size {stated}: -1 or the number of inputs that "
                "share a scale"
            )
        symmetric = not bool(config.get("zero_point", True))
        linears, packing = {}, {}
        coded = suffixed(tensors, ".qweight")
        require(tensors, coded, "qzeros", "scales")
        for name in coded:
            qweight, qzeros, scales = (tensors[f"{name}.{x}"] for x in ("qweight", "qzeros", "scales"))
            which = _packing(name, qweight, qzeros, scales)
            n, k = _SHAPE[which](qweight)
            if which == "gemv_fast" and k % 64:
                raise CheckpointError(
                    f"{name}: {k} inputs do not divide into the runs of 64 that gemv_fast packs: the file "
                    "is damaged"
                )
            group = k if stated == -1 else stated
            stored = scales.shape[1] if which == "gemv" else scales.shape[0]
            if k % group or stored != (k // group if which == "gemm" else _padded_groups(k, group)):
                raise CheckpointError(
                    f"{name}: scales {scales.shape} of {n} outputs and {k} inputs ({which}) are not of "
                    f"groups of {stated}"
                )
            linears[name] = Linear(name, n, k, WeightScheme(4, stated, symmetric))
            packing[name] = which
        return QuantizedLayers(self.name, linears, {"packing": packing})


def _packing(name: str, qweight: TensorInfo, qzeros: TensorInfo, scales: TensorInfo) -> str:
    """``gemm``, ``gemv`` or ``gemv_fast``, from dtypes and shapes.

    Raises:
        CheckpointError: none of them.
    """
    if all(len(x.shape) == 2 for x in (qweight, qzeros, scales)):
        (a, b), zeros, outer = qweight.shape, qzeros.shape, scales.shape
        if (
            qweight.dtype == "I16"
            and qzeros.dtype in ("F16", "BF16")
            and zeros == outer
            and outer[1] == 4 * a
        ):
            return "gemv_fast"
        if qweight.dtype == qzeros.dtype == "I32":
            if zeros[1] == b and outer == (zeros[0], 8 * b):
                return "gemm"
            if zeros[0] == a and outer == (a, 8 * zeros[1]):
                return "gemv"
    raise CheckpointError(
        f"{name}: qweight {qweight.dtype} {qweight.shape}, qzeros {qzeros.dtype} {qzeros.shape}, scales "
        f"{scales.shape} are none of AutoAWQ's "
        "packings gemm, gemv and gemv_fast: a checkpoint of another program (llm-awq, marlin) cannot be "
        "read here, quantize the original"
    )


#: Packing → (N, K) from the words' header.
_SHAPE = {
    "gemm": lambda q: (8 * q.shape[1], q.shape[0]),
    "gemv": lambda q: (q.shape[0], 8 * q.shape[1]),
    "gemv_fast": lambda q: (4 * q.shape[0], q.shape[1]),
}


def _padded_groups(k: int, group: int) -> int:
    """Groups that AutoAWQ's GEMV packings have room for: words of 8, whose number is even at 64 and a
    multiple of 4 at 32."""
    multiple = 1 if group >= 128 else 2 if group == 64 else 4
    return 8 * multiple * -(-(k // group) // (8 * multiple))


def _interleave(values: torch.Tensor) -> torch.Tensor:
    """int32 [R, N/8] from unsigned nibbles [R, N]."""
    from quant.formats.packing import pack

    rows, n = values.shape
    return pack(values.reshape(rows, n // 8, 8)[:, :, list(ORDER)].reshape(rows, n), 4)


def _deinterleave(words: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`_interleave`, less 8: int8 [R, N]."""
    import torch

    from quant.formats.packing import unpack

    rows, count = words.shape
    values = unpack(words.contiguous(), 4, 8 * count).view(rows, count, 8)[:, :, list(REVERSED)]
    return values.reshape(rows, 8 * count).to(torch.int8) - 8


def _unpack_gemm(
    linear: Linear, words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        _deinterleave(words).t().contiguous(),
        _deinterleave(zeros).t().contiguous(),
        scales.t().contiguous(),
    )


def _unpack_gemv(
    linear: Linear, words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    from quant.formats.packing import unpack

    groups = linear.weights.groups(linear.k)
    codes, packed = (
        unpack(x.contiguous(), 4, count).to(torch.int8) - 8
        for x, count in ((words, linear.k), (zeros, groups))
    )
    return codes, packed, scales[:, :groups].contiguous()


def _unpack_fast(
    linear: Linear, words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    n, k, groups = linear.n, linear.k, linear.weights.groups(linear.k)
    shifts = torch.arange(0, 16, 4, device=words.device)
    nibbles = (words.int().unsqueeze(-1) >> shifts) & 15
    # four rows lie side by side in runs of 64 inputs: [N/4, K/64, 4 rows, 64]; then 32 inputs in an order of
    # two steps, undone from the last
    rows = nibbles.reshape(n // 4, k // 64, 4, 64).transpose(1, 2).reshape(n, k // 32, 4, 2, 4)
    pairs = rows.transpose(3, 4).reshape(n, k // 32, 4, 4, 2)
    codes = pairs.transpose(2, 3).reshape(n, k)
    scale = scales[:groups].t().contiguous()
    ratio = torch.where(scale == 0, 0.0, -zeros[:groups].t().float() / scale.float())
    rounded = ratio.round()
    if not bool(((ratio - rounded).abs() < 0.25).all()) or int(rounded.min()) < 0 or int(rounded.max()) > 15:
        raise CheckpointError(
            f"{linear.name}.qzeros: is not -zero·scale with zero points from 0 to 15: the gemv_fast file is "
            "damaged"
        )
    return codes.to(torch.int8) - 8, rounded.to(torch.int8) - 8, scale


_UNPACK = {"gemm": _unpack_gemm, "gemv": _unpack_gemv, "gemv_fast": _unpack_fast}

FormatRegistry.add(AWQ.name, AWQ())
