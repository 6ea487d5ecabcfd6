"""K and V as attention sees them, after rotary embedding: recorded in a registered attention function, not at a linear's output."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quant.offline import transformers

_NAME = "quant_recorded"


@contextmanager
def observed_attention(
    block: nn.Module, observe: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[None]:
    """While it lasts, the block's attention goes on with what ``observe(key, value)`` returns, [batch, KV heads, tokens, head size] each.

    Masks must have been made before: their kind goes by the name of the attention function.
    """
    functions = transformers().modeling_utils.ALL_ATTENTION_FUNCTIONS
    configs: dict[int, Any] = {id(c): c for m in block.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}

    def observed(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = before[id(module.config)]
        inner = functions[name] if name in functions else sys.modules[type(module).__module__].eager_attention_forward
        return inner(module, query, *observe(key, value), *args, **kwargs)

    functions.register(_NAME, observed)
    for config in configs.values():
        config._attn_implementation = _NAME
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
