"""How a family lays out its decoder blocks, as rows of data. No torch: planning and verification read them
too.

A row says where the blocks are, which linears read the same input (their statistics are gathered once, and
they are solved as one matrix), what that input comes from (a norm or a linear into which scaling can be
folded), and under which name vLLM fuses the group. Adding a family is adding a row; see ``docs/adapters.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant.registry import Registry


@dataclass(frozen=True)
class InputGroup:
    """Linears of a block that read one and the same input.

    Attributes:
        linears: module paths inside the block, in vLLM's order.
        source: the module whose output the input is, up to element-wise steps: a norm, or a linear (v_proj
            before o_proj, up_proj before down_proj). Scaling of the input can be folded there.
        fused: vLLM's name of the layer made of these linears; empty where each stays alone.
        experts: of routed experts, the module that computes them; then each expert has an input of its own.
        stage: which of an expert's two products: ``up`` (gate and up projection) or ``down``. The source of
            the second is the up projection of any of them: each expert's own makes its input.
        norm_offset: of a source that is a norm; None: the family's.
        readers: matrices beside the blocks' linears that read the same input (a router); groups that have one
            norm for a source read one input, too.
    """

    linears: tuple[str, ...]
    source: str
    fused: str = ""
    experts: str = ""
    stage: str = ""
    norm_offset: float | None = None
    readers: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelAdapter:
    """One family.

    Attributes:
        name: the family's.
        model_types: values of ``model_type`` in config.json.
        groups: every linear of a block, in the order of the forward pass.
        norm_offset: added to a norm's stored weight to get its gain (Gemma stores w and multiplies by 1 + w).
        blocks: module path of the list of blocks in the causal language model.
    """

    name: str
    model_types: tuple[str, ...]
    groups: tuple[InputGroup, ...]
    norm_offset: float = 0.0
    blocks: str = "model.layers"

    def linears(self) -> list[str]:
        return [linear for group in self.groups for linear in group.linears]


def _wrong(entry: Any) -> str | None:
    return None if isinstance(entry, ModelAdapter) else f"it is not a ModelAdapter but {type(entry).__name__}"


ModelRegistry: Registry[ModelAdapter] = Registry("model family", "quant.models", _wrong)


def _gated(
    norm: str,
    qkv: InputGroup,
    mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj"),
    value: str = "self_attn.v_proj",
) -> tuple[InputGroup, ...]:
    """The usual block: q/k/v, o, gate/up, down."""
    return (
        qkv,
        InputGroup(("self_attn.o_proj",), value),
        InputGroup(mlp, norm, "mlp.gate_up_proj"),
        InputGroup(("mlp.down_proj",), mlp[-1]),
    )


_QKV = InputGroup(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "self_attn.qkv_proj"
)
_LLAMA = _gated("post_attention_layernorm", _QKV)
_GEMMA = _gated("pre_feedforward_layernorm", _QKV)
_PHI3 = _gated(
    "post_attention_layernorm",
    InputGroup(("self_attn.qkv_proj",), "input_layernorm", "self_attn.qkv_proj"),
    ("mlp.gate_up_proj",),
    "self_attn.qkv_proj",
)

LlamaAdapter = ModelRegistry.add("llama", ModelAdapter("llama", ("llama",), _LLAMA))
QwenAdapter = ModelRegistry.add("qwen", ModelAdapter("qwen", ("qwen2", "qwen3"), _LLAMA))
MistralAdapter = ModelRegistry.add("mistral", ModelAdapter("mistral", ("mistral",), _LLAMA))
GemmaAdapter = ModelRegistry.add(
    "gemma", ModelAdapter("gemma", ("gemma2", "gemma3_text"), _GEMMA, norm_offset=1.0)
)
Phi3Adapter = ModelRegistry.add("phi3", ModelAdapter("phi3", ("phi3",), _PHI3))


def adapter_for(config: Mapping[str, Any]) -> ModelAdapter | None:
    """The row of a config's ``model_type``, or None for a family that has none."""
    model_type = config.get("model_type")
    return next((a for a in ModelRegistry if model_type in a.model_types), None)
