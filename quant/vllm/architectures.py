"""Which model classes vLLM has. ``architectures.json`` beside this file says it of the release that is
planned for; ``docs/make_architectures.py`` makes it from an installed vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from quant.vllm.config import BLOCK_KINDS, parts, stated
from quant.vllm.releases import VLLM_VERSION, parse_version

#: What the names of classes that write text end in: of those, the table has all that transformers knew.
_WRITING = ("CausalLM", "ConditionalGeneration", "LMHeadModel")
#: Keys of blocks that keep a state instead of keys and values.
_STATES = (
    "mamba_d_state", "ssm_state_size", "state_size", "lru_width", "attn_layer_indices", "linear_num_heads",
)  # fmt: skip
#: Classes that the release which is planned for has, and that stop at every file of theirs → why.
_BROKEN = {"DbrxForCausalLM": "its loader looks for experts where its own modules have none (models/dbrx.py)"}


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    return dict(json.loads(Path(__file__).with_name("architectures.json").read_text(encoding="utf-8")))


def _without_attention(config: Mapping[str, Any]) -> str | None:
    """A kind of block in a config that is no attention, or None."""
    for key in BLOCK_KINDS:
        kinds = stated(config, key)
        for kind in kinds if isinstance(kinds, list) else ():
            if not str(kind).endswith("attention") or str(kind).startswith("linear"):
                return str(kind)
    return next((key for key in _STATES if stated(config, key) is not None), None)


def architecture_problem(config: Mapping[str, Any], vllm_version: str = VLLM_VERSION) -> str | None:
    """Why no class of vLLM's serves a model, as far as its config tells, or None.

    Of earlier releases only is known which classes they had last; of code that a checkpoint brings along,
    nothing.

    Args:
        config: config.json, whose first of ``architectures`` decides where vLLM has none of them.

    Source: `models/registry.py::_ModelRegistry.resolve_model_cls` and, of what transformers runs,
    `models/transformers/base.py::Base._create_attention_instances`.

    >>> architecture_problem({"architectures": ["LlamaForCausalLM"]})
    >>> architecture_problem({"architectures": ["MptForCausalLM"]}, "0.28.0")
    >>> architecture_problem({"architectures": ["MptForCausalLM"]})
    'MptForCausalLM was in vLLM until 0.28.0, and is not in 0.32'
    """
    names, table = _classes(config), _table()
    release, planned = parse_version(vllm_version), parse_version(table["vllm"])
    built = next((name for name in names if name in table["built"]), None)
    if built in _BROKEN and release >= planned:
        return f"vLLM {VLLM_VERSION} has a class {built} that loads no file: {_BROKEN[built]}"
    if not names or built is not None:
        return None
    name = names[0]
    last = table["last_release"].get(name)
    if release < planned and (last is None or release <= parse_version(last)):
        return None
    if name in table["through_transformers"]:
        return _backend_problem(name, config, last)
    if last is not None:
        return f"{name} was in vLLM until {last}, and is not in {VLLM_VERSION}"
    if name in table["plugins"]:
        return f"{name} is no part of vLLM {VLLM_VERSION}: a plugin has it ({table['plugins'][name]})"
    if name in table["not_through_transformers"]:
        return (
            f"vLLM {VLLM_VERSION} has no class for {name}, and cannot run transformers' (its attention is "
            "its own)"
        )
    if config.get("auto_map") or not name.endswith(_WRITING):
        return None
    return (
        f"neither vLLM {VLLM_VERSION} nor transformers {table['transformers']}, whose models it can run, has "
        f"a class {name}"
    )


def has_class(config: Mapping[str, Any]) -> bool:
    """Whether vLLM has a class for a model, its own or transformers': it runs that one, and no code that the
    checkpoint brings along.

    >>> has_class({"architectures": ["DeepseekV3ForCausalLM"], "auto_map": {"AutoModel": "x.X"}})
    True
    """
    table = _table()
    return any(n in table["built"] or n in table["through_transformers"] for n in _classes(config))


def own_code(config: Mapping[str, Any]) -> str | None:
    """What to say of a model of which vLLM has no class, and whose checkpoint brings code along for it; None
    of others. vLLM runs such code with ``--trust-remote-code`` alone, where transformers' interfaces let it.

    >>> str(own_code({"architectures": ["XForCausalLM"], "auto_map": {"AutoModel": "x.X"}})).split(":")[0]
    'vLLM has no class XForCausalLM'
    >>> own_code({"architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModel": "x.X"}})
    """
    names = _classes(config)
    if not names or not config.get("auto_map") or has_class(config):
        return None
    return (
        f"vLLM has no class {names[0]}: it starts with --trust-remote-code alone, which runs the file's "
        "own Python code (auto_map), and whether that code fits vLLM is not judged here"
    )


def code_of(config: Mapping[str, Any]) -> str:
    """The files of code that a config names for its classes, in words.

    >>> code_of({"auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.X"}})
    'configuration_x.py, modeling_x.py'
    """
    named = config.get("auto_map")
    values = list(named.values()) if isinstance(named, Mapping) else []
    flat = [x for v in values for x in (v if isinstance(v, list) else [v]) if isinstance(x, str) and "." in x]
    return ", ".join(sorted({f"{x.rsplit('.', 1)[0]}.py" for x in flat})) or "auto_map"


def text_alone(config: Mapping[str, Any]) -> bool:
    """Whether vLLM serves a multimodal model, but stops where it may be given images: it runs transformers'
    class of it, whose processor does not say how many tokens an image becomes.

    >>> text_alone({"architectures": ["MllamaForConditionalGeneration"], "vision_config": {}})
    True
    """
    name = next(iter(_classes(config)), "")
    return "vision_config" in config and name in _table()["text_alone"] and not architecture_problem(config)


def _classes(config: Mapping[str, Any]) -> list[str]:
    """The names under ``architectures``, of the outermost part that has some."""
    outside_in = reversed(list(parts(config)))
    said = next((a for part in outside_in if isinstance(a := part.get("architectures"), list) and a), [])
    return [name for name in said if isinstance(name, str)]


#: Classes of transformers' whose configs state how many experts a token visits under a key that vLLM does not
#: ask for when it runs transformers' mixtures (`models/transformers/moe.py::MoEMixin.recursive_replace` asks
#: for ``num_experts_per_tok`` and ``top_k``) → that key.
_UNCOUNTED = {"AriaTextForCausalLM": "moe_topk"}


def _backend_problem(name: str, config: Mapping[str, Any], last: str | None) -> str | None:
    """Why vLLM cannot run transformers' class of a model that it has no class for."""
    ended = f" (the last with one was {last})" if last else ""
    if any(part.get("is_encoder_decoder") for part in parts(config)):
        reason = "it has an encoder and a decoder"
    elif kind := _without_attention(config):
        reason = f"it has blocks without attention ({kind})"
    elif key := _UNCOUNTED.get(name):
        reason = f"it looks for num_experts_per_tok, which this family's config calls {key}"
    else:
        return None
    return f"vLLM {VLLM_VERSION} has no class for {name}{ended}, and cannot run transformers': {reason}"
