"""compressed-tensors: the layout that vLLM is built around, and the default. One sub-format for each kind of
numbers.

Contract read from vLLM 0.32 (`compressed_tensors/schemes/`) and compressed-tensors 0.17 (`compressors/`). For
a linear ``P`` of [N, K] with groups of g, ``scale`` standing for the shape of the scheme's scales ([N, K/g],
[N, 1], [1] of a tensor, [⌈N/128⌉, ⌈K/128⌉] of blocks):

======================  =========================  ==========================================================
pack-quantized          ``P.weight_packed``        int32 [N, K·b/32]: code + 2^(b-1) along K, low bits first
(weight-only integers)  ``P.weight_scale``         model's dtype, scale
                        ``P.weight_zero_point``    int32 [N·b/32, K/g]: zero + 2^(b-1) along N; asymmetric
                        ``P.weight_shape``         int64 [2]: N, K
int-quantized           ``P.weight``               int8 [N, K]
(8-bit activations)     ``P.weight_scale``         fp32, scale
float-quantized         ``P.weight``               float8_e4m3fn [N, K]
                        ``P.weight_scale``         fp32, scale
nvfp4-pack-quantized    ``P.weight_packed``        uint8 [N, K/2]: E2M1 codes, the even input in the low half
                        ``P.weight_scale``         float8_e4m3fn [N, K/16]
                        ``P.weight_global_scale``  fp32 [1], a divisor
mxfp4-pack-quantized    ``P.weight_packed``        as above
                        ``P.weight_scale``         uint8 [N, K/32]: exponent + 127
mxfp8-quantized         ``P.weight``               float8_e4m3fn [N, K]
                        ``P.weight_scale``         uint8 [N, K/32]: exponent + 127
any, calibrated inputs  ``P.input_scale``          fp32 [1], static activations
                        ``P.input_zero_point``     int8 [1], static and asymmetric
                        ``P.input_global_scale``   fp32 [1], NVFP4 activations, a divisor
======================  =========================  ==========================================================

A checkpoint of several kinds is ``mixed-precision``: each group then has a format of its own and full names
for targets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
    names_listed,
    require,
    suffixed,
    word_problems,
)
from quant.formats.stacked import stacked_linears
from quant.schemes import BLOCK, PRESETS, ActivationScheme, Scheme, WeightScheme, scheme_of
from quant.vllm.kernels import GROUP_SIZES
from quant.vllm.layers import BuiltLayer, Linear, is_head, module_class
from quant.vllm.lists import whole_or_pattern
from quant.vllm.releases import VLLM_VERSION

if TYPE_CHECKING:
    import torch

    from quant.tensors import QuantizedTensor

#: Sub-format → where its codes are, their dtype, and codes an element holds (0: as many as its bits leave
#: room for).
LAYOUTS: dict[str, tuple[str, str, int]] = {
    "pack-quantized": ("weight_packed", "I32", 0),
    "int-quantized": ("weight", "I8", 1),
    "float-quantized": ("weight", "F8_E4M3", 1),
    "nvfp4-pack-quantized": ("weight_packed", "U8", 2),
    "mxfp4-pack-quantized": ("weight_packed", "U8", 2),
    "mxfp8-quantized": ("weight", "F8_E4M3", 1),
}


def layout_of(linear: Linear) -> str:
    """The sub-format that holds a linear's numbers."""
    weights = linear.weights
    if weights.type == "int":
        return "pack-quantized" if linear.activations is None else "int-quantized"
    if weights.scales == "F8_E4M3":
        return "nvfp4-pack-quantized"
    if weights.scales == "U8":
        return f"mxfp{weights.bits}{'-pack' if weights.bits == 4 else ''}-quantized"
    return "float-quantized"


_SCALE_DTYPES = {"U8": "torch.uint8", "F8_E4M3": "torch.float8_e4m3fn"}
#: Keys that vLLM accepts inside ``weights`` and ``input_activations`` of a config group; any other is refused
#: when it loads.
_ARGUMENT_KEYS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder",
    "scale_dtype", "zp_dtype", "observer", "observer_kwargs",
}  # fmt: skip


def arguments(scheme: WeightScheme) -> dict[str, Any]:
    """The ``weights`` object of a config group. vLLM forbids unknown keys in it, so only keys that every
    version knows are written."""
    value: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": scheme.type,
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "group_size": None if scheme.group_size == -1 or scheme.strategy == "block" else scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": [BLOCK, BLOCK] if scheme.strategy == "block" else None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return value | ({"scale_dtype": _SCALE_DTYPES[scheme.scales]} if scheme.scales in _SCALE_DTYPES else {})


