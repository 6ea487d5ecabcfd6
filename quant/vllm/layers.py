"""The layers that vLLM builds of a checkpoint's linears: which of them it fuses, and how it cuts each over ranks.

Source: the ``packed_modules_mapping`` of its model classes and the parallel linears they are made of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from quant.schemes import BLOCK, ActivationScheme, Scheme, WeightScheme, scheme_of


@dataclass(frozen=True)
class Linear:
    """A quantized linear as a format sees it: ``name`` without ``.weight``, N outputs, K inputs, the schemes of
    its weights and activations."""

    name: str
    n: int
    k: int
    weights: WeightScheme
    activations: ActivationScheme | None = None

    @property
    def scheme(self) -> Scheme:
        """Weights and activations together, under their name."""
        return scheme_of(self.weights, self.activations)


#: Layers that vLLM builds as one from several of the file's, for any family: last path component → name of
#: the fused layer.
_FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj", "kv_a_proj_with_mqa": "fused_qkv_a_proj",
}  # fmt: skip


def fused_name(linear: str) -> str:
    """The name of the vLLM layer that a linear becomes a part of; its own where it stays alone.

    >>> fused_name("model.layers.0.self_attn.k_proj")
    'model.layers.0.self_attn.qkv_proj'
    """
    head, _, last = linear.rpartition(".")
    if ".experts." in linear:  # all routed experts of a layer become one fused layer
        return linear.split(".experts.")[0] + ".experts"
    return f"{head}.{_FUSED[last]}" if last in _FUSED and head else linear


def shared_name(linear: str) -> str:
    """The layer of which vLLM keeps one number of a kind (a global scale, the scale of static activations): the fused
    one, of routed experts the gate and up projection of each.

    >>> shared_name("model.layers.0.mlp.experts.3.up_proj")
    'model.layers.0.mlp.expert_3.gate_up_proj'
    """
    return fused_name(linear.replace(".experts.", ".expert_"))


def fused_layers(linears: Iterable[str]) -> dict[str, list[str]]:
    """The names of the layers that vLLM builds, each with the linears that become it, in the order given.

    >>> fused_layers(["a.q_proj", "a.o_proj", "a.k_proj"])
    {'a.qkv_proj': ['a.q_proj', 'a.k_proj'], 'a.o_proj': ['a.o_proj']}
    """
    layers: dict[str, list[str]] = {}
    for name in linears:
        layers.setdefault(fused_name(name), []).append(name)
    return layers


def is_head(linear: str) -> bool:
    """Whether vLLM builds a linear as its output head (`ParallelLMHead`), which is no linear to it.

    >>> is_head("model.language_model.lm_head")
    True
    """
    return linear.rpartition(".")[2] == "lm_head"


#: Linears whose input is split over ranks under tensor parallelism; all others split their output.
_ROW_PARALLEL = re.compile(r"\.(o_proj|down_proj|out_proj|dense|dense_4h_to_h|fc2|c_proj|wo|w2)$")

#: Shards of a fused layer that another one follows.
NOT_LAST = (".q_proj", ".k_proj", ".gate_proj")


def shape_problems(linears: Iterable[Linear], tensor_parallel: int) -> list[str]:
    """Group sizes that do not divide, whole and per rank; one line for each kind of layer."""
    linears = list(linears)
    members = fused_layers(linear.name for linear in linears)
    seen: dict[str, str] = {}
    for linear in linears:
        kind = re.sub(r"\.\d+\.", ".*.", linear.name)
        g, block = linear.weights.group_size, linear.weights.strategy == "block"
        if kind in seen:
            continue
        ignore = f"--ignore '{kind.rsplit('.', 1)[-1]}'"
        if g != -1 and linear.k % g:
            # of blocks too: the file may have a ragged last one, but vLLM's kernels quantize activations in
            # whole groups of 128
            if linear.weights.type == "float":
                use = "--scheme w8a8-fp8"
            else:
                fits = [x for x in (128, 64, 32, 16, 8) if linear.k % x == 0 and x < g]
                use = f"--group-size {fits[0]} or -1" if fits else "--group-size -1"
            seen[kind] = f"{kind}: {linear.k} inputs do not divide into groups of {g}: use {use}, or {ignore}"
        elif (
            block
            and linear.n % BLOCK
            and len(members[fused_name(linear.name)]) > 1
            and linear.name.endswith(NOT_LAST)
        ):
            seen[kind] = (
                f"{kind}: {linear.n} outputs do not divide into blocks of {BLOCK}, which vLLM demands of "
                "all shards of a fused layer but the last: "
                f"use --scheme w8a8-fp8, or {ignore}"
            )
        elif tensor_parallel > 1:
            row = _ROW_PARALLEL.search(linear.name)
            size, what = (linear.k, "inputs") if row else (linear.n, "outputs")
            unit = (g if g != -1 else 1) if row else BLOCK if block else 8
            if size % tensor_parallel or (size // tensor_parallel) % unit:
                allowed = [t for t in (1, 2, 4, 8, 16, 32) if size % t == 0 and (size // t) % unit == 0]
                pieces = f"groups of {g}" if row else f"blocks of {BLOCK}" if block else "words of 8"
                seen[kind] = (
                    f"{kind}: {size} {what} over --tensor-parallel {tensor_parallel} do not divide into "
                    f"{pieces}: "
                    "tensor parallel sizes that do: "
                    f"{', '.join(map(str, allowed)) or 'none'}{'' if linear.weights.type == 'float' else '; or a smaller --group-size'}"
                )
    return list(seen.values())
