"""What vLLM calls a scale, and which of its model classes know other names for one.

Source: vLLM 0.32 `quantization/fp8.py::Fp8LinearMethod.create_weights` and the ``hf_to_vllm_mapper`` of the
model classes.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Model type → spellings that its class renames, with vLLM's own.
_KNOWN: Mapping[str, Mapping[str, str]] = {
    # `models/mistral3.py`: the names that transformers gives to FP8 with one scale a tensor
    "mistral3": {"weight_scale_inv": "weight_scale", "activation_scale": "input_scale"},
    # `models/deepseek_v4.py`: DeepSeek's own
    "deepseek_v4": {"scale": "weight_scale_inv"},
}


def unread_spellings(model_type: str, stored: Mapping[str, str]) -> list[str]:
    """What vLLM would not find of a checkpoint's scales, because the file calls them otherwise.

    Args:
        stored: vLLM's name of a tensor → the file's, where they differ.
    """
    known = _KNOWN.get(model_type, {})
    return [
        f"{name} is what vLLM calls {own.rpartition('.')[2]}, and its class for model type {model_type!r} "
        "knows no other name: quant export-vllm writes it so"
        for own, name in stored.items()
        if known.get(name.rpartition(".")[2]) != own.rpartition(".")[2]
    ]
