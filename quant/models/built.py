"""What transformers builds from a config.json, without weights, beside a file's headers.

:mod:`quant.models.implied` judges what a config says whatever the family; where transformers has the class
that the config names, every parameter of it is known, towers and norms included. Imported when torch is there
anyway.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from quant.checkpoint.reader import Checkpoint
from quant.models.binding import converter_of, converters_of, made_with, renamings_of
from quant.models.implied import ANEW, one_of_each
from quant.models.roles import EXPERT, block_list, block_of, kind_of
from quant.offline import load_config, transformers
from quant.vllm.architectures import has_class

#: Share of a class's parameters that a file must have for the two to be compared: below it the file is named
#: in another way, as a program of its own does.
_COMPARABLE = 0.5


#: Largest number of layers or experts that is built: each is a Python object.
_MOST_MODULES = 2**14


def _largest(part: Any) -> int:
    """The largest number of layers, blocks or experts that a config states at any depth."""
    if not isinstance(part, Mapping):
        return 0
    own = (
        v
        for k, v in part.items()
        if isinstance(v, int) and k.endswith(("layer", "layers", "depth", "blocks", "experts"))
    )
    return max((*own, *(_largest(v) for v in part.values())), default=0)


def built_model(checkpoint: Checkpoint) -> nn.Module | None:
    """The model that config.json names, on the meta device; None where transformers has no such class, or
    cannot build it so."""
    names = checkpoint.config.get("architectures")
    auto = transformers()
    kind = getattr(auto, str(names[0]), None) if isinstance(names, list) and names else None
    if not isinstance(kind, type) or not issubclass(kind, auto.PreTrainedModel):
        return None
    if _largest(checkpoint.config) > _MOST_MODULES:
        return None
    try:
        config = load_config(checkpoint.path)
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        with torch.device("meta"), torch.no_grad():
            model = kind(config)
        return model if isinstance(model, nn.Module) else None
    except Exception:  # what a foreign constructor raises; others say what is wrong with a config
        return None


def built_problems(checkpoint: Checkpoint) -> list[str]:
    """What a file has otherwise than the class that its config.json names, a line for each kind: parameters
    of other shapes, matrices that are missing, vectors that only some blocks have; empty where they agree, or
    where transformers does not know the class or names its parameters in another way.

    Args:
        checkpoint: with the values of its weights, dequantized where it is quantized.
    """
    model = built_model(checkpoint)
    if model is None:
        return []
    wanted = dict(model.named_parameters(remove_duplicate=False))
    filled, unknown = _filled(checkpoint, model, wanted)
    if not filled and ("auto_map" not in checkpoint.config or has_class(checkpoint.config)):
        first = next(iter(checkpoint.tensors))
        return [
            f"none of the file's tensors has a name of {type(model).__name__}: {first!r} is the first, where "
            f"the class has {next(iter(wanted))!r}: rename them, or repair architectures in config.json"
        ]
    if len(filled) < _COMPARABLE * len(wanted):
        return []
    differences: list[tuple[str, str]] = []
    for name, tensor in filled.items():
        shape = tuple(wanted[name].shape)
        if tensor is not None and (stored := checkpoint.info(tensor).shape) != shape:
            line = f"{tensor} is {list(stored)} in the file, {list(shape)} by config.json: {ANEW}"
            differences.append((kind_of(name) + str(stored), line))
    kinds = {kind_of(name) for name in filled}
    for name in _missing(model, wanted, filled):
        if _block(name) in unknown:
            continue  # it may be there under another name
        if wanted[name].ndim > 1 or kind_of(name) in kinds:
            line = f"{name} {list(wanted[name].shape)} is not in the file, and config.json implies it: {ANEW}"
            differences.append((kind_of(name), line))
    return list(one_of_each(differences))


def _filled(
    checkpoint: Checkpoint, model: nn.Module, wanted: Mapping[str, Any]
) -> tuple[dict[str, str | None], set[str]]:
    """The parameters that a file fills, each with the tensor that is equal to it, None of those that are made
    of several; and the blocks in which the file has matrices that fill none."""
    renamed, converters = renamings_of(model), converters_of(model)
    base = str(getattr(model, "base_model_prefix", ""))
    filled: dict[str, str | None] = {}
    unknown: set[str] = set()
    seen: set[str] = set()
    for tensor, info in checkpoint.tensors.items():
        kind = EXPERT.sub(".experts.0.", tensor)
        if kind in seen:
            continue  # experts are counted elsewhere
        seen.add(kind)
        name = renamed(tensor)
        names = (name, f"{base}.{name}", name.removeprefix(f"{base}."))
        name_in_model = next((n for n in names if n in wanted), None)
        made = (match for n in names if (match := converter_of(converters, n, wanted)) is not None)
        if name_in_model is not None:
            filled[name_in_model] = tensor
        elif (match := next(made, None)) is not None:
            filled |= dict.fromkeys(made_with(match[0], match[1]))
        elif len(info.shape) > 1 and block_list(name) is not None:
            unknown |= {_block(n) for n in names}
    return filled, unknown


def _block(name: str) -> str:
    """The block of a parameter, with what stands before its number; empty outside of blocks."""
    return f"{block_list(name) or ''}{'' if block_of(name) is None else block_of(name)}"


def _missing(model: nn.Module, wanted: Mapping[str, Any], filled: Collection[str]) -> Iterable[str]:
    """Parameters that nothing fills: neither a tensor, nor another parameter that they are tied to."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    tied |= {source: name for name, source in tied.items()}
    known = {id(wanted[name]) for name in filled}
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    for name, parameter in wanted.items():
        same = name in filled or id(parameter) in known or tied.get(name) in filled
        if not same and not any(p.search(name) for p in ignored):
            yield name
