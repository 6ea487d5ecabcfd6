#!/usr/bin/env python3
"""Writes configs/block_names.json: by model type, what files of a family call the matrices in the blocks of
the text decoder.

    python docs/make_names.py [MODEL_TYPE …]

Each class of a causal or a multimodal language model is built on the meta device from its default config, cut
to a few blocks: ``names`` are those of its matrices, in memory and as transformers saves them. What other
values of the config bring is told by the source of its blocks: ``parts`` are the attributes that are given
there. ``vectors`` are the names of its vectors (biases, norms), each with the places that have it: every
``block``, every block that has the matrix beside it (``linear``), or ``some``. It is built once more for
every switch of its config that is named after biases or norms: the vectors that come or go with one are in
``switched``, under the key, with the value that brings them and the one that the key has by default. What
stands in the file already is kept for model types that are not named.
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
#: Keys of a config that may switch vectors on and off.
_SWITCH = re.compile(r"bias|norm|sink|parallel|new_decoder")
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


def small_config(kind: str, **changes: Any) -> Any:
    """A family's default config with few blocks and experts, and with ``changes`` of its text decoder.

    Raises:
        Exception: whatever its class raises of that.
    """
    whole = transformers.CONFIG_MAPPING[kind]
    text = whole().get_text_config()
    values = {"num_hidden_layers": BLOCKS, **dict.fromkeys(_EXPERTS, 8)}
    kept = {k: v for k, v in values.items() if isinstance(getattr(text, k, None), int)}
    kept |= NEEDED.get(kind, {})
    kept |= changes
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


def block_tensors(class_name: str, config: Any) -> tuple[type, list[dict[str, dict[str, tuple[int, ...]]]]]:
    """A class, and as it names tensors in memory and in files: by block of its text decoder, name in the
    block (0 for every number) → shape.

    Raises:
        Exception: whatever building or saving the class raises.
    """
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"), torch.no_grad():
        model = getattr(transformers, class_name)(config)
    state = model.state_dict()
    namings: list[dict[str, dict[str, tuple[int, ...]]]] = []
    for tensors in (state, revert_weight_conversion(model, dict(state))):
        infos = [TensorInfo(n, "BF16", tuple(t.shape), Path(), 0, 0) for n, t in tensors.items()]
        decoder = decoder_list(infos, config.to_dict())
        blocks: dict[str, dict[str, tuple[int, ...]]] = {}
        for info in infos:
            if decoder is not None and block_list(info.name) == decoder:
                index, _, local = info.name.removeprefix(decoder).partition(".")
                local = kind_of(f"layers.0.{local}").removeprefix("layers.0.")
                blocks.setdefault(index, {})[local] = info.shape
        namings.append(blocks)
    return type(model), namings


def vectors_of(namings: list[dict[str, dict[str, tuple[int, ...]]]]) -> dict[str, str]:
    """Names of the vectors of :func:`block_tensors` → which places have them."""
    found: dict[str, str] = {}
    held = [{n for block in blocks.values() for n in block} for blocks in namings]
    for blocks in namings:
        for name in {n for block in blocks.values() for n, shape in block.items() if len(shape) == 1}:
            beside = f"{name.rpartition('.')[0]}.weight"
            holders = [b for b in blocks.values() if len(b.get(beside, ())) > 1]
            if holders and name != beside:
                found[name] = "linear" if all(name in b for b in holders) else "some"
            else:
                # of a name that is not a file's own nothing follows for a file
                everywhere = all(name in b for b in blocks.values()) and all(name in names for names in held)
                found[name] = "block" if everywhere else "some"
    return found


def described(class_name: str, config: Any) -> tuple[str, dict[str, Any]]:
    """The model type of a config's text decoder, and ``names``, ``parts`` and ``vectors`` of its blocks.

    Raises:
        Exception: whatever building or saving the class raises.
    """
    model, namings = block_tensors(class_name, config)
    names = {n for blocks in namings for b in blocks.values() for n, shape in b.items() if len(shape) > 1}
    kind = config.get_text_config().model_type or config.model_type
    return kind, {"names": names, "parts": source_parts(model), "vectors": vectors_of(namings)}


def switched(kind: str, class_name: str, usual: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """By key of the config of a family: which vectors come (``true``) or go (``false``) where it is true, and
    its ``default``."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in small_config(kind).get_text_config().to_dict().items():
        if not isinstance(value, bool) or not _SWITCH.search(key):
            continue
        try:
            other = vectors_of(block_tensors(class_name, small_config(kind, **{key: not value}))[1])
        except Exception as error:
            print(f"{kind}: {key} {not value}: {type(error).__name__}: {str(error)[:80]}", flush=True)
            continue
        came, gone = ({n: a[n] for n in a.keys() - b.keys()} for a, b in ((other, usual), (usual, other)))
        if came or gone:
            by_value = {str(not value).lower(): came, str(value).lower(): gone}
            found[key] = {"default": value, **{k: dict(sorted(v.items())) for k, v in by_value.items()}}
    return found


def described_kind(kind: str, class_name: str) -> tuple[str, dict[str, Any]] | str:
    """:func:`described` of a family with what is :func:`switched`, or why it cannot be built."""
    failed = ""
    for make in (small_config, lambda kind: transformers.CONFIG_MAPPING[kind]()):
        try:
            text, made = described(class_name, make(kind))
            return text, made | {"switched": switched(kind, class_name, made["vectors"])}
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
        if text != kind and text in classes:
            continue  # the source of a wrapper has names of its towers, too
        before = stored.get(text, {})
        if made["names"] and made["parts"]:
            lists = {k: sorted({*made[k], *before.get(k, ())}) for k in ("names", "parts")}
            stored[text] = lists | {k: dict(sorted(made[k].items())) for k in ("vectors", "switched")}
        FILE.write_text(json.dumps(dict(sorted(stored.items())), indent=0) + "\n")
        print(kind, text, len(made["names"]), len(made["parts"]), flush=True)


if __name__ == "__main__":
    main()
