"""What goes on inside a block's attention: K and V recorded as it sees them, and a faster way to compute it
on a CPU.

Both are attention functions registered with transformers, so that no model's code needs to change.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quant.models.products import is_widened
from quant.offline import transformers

#: Queries that are handled at once: all keys up to the last one's are computed, those that the others will
#: mask too. Of longer rows than the longest, the scores of one stretch would take too much memory.
_QUERIES, _LONGEST = 64, 1 << 14


@contextmanager
def attention_through(block: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, ``function(inner, module, query, key, value, mask, …)`` is the block's attention;
    ``inner`` is the one it had.

    Masks must have been made before: their kind goes by the name of the attention function. A block whose
    attention is not looked up among transformers' functions is left alone: some choose what they compute by
    the name itself, as Falcon's does.
    """
    if not any(_looks_up(m) for m in block.modules()):
        yield
        return
    functions = transformers().modeling_utils.ALL_ATTENTION_FUNCTIONS
    configs: dict[int, Any] = {
        id(c): c for m in block.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")
    }
    before = {key: config._attn_implementation for key, config in configs.items()}

    def instead(module: Any, *args: Any, **kwargs: Any) -> Any:
        had = before[id(module.config)]
        inner = (
            functions[had]
            if had in functions
            else sys.modules[type(module).__module__].eager_attention_forward
        )
        return function(inner, module, *args, **kwargs)

    functions.register(name, instead)
    for config in configs.values():
        config._attn_implementation = name
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _looks_up(module: nn.Module) -> bool:
    """Whether the module's forward chooses its attention among transformers' functions."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


@contextmanager
def observed_attention(
    block: nn.Module, observe: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[None]:
    """While it lasts, the block's attention goes on with what ``observe(key, value)`` returns, [batch, KV
    heads, tokens, head size] each."""

    def observed(
        inner: Any,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return inner(module, query, *observe(key, value), *args, **kwargs)

    with attention_through(block, "quant_recorded", observed):
        yield


@contextmanager
def staircase_attention(block: nn.Module) -> Iterator[None]:
    """While it lasts, plain causal attention of a block on a CPU is computed without the keys that its mask
    would hide anyway.

    torch's kernel skips none at the lengths of calibration rows, and multiplies 16-bit numbers no faster than
    32-bit ones where there is no AMX. Whatever is not plain causal attention (another mask, an extra
    argument) is left to the function that the block has.
    """

    def staircase(
        inner: Any,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,  # some models pass it by this name
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        heads, tokens = query.shape[1:3]
        extra = {k for k, v in kwargs.items() if v is not None} - {
            "scaling",
            "dropout",
            "position_ids",
            "use_cache",
            "sliding_window",
        }
        plain = (
            attention_mask is None
            and not args
            and not extra
            and not kwargs.get("dropout")
            and getattr(module, "is_causal", False)
        )
        latent = value.shape[3] != query.shape[3]
        if (
            not plain
            or latent
            or not _QUERIES < tokens <= _LONGEST
            or key.shape[2] != tokens
            or heads % key.shape[1]
            or query.device.type != "cpu"
        ):
            return inner(module, query, key, value, attention_mask, *args, **kwargs)
        return causal(query, key, value, kwargs.get("scaling")).transpose(1, 2).contiguous(), None

    with attention_through(block, "quant_staircase", staircase):
        yield


def causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Causal attention of query [B, H, T, D] on key and value [B, G, T, D], G a divisor of H; returns [B, H,
    T, D].

    The queries of a stretch of tokens meet only the keys up to its end, and the heads that share a K and V
    are multiplied together. Products are in the dtype of the inputs, as in transformers' eager attention:
    scores and probabilities of bf16 inputs are rounded to bf16, which puts the output off by about as much as
    two roundings of its own. Where bf16 products are slow (:mod:`quant.models.products`) all is in fp32, row
    by row, and rounded at the end.
    """
    if is_widened(query):
        rows = zip(query.split(1), key.split(1), value.split(1), strict=True)
        wide = (causal(q.float(), k.float(), v.float(), scaling).to(q.dtype) for q, k, v in rows)
        return torch.cat(list(wide))
    batch, heads, tokens, size = query.shape
    groups = key.shape[1]
    shared = (query * (size**-0.5 if scaling is None else scaling)).unflatten(1, (groups, heads // groups))
    keys, values = key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1)
    output = torch.empty_like(query)
    parts = output.unflatten(1, (groups, heads // groups))
    later = torch.ones(_QUERIES, _QUERIES, dtype=torch.bool).triu_(1)
    for start in range(0, tokens, _QUERIES):
        end = min(start + _QUERIES, tokens)
        stretch = shared[:, :, :, start:end]
        scores = torch.bmm(stretch.reshape(batch * groups, -1, size), keys[:, :, :end])
        scores.view(-1, end - start, end)[..., start:].masked_fill_(
            later[: end - start, : end - start], -torch.inf
        )
        parts[:, :, :, start:end] = torch.bmm(torch.softmax(scores, -1), values[:, :end]).view(stretch.shape)
    return output
