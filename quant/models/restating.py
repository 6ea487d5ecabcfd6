"""A checkpoint of one family as one of another that computes the same, where the other can say more of it.

vLLM takes the size of a head of Qwen2 from hidden_size and num_attention_heads, so that config.json cannot
say that there are fewer heads. Llama's has ``head_dim``, and biases of all four projections of attention
(``attention_bias``) where Qwen2 has those of three: the fourth is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.reader import Checkpoint
from quant.errors import CheckpointError

if TYPE_CHECKING:
    import torch

#: Keys of Qwen2 that Llama has not; and those that change what attention computes, where they are true.
_WITHOUT = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_OTHERWISE = ("use_sliding_window", "dual_chunk_attention_config", "qk_norm")
#: What Qwen2's config means by keys that it does not state, where Llama's means something else.
_UNSTATED: Mapping[str, Any] = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "intermediate_size": 22016,
    "vocab_size": 151936,
    "bos_token_id": None,
    "eos_token_id": None,
}


def with_stated_heads(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose config.json can say of what size heads are: a Qwen2 as a Llama; others as they are.

    Raises:
        CheckpointError: a Qwen2 whose attention Llama has not.
    """
    config = checkpoint.config
    if config.get("model_type") != "qwen2":
        return checkpoint
    kinds = {str(kind) for kind in config.get("layer_types") or ()} - {"full_attention"}
    other = [key for key in _OTHERWISE if config.get(key)] + sorted(kinds)
    if config.get("architectures") not in (None, ["Qwen2ForCausalLM"]):
        other.append(f"architectures {config['architectures']}")
    if other:
        raise CheckpointError(
            f"{checkpoint.path}: fewer heads of a Qwen2 are written as a Llama, which alone can state their "
            f"size, and it has no {', '.join(other)}: cut --intermediate-size, or leave blocks out"
        )
    made = {key: value for key, value in ({**_UNSTATED, **config}).items() if key not in _WITHOUT}
    made |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True}
    tensors: dict[str, TensorInfo] = {}
    computed: dict[str, Callable[[], torch.Tensor]] = dict(checkpoint.computed)
    for name, info in checkpoint.tensors.items():
        tensors[name] = info
        bias = f"{name.removesuffix('.weight')}.bias"
        if name.endswith(".self_attn.o_proj.weight") and bias not in checkpoint.tensors:
            size = info.nbytes // max(1, info.numel) * info.shape[0]
            tensors[bias] = replace(info, name=bias, shape=info.shape[:1], end=info.start + size)
            computed[bias] = partial(_zeros, tensors[bias])
    return replace(checkpoint, config=made, tensors=tensors, computed=computed)


def _zeros(info: TensorInfo) -> torch.Tensor:
    import torch

    from quant.checkpoint.dtypes import TORCH

    return torch.zeros(info.shape, dtype=TORCH[info.dtype])