def activation_arguments(scheme: ActivationScheme) -> dict[str, Any]:
    """The ``input_activations`` object of a config group."""
    value: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": scheme.type,
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "group_size": scheme.group_size,
        "dynamic": "local" if scheme.strategy == "tensor_group" else scheme.dynamic,
        "actorder": None,
        "block_structure": None,
        "observer": None if scheme.dynamic and scheme.strategy != "tensor_group" else "minmax",
        "observer_kwargs": {},
    }
    return value | ({"scale_dtype": _SCALE_DTYPES[scheme.scales]} if scheme.scales in _SCALE_DTYPES else {})


def read_arguments(weights: Mapping[str, Any], layout: str, where: str) -> WeightScheme:
    """Inverse of :func:`arguments`.

    Raises:
        CheckpointError: a type, strategy or activation order that is not read here.
    """
    number, strategy = str(weights.get("type", "int")), weights.get("strategy")
    known = {"int": ("group", "channel"), "float": ("group", "channel", "tensor", "block", "tensor_group")}
    if strategy not in known.get(number, ()):
        raise CheckpointError(
            f"{where}: weights of type {clipped(number)}, strategy {clipped(strategy)}: read are int with "
            f"group or channel, and float with {', '.join(known['float'])}"
        )
    if strategy == "block" and list(weights.get("block_structure") or []) != [BLOCK, BLOCK]:
        raise CheckpointError(
            f"{where}: blocks of {weights.get('block_structure')}: read are blocks of {BLOCK} × {BLOCK}"
        )
    group = (
        BLOCK
        if strategy == "block"
        else int(weights.get("group_size") or 0)
        if strategy in ("group", "tensor_group")
        else -1
    )
    scales = {
        "pack-quantized": "model",
        "nvfp4-pack-quantized": "F8_E4M3",
        "mxfp4-pack-quantized": "U8",
        "mxfp8-quantized": "U8",
    }
    return WeightScheme(
        int(weights.get("num_bits", 8)),
        group,
        bool(weights.get("symmetric", True)),
        "float" if number == "float" else "int",
        strategy,
        scales.get(layout, "F32"),
    )


def read_activations(inputs: Mapping[str, Any] | None, where: str) -> ActivationScheme | None:
    """Inverse of :func:`activation_arguments`."""
    if not inputs:
        return None
    strategy, dynamic = inputs.get("strategy"), inputs.get("dynamic", False)
    if strategy not in ("token", "tensor", "group", "tensor_group") or inputs.get("type", "int") not in (
        "int",
        "float",
    ):
        raise CheckpointError(
            f"{where}: activations of type {clipped(inputs.get('type'))}, strategy {clipped(strategy)} are "
            "not read here"
        )
    bits, number, group = int(inputs.get("num_bits", 8)), inputs.get("type", "int"), inputs.get("group_size")
    scales = (
        "F8_E4M3" if strategy == "tensor_group" else "U8" if (strategy, group) == ("group", 32) else "F32"
    )
    return ActivationScheme(
        bits,
        number,
        strategy,
        bool(inputs.get("symmetric", True)),
        bool(dynamic),
        None if group is None else int(group),
        scales,
    )


def _matcher(entries: Sequence[str]) -> Callable[[str], bool]:
    """Whether any of the targets or ignore entries names a module."""
    exact = {e for e in entries if not e.startswith("re:")}
    patterns = [re.compile(e[3:]) for e in entries if e.startswith("re:")]
    return lambda name: name in exact or any(p.match(name) for p in patterns)


#: What vLLM calls the classes that :func:`quant.vllm.layers.module_class` tells apart.
_CLASSES = {"Linear": "linear", "Embedding": "vocabparallelembedding", "LMHead": "parallellmhead"}


