"""How vLLM reads the list of modules that a ``quantization_config`` leaves in 16 bits: each method has a key
and a way of its own to compare an entry with a module's name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate
from typing import Any

from quant.vllm.config import source_method
from quant.vllm.layers import fused_name


def whole(entry: str, name: str) -> bool:
    """The whole name (`quantization/utils/quant_utils.py::is_layer_skipped`)."""
    return entry == name


def part(entry: str, name: str) -> bool:
    """Any part of the name (`is_layer_skipped` with ``skip_with_substr``, as AWQ asks for it)."""
    return entry in name


def part_or_wildcard(entry: str, name: str) -> bool:
    """Any part of the name, or a wildcard for the whole (`quantization/modelopt.py::is_layer_excluded`)."""
    return entry in name or fnmatchcase(name, entry)


def whole_or_pattern(entry: str, name: str) -> bool:
    """The whole name, or ``re:`` and a regular expression for its beginning
    (`compressed_tensors/utils.py::_match_layer_name`)."""
    return re.match(entry[3:], name) is not None if entry.startswith("re:") else entry == name


def component(entry: str, name: str) -> bool:
    """A component of the name, or its beginning up to one, as bitsandbytes' loader compares them."""
    return entry in name.split(".") or name.startswith(f"{entry}.") or entry == name


@dataclass(frozen=True)
class IgnoreList:
    """Of one method: ``keys`` of its config, of which the first that holds something counts; ``names``: how
    an entry is compared with a module's name."""

    keys: tuple[str, ...]
    names: Callable[[str, str], bool]


_MODULES = ("ignored_layers", "modules_to_not_convert")
#: ``quant_method`` in vLLM's spelling → its list; what has no row compares whole names.
IGNORE_LISTS: Mapping[str, IgnoreList] = {
    "compressed-tensors": IgnoreList(("ignore",), whole_or_pattern),
    **dict.fromkeys(("awq", "auto-awq", "awq-marlin"), IgnoreList(("modules_to_not_convert",), part)),
    **dict.fromkeys(
        ("modelopt", "modelopt-fp4", "modelopt-mxfp8", "modelopt-mixed"),
        IgnoreList(("ignore", "exclude_modules"), part_or_wildcard),
    ),
    "bitsandbytes": IgnoreList(("llm_int8_skip_modules",), component),
}
_OTHER = IgnoreList(_MODULES, whole)
#: Ways for which any part of a name is enough, and what makes an entry a wildcard.
_PARTS, _WILD = (part, part_or_wildcard), frozenset("*?[")


def left_out(config: Mapping[str, Any]) -> Callable[..., bool]:
    """Whether a ``quantization_config`` leaves a module, given by all names that it may have, in 16 bits;
    each is compared as it is and as the layer that vLLM fuses it into.

    Raises:
        re.error: an entry that is no regular expression.

    >>> left_out({"quant_method": "awq", "modules_to_not_convert": ["visual"]})("model.visual.merger.mlp.0")
    True
    >>> left_out({"quant_method": "fp8", "ignored_layers": ["q_proj"]})("model.layers.0.self_attn.q_proj")
    False
    """
    row = IGNORE_LISTS.get(source_method(config) or "", _OTHER)
    entries = [str(entry) for entry in next((config[k] for k in row.keys if config.get(k)), [])]
    exact = frozenset(entries)  # there may be hundreds, and many thousands of names
    if row.names is whole:
        compared: list[str] = []
    elif row.names is whole_or_pattern:
        compared = [e for e in entries if e.startswith("re:")]
    else:
        compared = entries if row.names is component else []
    wild = [translate(e) for e in entries if row.names is part_or_wildcard and not _WILD.isdisjoint(e)]
    wildcards = re.compile("|".join(wild) or "(?!)")
    inside = re.compile("|".join(map(re.escape, entries)) if row.names in _PARTS and entries else "(?!)")

    def listed(*names: str) -> bool:
        asked = dict.fromkeys(n for name in names for n in (name, fused_name(name)))
        return any(
            n in exact
            or inside.search(n) is not None
            or wildcards.match(n) is not None
            or any(row.names(entry, n) for entry in compared)
            for n in asked
        )

    return listed
