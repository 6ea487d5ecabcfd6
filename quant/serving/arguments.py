"""Engine arguments for a checkpoint: what ``vllm serve`` is told, and why. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant.formats.base import quantization_config


@dataclass(frozen=True)
class Argument:
    """One engine argument with the reason for its value."""

    name: str
    value: str | int | float
    reason: str


def model_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that vLLM will compute in: the checkpoint's own, with fp32 brought to bf16."""
    text = config.get("text_config")
    places = [config, text if isinstance(text, dict) else {}]
    stated = next((str(p[k]).removeprefix("torch.") for p in places for k in ("dtype", "torch_dtype") if p.get(k)), "bfloat16")
    return stated if stated in ("float16", "bfloat16") else "bfloat16"


def context_length(config: Mapping[str, Any]) -> int | None:
    """Longest context that config.json states."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        value = place.get("max_position_embeddings")
        if isinstance(value, int) and value > 0:
            return value
    return None


def engine_arguments(config: Mapping[str, Any], *, tensor_parallel: int = 1, max_model_len: int | None = None) -> list[Argument]:
    """Arguments for ``vllm serve`` that the checkpoint itself decides; vLLM finds the quantization in config.json."""
    dtype = model_dtype(config)
    method = (quantization_config(config) or {}).get("quant_method")
    why = f"scales are stored in it; quant_method {method} is read from config.json" if method else "the weights' own"
    arguments = [Argument("dtype", dtype, why)]
    length = max_model_len or context_length(config)
    if length:
        arguments.append(
            Argument(
                "max-model-len",
                length,
                "as asked" if max_model_len else "the longest context of config.json: lower it to fit more requests",
            )
        )
    if tensor_parallel > 1:
        arguments.append(Argument("tensor-parallel-size", tensor_parallel, "as asked; shapes were checked for it"))
    return arguments


def vllm_config(arguments: list[Argument]) -> dict[str, Any]:
    """The content of ``vllm_config.json``, which ``vllm serve MODEL --config vllm_config.json`` reads."""
    return {a.name: a.value for a in arguments}
