"""The GPTQ layout of AutoGPTQ and GPTQModel, for consumers that want it.

For a linear ``P`` of [N, K], with pf = 32/b values a word (AutoGPTQ
`nn_modules/qlinear/qlinear_cuda.py::QuantLinear.pack`, vLLM 0.32 `quantization/auto_gptq.py`):

==============  ======  ==============  ==========================================================
``P.qweight``   int32   [K/pf, N]       code + 2^(b-1), packed along K, lowest bits first
``P.scales``    16 bit  [G, N]
``P.qzeros``    int32   [G, N/pf]       zero + 2^(b-1), less one in v1, packed along N
``P.g_idx``     int32   [K]             group of each input
==============  ======  ==============  ==========================================================

vLLM loads 4 and 8 bits, symmetric, groups of -1, 32, 64 or 128 in natural order, and nothing else. v1 is what
it wants; asymmetric files are written as v2, because v1 has no code for a zero point of 0.

GPTQModel's ``dynamic`` gives single layers other numbers, or none; see :func:`dynamic_rule`. It is read, not
written: a file of ours has one scheme.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    require,
    suffixed,
    word_problems,
)
from quant.schemes import BITS, Scheme, WeightScheme
from quant.vllm.kernels import GROUP_SIZES
from quant.vllm.layers import BuiltLayer, Linear, is_head
from quant.vllm.releases import VLLM_VERSION

if TYPE_CHECKING:
    import torch

    from quant.tensors import QuantizedTensor

_VERSIONS = {"gptq": 1, "gptq_v2": 0}


def dynamic_rule(config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """What the ``dynamic`` of a quantization_config says of a module: keys that replace the config's own ({}
    where no rule names it), or None where it is left unquantized.

    Keys are regular expressions that must match from the start of the name, as they are or after ``+:``;
    after ``-:`` they leave a module unquantized. The first that matches counts (GPTQModel
    `quantization/config.py::dynamic_get`, vLLM 0.32 `utils/gptq_utils.py::get_dynamic_override`). vLLM asks
    with the names of its fused layers, GPTQModel with those of the file.
    """
    for pattern, values in (config.get("dynamic") or {}).items():
        if re.match(pattern[2:] if pattern.startswith(("+:", "-:")) else pattern, name):
            return None if pattern.startswith("-:") else dict(values)
    return {}


class GPTQ(Format):
    name = "gptq"
    quant_method = "gptq"
    also = frozenset({"auto-gptq", "gptq-marlin"})
    parts: ClassVar[Mapping[str, Role]] = {
        "qweight": "codes",
        "qzeros": "zeros",
        "scales": "scales",
        "g_idx": "group_index",
    }
    config_file = "quantize_config.json"
    own_keys = frozenset({"desc_act", "sym"})

    def refuse(self, scheme: Scheme, target: str) -> str | None:
        weights = scheme.weights
        if weights.type != "int" or scheme.activations is not None:
            return (
                f"a GPTQ file holds integer weights and leaves activations alone, not {scheme}: use "
                "--format compressed-tensors"
            )
        if target != "vllm":
            return None
        if not weights.symmetric:
            return (
                "vLLM refuses asymmetric GPTQ files: use --symmetric, --format compressed-tensors, or "
                "--target other"
            )
        if weights.bits not in (4, 8):
            return (
                f"vLLM loads GPTQ files of 4 and 8 bits, not {weights.bits}: use --format plain, or "
                "--target other"
            )
        if weights.group_size not in GROUP_SIZES:
            return (
                f"vLLM loads GPTQ groups of {', '.join(map(str, GROUP_SIZES))}, not "
                f"{weights.group_size}: change --group-size, or --target other"
            )
        return None

    def problems(self, linear: Linear) -> list[str]:
        return word_problems(linear)

    def keeps_order(self, target: str) -> bool:
        return target != "vllm"  # which drops g_idx

    def config_problems(
        self, config: Mapping[str, Any], layers: QuantizedLayers, members: Mapping[str, BuiltLayer]
    ) -> list[str]:
        problems = []
        if config.get("desc_act") and config.get("group_size") != -1:
            problems.append("desc_act is true with groups: vLLM refuses it")
        if not config.get("sym", True):
            problems.append("sym is false: vLLM refuses it")
        for pattern, rule in (config.get("dynamic") or {}).items():
            if (
                not pattern.startswith("-:")
                and rule.get("desc_act")
                and rule.get("group_size", config.get("group_size")) != -1
            ):
                problems.append(f"dynamic rule {pattern!r} has desc_act with groups: vLLM refuses it")
        if config.get("checkpoint_format", "gptq") != "gptq":
            problems.append(
                f"checkpoint_format is {clipped(config['checkpoint_format'])}: vLLM reads zero points as v1"
            )
        return problems + head_problems(config, layers) + self._dynamic_problems(config, layers, members)

    @staticmethod
    def _dynamic_problems(
        config: Mapping[str, Any], layers: QuantizedLayers, members: Mapping[str, BuiltLayer]
    ) -> list[str]:
        """The numbers that the config gives each layer, with its ``dynamic`` rules asked as vLLM does: by the
        fused name, never by a shard's."""
        problems = []
        for fused, built in members.items():
            linear = next((layers.linears[n] for n in built.linears if n in layers.linears), None)
            if linear is None:
                continue  # vLLM sees from the tensors which layers are not quantized
            rule = dynamic_rule(config, fused)
            if rule is None:
                problems.append(f"{fused} is quantized, but a rule of dynamic leaves it out")
                continue
            for key, held in (("bits", linear.weights.bits), ("group_size", linear.weights.group_size)):
                stated = rule.get(key, config.get(key))
                whole = linear.k if held == -1 else held  # one group of all inputs has two names
                if stated != held and (linear.k if stated == -1 else stated) != whole:
                    problems.append(
                        f"{fused} has {key} {held}, the config gives it {clipped(stated)} under that name, "
                        "by which vLLM asks"
                    )
        return problems

    def value_check(self, linear: Linear, last: str, options: Mapping[str, Any]) -> ValueCheck | None:
        bits = linear.weights.bits
        if self.parts[last] == "zeros" and linear.weights.symmetric and 32 % bits == 0:
            return constant_words(2 ** (bits - 1) - options["zero_offset"], bits)
        return None

    def specs(self, linear: Linear, dtype: str) -> list[TensorSpec]:
        n, k, bits, groups = linear.n, linear.k, linear.weights.bits, linear.weights.groups(linear.k)
        return [
            TensorSpec(f"{linear.name}.qweight", "I32", (k * bits // 32, n)),
            TensorSpec(f"{linear.name}.qzeros", "I32", (groups, n * bits // 32)),
            TensorSpec(f"{linear.name}.scales", dtype, (groups, n)),
            TensorSpec(f"{linear.name}.g_idx", "I32", (k,)),
        ]

    def pack(self, linear: Linear, tensor: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        import torch

        from quant.formats.packing import pack

        (n, k), bits, groups = tensor.shape, tensor.scheme.bits, tensor.scales.shape[1]
        offset = 2 ** (bits - 1)
        stored_less = 1 if tensor.zeros is None else 0
        zeros = (
            torch.zeros(groups, n, dtype=torch.int16, device=tensor.codes.device)
            if tensor.zeros is None
            else tensor.zeros.t().to(torch.int16)
        )
        index = tensor.group_index
        if index is None:
            index = torch.arange(k, dtype=torch.int32) // (k // groups)
        return {
            f"{linear.name}.qweight": pack(tensor.codes.to(torch.int16) + offset, bits).t().contiguous(),
            f"{linear.name}.qzeros": pack((zeros + offset - stored_less).contiguous(), bits),
            f"{linear.name}.scales": tensor.scales.to(dtype).t().contiguous(),
            f"{linear.name}.g_idx": index.to(torch.int32),
        }

    def unpack(
        self, linear: Linear, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> QuantizedTensor:
        import torch

        from quant.formats.packing import unpack
        from quant.tensors import QuantizedTensor

        bits, offset = linear.weights.bits, 2 ** (linear.weights.bits - 1)
        words = tensors[f"{linear.name}.qweight"].t().contiguous()
        codes = (unpack(words, bits, linear.k).to(torch.int16) - offset).to(torch.int8)
        stored = (
            unpack(tensors[f"{linear.name}.qzeros"], bits, linear.n).to(torch.int16) + options["zero_offset"]
        )
        zeros = (stored - offset).t().contiguous()
        if int(zeros.max()) >= offset:
            raise CheckpointError(
                f"{linear.name}.qzeros: a zero point of 2^{bits}: the word was damaged when it was packed, "
                "make the checkpoint again"
            )
        scales = tensors[f"{linear.name}.scales"].t().contiguous()
        index = tensors.get(f"{linear.name}.g_idx")
        if index is not None:
            if int(index.min()) < 0 or int(index.max()) >= scales.shape[1]:
                raise CheckpointError(
                    f"{linear.name}.g_idx: names group {int(index.max())}, scales has {scales.shape[1]}"
                )
            natural = torch.arange(linear.k, dtype=index.dtype) // (linear.k // scales.shape[1])
            index = None if torch.equal(index, natural) else index
        # a file that says so may lie; one that does not keeps its zero points, so that fused neighbours stay
        # alike
        symmetric = linear.weights.symmetric and not bool(zeros.any())
        scheme = WeightScheme(bits, linear.weights.group_size, symmetric)
        return QuantizedTensor(codes, scales, None if symmetric else zeros.to(torch.int8), scheme, index)

    def config(self, contents: Contents) -> dict[str, Any]:
        from quant import __version__

        schemes = list(dict.fromkeys(linear.weights for linear in contents.linears))
        order = contents.settings.get("act_order")
        if len(schemes) > 1:
            raise AssertionError("one scheme a GPTQ file")
        scheme = schemes[0]
        return {
            "quant_method": "gptq",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "sym": scheme.symmetric,
            "desc_act": order == "group",
            "static_groups": order == "static",
            "true_sequential": True,
            "lm_head": any(is_head(linear.name) for linear in contents.linears),
            "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
            "modules_in_block_to_quantize": None,
            "meta": {"quantizer": [f"quant:{__version__}"]},
        }

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> QuantizedLayers:
        version = str(config.get("checkpoint_format") or config.get("format") or "gptq")
        if config.get("is_marlin_format"):
            raise CheckpointError(
                "is_marlin_format is true: AutoGPTQ's Marlin packing of GPTQ is not read here nor by vLLM "
                f"{VLLM_VERSION}, quantize the original"
            )
        if version not in _VERSIONS:
            raise CheckpointError(
                f"GPTQ checkpoint_format {clipped(version)} is not read here; read are {', '.join(_VERSIONS)}"
            )
        if str(config.get("pack_dtype", "int32")) != "int32":
            raise CheckpointError(
                f"GPTQ pack_dtype {clipped(config['pack_dtype'])} is not read here; read is int32"
            )
        try:
            declared, stated, symmetric = (
                int(config["bits"]),
                config.get("group_size"),
                bool(config.get("sym", True)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError("the GPTQ quantization_config lacks a whole number of bits") from error
        rules = config.get("dynamic") or {}
        if not isinstance(rules, dict) or not all(
            isinstance(v, dict) or k.startswith("-:") for k, v in rules.items()
        ):
            raise CheckpointError(
                f"GPTQ dynamic is {str(rules)[:60]!r}: an object of patterns, each with the keys that it "
                "replaces"
            )
        linears = {}
        base = declared, stated, symmetric
        coded = suffixed(tensors, ".qweight")
        require(tensors, coded, "qzeros", "scales")
        for name in coded:
            # words are there: a rule that leaves the module out contradicts them, which is the engine's
            # business and not that of its values
            rule = dynamic_rule(config, name) or {}
            for key in ("method", "quant_method", "format", "checkpoint_format"):
                if key in rule and rule[key] != (config.get(key) or version):
                    raise CheckpointError(
                        f"{name}: a rule of GPTQ's dynamic gives it {key} {clipped(rule[key])}: read is one "
                        "layout for all layers"
                    )
            declared, stated, symmetric = (
                rule.get(k, x) for k, x in zip(("bits", "group_size", "sym"), base, strict=True)
            )
            qweight, qzeros, scales = (tensors[f"{name}.{x}"] for x in ("qweight", "qzeros", "scales"))
            if (
                qweight.dtype != "I32"
                or qzeros.dtype != "I32"
                or len(qweight.shape) != 2
                or len(scales.shape) != 2
            ):
                raise CheckpointError(
                    f"{name}: qweight is {qweight.dtype} {qweight.shape}, scales {scales.shape}: I32 "
                    "[words, N] and [groups, N]"
                )
            rows, n = qweight.shape
            index = tensors.get(f"{name}.g_idx")
            k = index.shape[0] if index is not None and index.shape else rows * 32 // declared
            bits, groups = (rows * 32 // k if k else 0), scales.shape[0]
            fitting = bits in BITS and rows * 32 == k * bits and groups and k % groups == 0
            if not fitting or scales.shape[1] != n or qzeros.shape != (groups, n * bits // 32):
                raise CheckpointError(
                    f"{name}: qweight {qweight.shape}, qzeros {qzeros.shape}, scales {scales.shape} and {k} "
                    "inputs do not fit together"
                )
            group = k // groups
            linears[name] = Linear(
                name,
                n,
                k,
                WeightScheme(bits, -1 if groups == 1 and stated != group else group, bool(symmetric)),
            )
        return QuantizedLayers(self.name, linears, {"zero_offset": _VERSIONS[version]})


FormatRegistry.add(GPTQ.name, GPTQ())
