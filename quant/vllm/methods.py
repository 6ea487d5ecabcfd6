"""Which ``quant_method`` vLLM loads, in its own spelling with hyphens.

Source: vLLM 0.32 `quantization/__init__.py::QuantizationMethods`, and the shorthands of `auto-round` in
`quantization/inc`. GGUF and bitsandbytes have left its tree.
"""

from __future__ import annotations

from quant.errors import clipped
from quant.vllm.releases import VLLM_VERSION

_LOADED = frozenset(
    {
        "auto-awq", "auto-gptq", "auto-round", "awq", "awq-marlin", "compressed-tensors", "deepseek-v4-fp8",
        "experts-int8", "fbgemm-fp8", "fp-quant", "fp8", "gpt-oss-mxfp4", "gptq", "gptq-marlin", "humming",
        "inc", "modelopt", "modelopt-fp4", "modelopt-mixed", "modelopt-mxfp8", "moe-wna16", "mxfp4", "quark",
        "torchao",
    }
)  # fmt: skip


#: Refused without ``--allow-deprecated-quantization`` (`config/model.py::_verify_quantization`).
DEPRECATED = frozenset({"fbgemm-fp8", "fp-quant"})


def method_problem(method: str) -> str | None:
    """Why vLLM does not load a checkpoint of a ``quant_method``, or None where it does."""
    if method in _LOADED:
        return None
    return f"vLLM {VLLM_VERSION} has no quant_method {clipped(method)}"
