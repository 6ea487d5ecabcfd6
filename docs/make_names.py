#!/usr/bin/env python3
"""Writes configs/block_names.json: by model type, what files of a family call the matrices in the blocks of
the text decoder.

    python docs/make_names.py [MODEL_TYPE …]

Each class of a causal or a multimodal language model is built on the meta device from its default config, cut
to a few blocks: ``names`` are those of its matrices, in memory and as transformers saves them. What other
values of the config bring is told by the source of its blocks: ``parts`` are the attributes that are given
there. What stands in the file already is kept for model types that are not named.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

from quant.checkpoint.header import TensorInfo  # noqa: E402
from quant.models.place import decoder_list  # noqa: E402
from quant.models.roles import block_list, kind_of  # noqa: E402

FILE = ROOT / "configs" / "block_names.json"
#: Blocks that are built: as many as the longest pattern of kinds of layers.
BLOCKS = 8
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
#: Model types whose default config leaves out what their class asks for → values as published ones have them.
_LAYERS = {"layer_types": ["conv", "full_attention"] * (BLOCKS // 2)}
_ROUTED = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2}
NEEDED: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_ocr2": {"mlp_layer_types": ["dense"] + ["sparse"] * (BLOCKS - 1)},
    "dots1": _ROUTED | {"first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"head_dim": 128},
    "lfm2_moe": _LAYERS,
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
#: An attribute that a module is given; numbers of the config are among them, which no matrix is called by.
_GIVEN = re.compile(r"self\.([a-z]\w*)\s*=[^=]")


def model_classes() -> dict[str, str]:
    """Model type → its class that makes text."""
    from transformers.models.auto import modeling_auto as auto

    classes: dict[str, str] = {}
    for table in (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for kind, name in table.items():
            classes.setdefault(kind, name if isinstance(name, str) else name[0])
    return classes


def small_config(kind: str) -> Any:
    """A family's default config with few blocks and experts.

    Raises:
        Exception: whatever its class raises of that.
    """
    whole = transformers.CONFIG_MAPPING[kind]
    text = whole().get_text_config()
    values = {"num_hidden_layers": BLOCKS, **dict.fromkeys(_EXPERTS, 8)}
    kept = {k: v for k, v in values.items() if isinstance(getattr(text, k, None), int)}
    kept |= NEEDED.get(kind, {})
    if type(text) is whole:
        return whole(**kept)
    key = next(k for k, c in whole.sub_configs.items() if c is type(text) or k == "text_config")
    config = whole(**{key: type(text)(**kept).to_dict()})
    for tower in whole.sub_configs:
        for depth in ("num_hidden_layers", "depth", "num_layers"):
            part = getattr(config, tower, None)
            if tower != key and isinstance(getattr(part, depth, None), int):
                setattr(part, depth, 1)
    return config


def source_parts(model: type) -> set[str]:
    """The attributes that the source of a model's family gives to its modules."""
    folder = Path(str(sys.modules[model.__module__].__file__)).parent
    sources = [file.read_text() for file in sorted(folder.glob("modeling_*.py"))]
    return {name for source in sources for name in _GIVEN.findall(source)}


def described(class_name: str, config: Any) -> tuple[str, dict[str, set[str]]]:
    """The model type of a config's text decoder, and ``names`` and ``parts`` of its blocks.

    Raises:
        Exception: whatever building or saving the class raises.
    """
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"), torch.no_grad():
        model = getattr(transformers, class_name)(config)
    state = model.state_dict()
    names: set[str] = set()
    for tensors in (state, revert_weight_conversion(model, dict(state))):
        infos = [TensorInfo(n, "BF16", tuple(t.shape), Path(), 0, 0) for n, t in tensors.items()]
        decoder = decoder_list(infos, config.to_dict())
        if decoder is None:
            continue
        for info in infos:
            if len(info.shape) > 1 and block_list(info.name) == decoder:
                names.add(kind_of(f"layers.{info.name.removeprefix(decoder)}").removeprefix("layers.0."))
    kind = config.get_text_config().model_type or config.model_type
    return kind, {"names": names, "parts": source_parts(type(model))}


def described_kind(kind: str, class_name: str) -> tuple[str, dict[str, set[str]]] | str:
    """:func:`described` of a family, or why it cannot be built."""
    failed = ""
    for make in (small_config, lambda kind: transformers.CONFIG_MAPPING[kind]()):
        try:
            return described(class_name, make(kind))
        except Exception as error:
            failed = failed or f"{type(error).__name__}: {str(error)[:80]}"
    return failed


def main() -> None:
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    classes = model_classes()
    stored: dict[str, Mapping[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() else {}
    for kind in sys.argv[1:] or sorted(classes):
        found = described_kind(kind, classes[kind])
        if isinstance(found, str):
            print(f"{kind}: left out: {found}", flush=True)
            continue
        text, made = found
        before = stored.get(text, {})
        if made["names"] and made["parts"]:
            stored[text] = {k: sorted({*v, *before.get(k, ())}) for k, v in made.items()}
        FILE.write_text(json.dumps(dict(sorted(stored.items())), indent=0) + "\n")
        print(kind, text, len(made["names"]), len(made["parts"]), flush=True)


if __name__ == "__main__":
    main()
