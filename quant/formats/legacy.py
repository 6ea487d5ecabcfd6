"""Checkpoints of older programs, whose config does not say in vLLM's words (or not in config.json) how they
are quantized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from quant.checkpoint.reader import Checkpoint, read_json
from quant.errors import CheckpointError
from quant.formats.base import FormatRegistry, QuantizedLayers
from quant.vllm.config import quantization_config, text_config, text_path, without_quantization

#: Side files that quantizers wrote before transformers had ``quantization_config``: AutoGPTQ's and AutoAWQ's.
SIDE_FILES = ("quantize_config.json", "quant_config.json")
#: The tensor that says that a linear is quantized → what must be beside it.
_BESIDE = {"qweight": ("qzeros", "scales"), "weight_packed": ("weight_scale",)}
_NAMED = 5


def repaired(checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """The checkpoint with a ``quantization_config`` that stands where vLLM looks and names its method; and
    what was mended.

    Raises:
        CheckpointError: linears are packed and nothing says how.
    """
    config, done = dict(checkpoint.config), []
    quantization = quantization_config(config)
    inside = bool(text_path(config)) and bool(text_config(config).get("quantization_config"))
    wrapper = ".".join(text_path(config))
    if quantization is None:
        for name in SIDE_FILES:
            if (checkpoint.path / name).is_file() and (
                stated := read_json(checkpoint.path / name, "the quantization config")
            ):
                quantization = stated
                done.append(f"quantization_config taken from {name} into config.json")
                break
    elif not config.get("quantization_config"):
        done.append(
            f"quantization_config moved from {wrapper if inside else 'compression_config'} to the top "
            "of config.json"
        )
    elif inside:
        done.append(f"second quantization_config removed from {wrapper}")
    if quantization is None:
        packed = next((n for n in checkpoint.tensors if n.rpartition(".")[2] in _BESIDE), None)
        if packed:
            raise CheckpointError(
                f"{checkpoint.path}: holds packed words ({packed}), but neither config.json nor "
                f"{' nor '.join(SIDE_FILES)} says how they are quantized: "
                "fetch that file from where the checkpoint came from"
            )
        return checkpoint, []
    if not quantization.get("quant_method") and (method := _method(quantization)):
        quantization = {**quantization, "quant_method": method}
        done.append(f"quant_method {method!r} added: it was missing, the other keys are {method}'s")
    old = [k for k in ("w_bit", "q_group_size") if k in quantization]
    if old:
        done.append(f"AutoAWQ's older keys {' and '.join(old)} renamed")
    config = without_quantization(config) | {"quantization_config": quantization}
    return replace(checkpoint, config=config), done


def incomplete(checkpoint: Checkpoint) -> list[str]:
    """Quantized linears whose scales or zero points no file holds, one line for each kind of tensor; as far
    as names and dtypes tell."""
    missing = []
    for name, info in checkpoint.tensors.items():
        module, _, last = name.rpartition(".")
        if last == "weight" and info.dtype in ("F8_E4M3", "I8"):
            if not {f"{module}.weight_scale", f"{module}.weight_scale_inv"} & set(checkpoint.tensors):
                missing.append(f"{module}.weight_scale")
        else:
            missing += [f"{module}.{beside}" for beside in _BESIDE.get(last, ())]
    return _incomplete(n for n in missing if n not in checkpoint.tensors)


def lacking(checkpoint: Checkpoint, found: QuantizedLayers, inputs: bool = True) -> list[str]:
    """The same of every tensor that the scheme of a linear asks for; ``inputs``: calibrated numbers of its
    input too."""
    form = FormatRegistry.get(found.format)
    wanted = [s.name for x in found.linears.values() for s in form.specs(x, "BF16")]
    optional = (
        ".g_idx",
        ".weight_shape",
        *(() if inputs else (".input_scale", ".input_zero_point", ".input_global_scale")),
    )
    return _incomplete(n for n in wanted if n not in checkpoint.tensors and not n.endswith(optional))


def _incomplete(names: Iterable[str]) -> list[str]:
    missing: dict[str, list[str]] = {}
    for name in sorted(names):
        module, _, last = name.rpartition(".")
        missing.setdefault(last, []).append(module)
    return [
        f"{len(modules)} quantized linears have no {last} "
        f"({', '.join(modules[:_NAMED])}{', …' if len(modules) > _NAMED else ''}): "
        "the checkpoint is incomplete, fetch its files again"
        for last, modules in missing.items()
    ]


def _method(quantization: Mapping[str, Any]) -> str | None:
    """Whose keys these are."""
    if "config_groups" in quantization:
        return "compressed-tensors"
    if {"w_bit", "zero_point"} & set(quantization):
        return "awq"
    return "gptq" if {"desc_act", "sym"} & set(quantization) else None