def by_class(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Class of module → the first config group that targets it: vLLM looks for a target in the class's name
    (`find_matched_target`), so ``Linear`` is every linear, and no head or embedding is one."""
    groups_of: dict[str, str] = {}
    for key, group in groups.items():
        for target in group.get("targets", []):
            for kind, name in _CLASSES.items():
                if target and str(target).lower() in name:
                    groups_of.setdefault(kind, key)
    return groups_of


def targeted(groups: Mapping[str, Mapping[str, Any]]) -> Callable[..., str | None]:
    """Name of a module (or all that it may have) → its config group: the first whose targets name it, else
    the first for its class, else the first for the class Linear; None where there is none."""
    exact: dict[str, int] = {}
    patterns: list[tuple[int, str]] = []
    keys, classes = list(groups), by_class(groups)
    for i, key in enumerate(keys):
        for target in groups[key].get("targets", []):
            if target.startswith("re:"):
                patterns.append((i, target))
            else:
                exact.setdefault(target, i)

    def group_of(*names: str) -> str | None:
        named = [i for i, target in patterns if any(whole_or_pattern(target, name) for name in names)]
        named += [exact[name] for name in names if name in exact]
        if named:
            return keys[min(named)]
        kinds = (module_class(name) for name in names)
        return next((classes[k] for k in kinds if k in classes), classes.get("Linear"))

    return group_of


def _targets(linears: Iterable[Linear], wrapped: bool) -> list[str]:
    """Targets by which vLLM finds these modules. Embeddings it finds by their class, for many models give
    them no name; the head of a ``wrapped`` language model by a name that begins with that model's, of which
    the file may know nothing."""
    targets: dict[str, None] = {}
    for linear in linears:
        kind = module_class(linear.name)
        targets[linear.name] = None
        if kind == "Embedding":
            targets["Embedding"] = None
        elif kind == "LMHead" and wrapped:
            targets[rf"re:(.*\.)?{re.escape(linear.name)}$"] = None
    return list(targets)


def group_scheme(group: Mapping[str, Any], layout: str, where: str) -> Scheme:
    """What a config group says of its linears.

    Args:
        layout: the group's sub-format, or the config's where the group states none.
        where: the beginning of the message.

    Raises:
        CheckpointError: weights or activations in a way that is not read here.
    """
    weights = read_arguments(group["weights"], layout, where)
    return scheme_of(weights, read_activations(group.get("input_activations"), where))


def _held(tensors: Mapping[str, torch.Tensor], name: str, last: str) -> torch.Tensor:
    """A tensor of a linear.

    Raises:
        CheckpointError: it is missing.
    """
    if f"{name}.{last}" not in tensors:
        raise CheckpointError(
            f"{name} is quantized but has no tensor '{name}.{last}': the checkpoint is incomplete, make it "
            "again"
        )
    return tensors[f"{name}.{last}"]


class CompressedTensors(Format):
    name = "compressed-tensors"
    quant_method = "compressed-tensors"
    parts: ClassVar[Mapping[str, Role]] = {
        "weight_packed": "codes",
        "weight": "codes",
        "weight_scale": "scales",
        "weight_zero_point": "zeros",
        "weight_shape": "shape",
        "weight_g_idx": "group_index",
        "weight_global_scale": "global_scale",
        "input_scale": "inputs",
        "input_zero_point": "inputs",
        "input_global_scale": "inputs",
    }
    own_keys = frozenset({"config_groups"})
    kv_cache = True

    def refuse(self, scheme: Scheme, target: str) -> str | None:
        weights = scheme.weights
        if weights.type == "float":
            known = any(p.weights == weights for p in PRESETS.values())
            return None if known else f"{weights} has no sub-format: use --format plain"
        if scheme.activations is not None:
            good = (weights.bits, weights.strategy, weights.symmetric) == (8, "channel", True)
            return (
                None
                if good
                else "with 8-bit activations vLLM takes symmetric 8-bit weights with one scale an output: "
                "use --scheme w8a8-int8"
            )
        if weights.bits not in (4, 8):
            return (
                "pack-quantized holds 4 or 8 bits in a way that vLLM and compressed-tensors agree on, "
                f"not {weights.bits}: use --format plain"
            )
        if weights.scales != "model":
            return "weight-only integers have scales in the model's dtype: use --scheme w8a16"
        if target == "vllm" and weights.group_size not in GROUP_SIZES:
            return (
                f"group size {weights.group_size} runs on single vLLM kernels only: use "
                f"{', '.join(map(str, GROUP_SIZES))}, or --target other"
            )
        return None

    def problems(self, linear: Linear) -> list[str]:
        if layout_of(linear) == "pack-quantized":
            # vLLM allocates K·b/32 words a row, and N·b/32 of zero points: it has no place for a padded one
            return word_problems(linear, outputs=not linear.weights.symmetric)
        return []

    def together(self, schemes: Collection[Scheme]) -> bool:
        return True

    def config_problems(
        self, config: Mapping[str, Any], layers: QuantizedLayers, members: Mapping[str, BuiltLayer]
    ) -> list[str]:
        problems = []
        for name, group in config["config_groups"].items():
            for part in ("weights", "input_activations"):
                unknown = sorted(set(group.get(part) or {}) - _ARGUMENT_KEYS)
                if unknown:
                    problems.append(
                        f"config_groups.{name}.{part} has the keys {', '.join(unknown)}, which vLLM refuses"
                    )
            order = (group.get("weights") or {}).get("actorder")
            if order in ("group", "dynamic", True):
                problems.append(
                    f"config_groups.{name} has activation order {clipped(order)}, which vLLM refuses"
                )
        if config.get("sparsity_config"):
            problems.append(f"sparsity_config is not empty: vLLM {VLLM_VERSION} has no sparse kernels left")
        problems += [
            f"{stack.name} holds the packed experts of a layer in one tensor, of which vLLM makes other "
            "values than the file's: quant export-vllm writes one expert a name"
            for stack in layers.stacks.values()
            if any(name.endswith("_packed") for name in stack.tensors)
        ]
        return problems + self._name_problems(config, layers, members)

    @staticmethod
    def _name_problems(
        config: Mapping[str, Any], layers: QuantizedLayers, members: Mapping[str, BuiltLayer]
    ) -> list[str]:
        """The config's names and regular expressions, judged as vLLM does: the fused name first, then every
        shard."""
        problems = []
        groups = config["config_groups"]
        is_ignored = _matcher(names_listed(config, "ignore"))
        is_target = _matcher([str(t) for g in groups.values() for t in g.get("targets", [])])
        classes = by_class(groups)
        for asked, built in members.items():
            by_asked = asked not in built.linears and is_ignored(asked)
            for name in built.linears:
                ignored, claimed = is_ignored(name), module_class(name) in classes
                named = is_target(name) or is_target(asked)
                if name in layers.linears and (ignored or by_asked):
                    problems.append(
                        f"{name} is quantized, but the ignore list hits "
                        f"{'it' if ignored else f'its fused name {asked}'}"
                    )
                elif name in layers.linears and not named and not claimed:
                    problems.append(
                        f"{name} is quantized, but no target names it: vLLM builds a head, which is no "
                        "Linear to it, in full precision"
                        if is_head(name)
                        else f"{name} is quantized, but no target names it"
                    )
                elif (
                    name not in layers.linears
                    and not (ignored and not built.by_name)
                    and not by_asked
                    and (named or claimed)
                ):
                    under = f" under the name {asked}, by which vLLM asks for it" if built.by_name else ""
                    problems.append(
                        f"{name} is not quantized, but neither ignored{under}: vLLM would look for packed "
                        "weights"
                    )
        return problems

    def value_check(self, linear: Linear, last: str, options: Mapping[str, Any]) -> ValueCheck | None:
        if self.parts[last] != "shape":
            return None

        def stated(data: bytes) -> str | None:
            shape = tuple(
                int.from_bytes(data[i : i + 8], "little", signed=True) for i in range(0, len(data), 8)
            )
            wanted = (linear.n, linear.k)
            return None if shape == wanted else f"says {shape}, the tensors {wanted}"

        return stated

    def specs(self, linear: Linear, dtype: str) -> list[TensorSpec]:
        n, k, scheme, name = linear.n, linear.k, linear.weights, linear.name
        layout = layout_of(linear)
        scale: tuple[int, ...] = (1,) if scheme.strategy == "tensor" else scheme.scale_shape(n, k)
        scale_spec = TensorSpec(
            f"{name}.weight_scale", dtype if scheme.scales == "model" else scheme.scales, scale
        )
        if layout == "pack-quantized":
            specs = [TensorSpec(f"{name}.weight_packed", "I32", (n, -(-k * scheme.bits // 32))), scale_spec]
            if not scheme.symmetric:
                specs.append(
                    TensorSpec(f"{name}.weight_zero_point", "I32", (-(-n * scheme.bits // 32), scale[1]))
                )
            specs.append(TensorSpec(f"{name}.weight_shape", "I64", (2,)))
        elif scheme.type == "float" and scheme.bits == 4:
            specs = [TensorSpec(f"{name}.weight_packed", "U8", (n, k // 2)), scale_spec]
        else:
            specs = [
                TensorSpec(
                    f"{name}.weight", "I8" if scheme.type == "int" else "F8_E4M3", linear.stored_shape
                ),
                scale_spec,
            ]
        if scheme.strategy == "tensor_group":
            specs.append(TensorSpec(f"{name}.weight_global_scale", "F32", (1,)))
        inputs = linear.activations
        if inputs is not None and inputs.strategy == "tensor_group":
            specs.append(TensorSpec(f"{name}.input_global_scale", "F32", (1,)))
        elif inputs is not None and not inputs.dynamic:
            specs.append(TensorSpec(f"{name}.input_scale", "F32", (1,)))
            if not inputs.symmetric:
                specs.append(TensorSpec(f"{name}.input_zero_point", "I8", (1,)))
        return specs

    def pack(self, linear: Linear, tensor: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        import torch

        from quant.formats.packing import pack, pack_halves, unsigned

        name, scheme = linear.name, tensor.scheme
        layout = layout_of(linear)
        scales = tensor.scales.reshape(1) if scheme.strategy == "tensor" else tensor.scales
        packed: dict[str, torch.Tensor] = {}
        if layout == "pack-quantized":
            packed["weight_packed"] = pack(unsigned(tensor.codes, scheme.bits), scheme.bits)
            packed["weight_shape"] = torch.tensor(tensor.shape, dtype=torch.int64)
            scales = scales.to(dtype)
            if tensor.zeros is not None:
                words = pack(unsigned(tensor.zeros, scheme.bits).t().contiguous(), scheme.bits)
                packed["weight_zero_point"] = words.t().contiguous()
        elif tensor.codes.dtype == torch.uint8:
            packed["weight_packed"] = pack_halves(tensor.codes)
        else:
            packed["weight"] = tensor.codes.t().contiguous() if linear.transposed else tensor.codes
        packed["weight_scale"] = scales.float() if scheme.scales == "F32" else scales
        if tensor.global_scale is not None:
            packed["weight_global_scale"] = tensor.global_scale.float()
        if tensor.inputs is not None:
            made = {
                "input_scale": tensor.inputs.scale,
                "input_zero_point": tensor.inputs.zero,
                "input_global_scale": tensor.inputs.global_scale,
            }
            packed |= {
                k: v if k == "input_zero_point" else v.float() for k, v in made.items() if v is not None
            }
        return {f"{name}.{k}": v for k, v in packed.items()}

    def unpack(
        self, linear: Linear, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> QuantizedTensor:
        import torch

        from quant.formats.packing import unpack, unpack_halves
        from quant.tensors import InputParameters, QuantizedTensor

        name, scheme = linear.name, linear.weights
        layout = layout_of(linear)
        scales = tensors[f"{name}.weight_scale"]
        given = [
            tensors.get(f"{name}.{s}") for s in ("input_scale", "input_zero_point", "input_global_scale")
        ]
        inputs = (
            InputParameters(*(None if x is None else x.reshape(1) for x in given))
            if any(x is not None for x in given)
            else None
        )
        zeros = group_index = None
        if layout == "pack-quantized":
            bits, offset = scheme.bits, 2 ** (scheme.bits - 1)
            shape = tensors.get(f"{name}.weight_shape")
            if shape is not None and shape.tolist() != [linear.n, linear.k]:
                raise ValueError(f"weight_shape is {shape.tolist()}")
            codes = unpack(tensors[f"{name}.weight_packed"], bits, linear.k).to(torch.int16) - offset
            codes = codes.to(torch.int8)
            if not scheme.symmetric:
                words = _held(tensors, name, "weight_zero_point").t().contiguous()
                zeros = (
                    (unpack(words, bits, linear.n).to(torch.int16) - offset).to(torch.int8).t().contiguous()
                )
            group_index = tensors.get(f"{name}.weight_g_idx")
        elif scheme.type == "float" and scheme.bits == 4:
            codes = unpack_halves(tensors[f"{name}.weight_packed"])
        else:
            codes = tensors[f"{name}.weight"]
            codes = codes.t() if linear.transposed else codes
        if scheme.strategy == "tensor":
            scales = scales.reshape(1, 1)
        elif scales.ndim == 1:
            scales = scales.unsqueeze(1)
        divisor = (
            _held(tensors, name, "weight_global_scale").reshape(1)
            if scheme.strategy == "tensor_group"
            else None
        )
        return QuantizedTensor(codes, scales, zeros, scheme, group_index, divisor, inputs)

    def config(self, contents: Contents) -> dict[str, Any]:
        linears, wrapped = contents.linears, len(contents.model_types) > 1
        kinds = list(dict.fromkeys((x.weights, x.activations) for x in linears))
        layouts: list[str] = []
        groups = {}
        for i, kind in enumerate(kinds):
            members = [x for x in linears if (x.weights, x.activations) == kind]
            layouts.append(layout_of(members[0]))
            groups[f"group_{i}"] = {
                # with one scheme the class name and a complete ignore list (heads and embeddings are of other
                # classes); with several, names alone: a class would catch what a name missed
                "targets": [
                    "Linear",
                    *_targets((x for x in members if module_class(x.name) != "Linear"), wrapped),
                ]
                if len(kinds) == 1
                else _targets(members, wrapped),
                "format": layouts[-1],
                "weights": arguments(kind[0]),
                "input_activations": None if kind[1] is None else activation_arguments(kind[1]),
                "output_activations": None,
            }
        return {
            "quant_method": "compressed-tensors",
            "format": layouts[0] if len(set(layouts)) == 1 else "mixed-precision",
            "config_groups": groups,
            "ignore": contents.left_alone(patterns=True),
            "kv_cache_scheme": None if contents.kv_cache is None else dict(contents.kv_cache),
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "global_compression_ratio": None,
            "version": "0.17.0",
        }

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> QuantizedLayers:
        groups = config.get("config_groups")
        names_listed(config, "ignore")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError(
                "quantization_config has no config_groups: compressed-tensors needs at least one"
            )
        formats = {str(g.get("format") or config.get("format")) for g in groups.values()}
        if formats - set(LAYOUTS):
            raise CheckpointError(
                f"compressed-tensors format {', '.join(sorted(formats - set(LAYOUTS)))} is not read here; "
                f"read are {', '.join(LAYOUTS)}"
            )
        coded = suffixed(tensors, ".weight_packed")
        coded += [
            n for n in suffixed(tensors, ".weight") if tensors[f"{n}.weight"].dtype in ("I8", "F8_E4M3")
        ]
        group_of = targeted(groups)
        stacks = stacked_linears(
            self, tensors, lambda name, parts: self._grouped(name, groups, group_of, config, parts)
        )
        stacked = {n.rpartition(".")[0] for stack in stacks.values() for n in stack.tensors}
        coded = [n for n in coded if n not in stacked]
        require(tensors, sorted(coded), "weight_scale")
        linears = {n: self._grouped(n, groups, group_of, config, tensors) for n in sorted(coded)}
        return QuantizedLayers(self.name, linears, {}, stacks=stacks)

    def _grouped(
        self,
        name: str,
        groups: Mapping[str, Any],
        group_of: Callable[..., str | None],
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
    ) -> Linear:
        """One linear, by the config group that targets it.

        Raises:
            CheckpointError: there is none; or the two contradict each other.
        """
        key = group_of(name)
        if key is None:
            raise CheckpointError(f"{name} has quantized weights, but no config group targets it")
        group = groups[key]
        return self._linear(name, group, str(group.get("format") or config.get("format")), tensors)

    def _linear(
        self, name: str, group: Mapping[str, Any], layout: str, tensors: Mapping[str, TensorInfo]
    ) -> Linear:
        """One linear as its config group and headers say.

        Raises:
            CheckpointError: they contradict each other.
        """
        scale = tensors[f"{name}.weight_scale"]
        stated = group_scheme(group, layout, name)
        scheme, activations = stated.weights, stated.activations
        last, dtype, per_word = LAYOUTS[layout]
        require(tensors, [name], last)
        codes = tensors[f"{name}.{last}"]
        if codes.dtype != dtype or len(codes.shape) != 2 or len(scale.shape) > 2:
            raise CheckpointError(
                f"{name}: {last} is {codes.dtype} {codes.shape}, weight_scale {scale.shape}: [N, …] of "
                f"{dtype} and a scale each group"
            )
        n, columns = codes.shape
        k = columns * (per_word or 32 // scheme.bits)
        if layout == "pack-quantized":
            # weight_shape is data, not header: K follows from the groups, or from the full words where there
            # is one group a row
            if scheme.group_size != -1 and len(scale.shape) == 2:
                k = scale.shape[1] * scheme.group_size
        linear = Linear(name, n, k, scheme, activations)
        if layout_of(linear) != layout:
            raise CheckpointError(
                f"{name}: format {layout} with {linear.scheme}: these numbers belong into {layout_of(linear)}"
            )
        return linear


FormatRegistry.add(CompressedTensors.name, CompressedTensors())
