"""Checkpoints of older programs, whose config does not say in vLLM's words (or not in config.json) how they
are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quant.checkpoint.reader import Checkpoint, read_json
from quant.errors import CheckpointError
from quant.formats.base import FormatRegistry, QuantizedLayers, missing_tensors
from quant.vllm.config import quantization_config, text_config, text_path, without_quantization

#: Side files that quantizers wrote before transformers had ``quantization_config``: AutoGPTQ's and AutoAWQ's.
SIDE_FILES = ("quantize_config.json", "quant_config.json")


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
        words = {last for form in FormatRegistry.loaded() for last in form.lasts("codes")} - {"weight"}
        packed = next((n for n in checkpoint.tensors if n.rpartition(".")[2] in words), None)
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


def lacking(checkpoint: Checkpoint, layers: QuantizedLayers, inputs: bool = True) -> list[str]:
    """Quantized linears without a tensor that their scheme asks for, a line for each kind of tensor;
    ``inputs``: calibrated numbers of their inputs count too."""
    form = layers.form
    optional = form.lasts("group_index", "shape", *(() if inputs else ("inputs",)))
    wanted = [
        (x.name, s.name.removeprefix(f"{x.name}."))
        for x in layers.linears.values()
        if x.name not in layers.slices  # whose tensors were found with the stack's
        for s in form.specs(x, "BF16")
    ]
    return missing_tensors(
        (name, last)
        for name, last in wanted
        if last not in optional and layers.tensor(f"{name}.{last}") not in checkpoint.tensors
    )


def _method(quantization: Mapping[str, Any]) -> str | None:
    """Whose keys these are."""
    return next((f.quant_method for f in FormatRegistry if f.own_keys & set(quantization)), None)
