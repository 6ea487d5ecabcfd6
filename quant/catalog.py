"""What a model's name, config.json or directory says of it, before anything is downloaded or loaded.

A Hub id gives its own config.json's facts, from the local cache or, where that is asked for, from the Hub.
``configs/models.json`` holds the config facts of other public models, each with its source, with a note on
how it was read, and with a caveat where a part of the model is missing. A name that is not there is tried
without the marks that quantizers add (``-AWQ``, ``-GPTQ-Int4``, ``.w4a16``), then without the marks of a
fine-tune; what was assumed is in :attr:`ModelSpec.notes` and :attr:`ModelSpec.uncertainty`. No name is
answered with a model of another size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant.checkpoint.folders import described
from quant.checkpoint.reader import open_checkpoint, read_json
from quant.data import load_json
from quant.errors import UsageError, any_of
from quant.hub import cached_snapshot, config_of, is_hub_id, is_whole, model_name, repository_of
from quant.models.roles import leftovers_note
from quant.models.shapes import spec_from_config, weights_from_tensors
from quant.models.spec import DTYPE_BYTES, ModelSpec
from quant.vllm.layers import FUSIONS

_GPTQ4 = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


def _compressed(bits: int, kind: str, group: int | None, activations: bool) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "group_size": group,
    }
    inputs = {"num_bits": 8, "type": kind, "strategy": "token", "dynamic": True} if activations else None
    form = {
        ("int", False): "pack-quantized",
        ("int", True): "int-quantized",
        ("float", True): "float-quantized",
        ("float", False): "float-quantized",
    }
    return {
        "quant_method": "compressed-tensors", "format": form[kind, activations], "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights,
        "input_activations": inputs}},
    }  # fmt: skip


#: endings of a name that say how the weights are stored → the quantization_config that such checkpoints
#: carry. First match wins.
NAME_MARKS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        r"[-.]AWQ([-.]INT4)?$",
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    ),
    (r"[-.]GPTQ[-.]Int8$", {**_GPTQ4, "bits": 8}),
    (r"[-.]GPTQ([-.]Int4)?$", _GPTQ4),
    (r"[-.](unsloth-)?bnb-4bit$", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    (r"[-.](quantized\.)?w4a16(-g\d+)?$", _compressed(4, "int", 128, False)),
    (r"[-.](quantized\.)?w8a16$", _compressed(8, "int", None, False)),
    (r"[-. ](quantized\.)?w8a8([-.]int8)?$", _compressed(8, "int", None, True)),
    (r"[-.]int8$", _compressed(8, "int", None, True)),
    (r"[-.]FP8[-.](dynamic|KV)$", _compressed(8, "float", None, True)),
    (
        r"[-.]FP8([-.]block)?$",
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    (r"[-.]NVFP4(A16)?$", {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    (r"[-.](fp16|bf16|float16|HF)$", {}),
)

#: families whose makers publish FP8 by channels, in compressed-tensors (HabanaAI/vllm-hpu-extension#350)
BY_CHANNEL = frozenset({"glm4_moe"})
#: linears of gated delta nets that give each head a number, which vLLM fuses: too narrow for blocks, kept in
#: 16 bits
GATES = next((row.name, *row.shards) for row in FUSIONS if row.name == "in_proj_ba")

#: marks of a fine-tune: the shapes are the base model's
TUNE_MARKS = re.compile(
    r"-(instruct|chat|it|hf|base|thinking|reasoning|\d{4}|v\d+(\.\d+)?|pt|preview|finetune|sft|dpo|exp|terminus)$",
    re.IGNORECASE,
)


def model_from_config(config: Mapping[str, Any] | str | Path, name: str = "") -> ModelSpec:
    """The model that a config.json describes: a mapping, or the path of the file.

    Raises:
        UsageError: a key that planning needs is missing or absurd.
        CheckpointError: the file cannot be read.
    """
    if isinstance(config, Mapping):
        return spec_from_config(config, name or "model")
    return spec_from_config(
        read_json(Path(config), "the config"), name or Path(config).parent.name, str(config)
    )


def model_from_directory(path: str | Path) -> ModelSpec:
    """The model of a checkpoint directory: shapes and dtypes of every tensor from the safetensors headers,
    nothing else is read.

    Raises:
        CheckpointError: no config.json, no safetensors files, or a damaged header.
        UsageError: config.json lacks what planning needs.
    """
    directory = Path(path)
    file, name = directory / "config.json", model_name(directory)
    some = any(directory.glob("*.safetensors*"))
    if file.is_file() and (not some or (repository_of(directory) and not is_whole(directory))):
        spec = spec_from_config(read_json(file, "the config"), name, str(file))
        cached = repository_of(directory) is not None
        lacks = "not all of its weights are in the cache" if cached else "no safetensors files"
        notes = [f"{lacks}: sizes are computed from config.json"]
        if not cached and not (what := described(directory)).startswith("has no .safetensors"):
            notes.append(f"before it can be quantized: {directory} {what}")
        return replace(spec, notes=(*spec.notes, *notes))
    checkpoint = open_checkpoint(directory)
    spec = spec_from_config(checkpoint.config, name, str(checkpoint.path / "config.json"))
    weights = tuple(weights_from_tensors(checkpoint.tensors.values(), checkpoint.config, spec.layers))
    note = leftovers_note(checkpoint.tensors.values())
    said = (*spec.notes, *([note] if note else []))
    embedded = any(w.role == "embedding" for w in weights)
    tied = spec.tied or (embedded and not any(w.role == "head" for w in weights))
    if tied:  # a head stored beside the embeddings that it repeats is not loaded
        weights = tuple(w for w in weights if w.role != "head")
    unpacked = spec.weights if spec.quantization else ()
    vision = any(w.role == "tower" for w in weights)
    return replace(
        spec,
        weights=weights,
        tied=tied,
        vision=vision,
        unpacked=unpacked,
        notes=said,
        source=str(directory),
    )


# -- by name -------------------------------------------------------------------------------------------------


def catalogue() -> dict[str, dict[str, Any]]:
    """All models of ``configs/models.json`` by hub name; each has ``config`` and ``source``."""
    entries: dict[str, dict[str, Any]] = load_json("models.json")
    return entries


def _key(name: str) -> str:
    """A model name for comparing: case, organisation and separators do not count, nor does the ``Meta-``
    before Llama."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^meta-", "", name.split("/")[-1].lower()))


def find_model(name: str, online: bool = False) -> ModelSpec:
    """A model by its name: a Hub id whose config.json is in the local cache or may be fetched, else as the
    catalogue has it, with its owner or without.

    Args:
        online: whether the config.json of a Hub id is fetched where the cache lacks it.

    >>> find_model("Qwen2.5-7B-Instruct-AWQ").quantization["quant_method"]
    'awq'

    Raises:
        UsageError: not a known name; those that are most like it are offered.
        CheckpointError: the config of a Hub id cannot be fetched, or cannot be read.
    """
    name = name.strip().rstrip("/")
    if (exact := _of_hub(name, online)) is not None:
        return exact
    entries = catalogue()
    keys: dict[str, str] = {}
    for known in entries:
        keys.setdefault(_key(known), known)
    plain, quantization, notes = name.split(" (")[0], None, []
    if plain in entries or _key(plain) in keys:
        return _entry(plain if plain in entries else keys[_key(plain)], entries, name, None, [])
    for pattern, config in NAME_MARKS:
        match = re.search(pattern, plain, re.IGNORECASE)
        if match:
            plain, quantization = plain[: match.start()], config
            how = f"as {config['quant_method']}" if config else "in 16 bits"
            notes.append(f"stored {how}, by its name")
            break
    listed = _base(plain, keys)
    if listed is None:
        raise _unknown(name, plain, list(entries))
    if _key(listed) != _key(name):
        notes.append(f"shapes and context of {listed}: its own context may be another")
        if quantization is None and (own := entries[listed]["config"].get("quantization_config")):
            notes.append(
                f"taken as stored in {own.get('quant_method')}, as {listed} is: --online, or its config.json "
                "in the cache, tells how its own files are"
            )
    return _entry(listed, entries, name, quantization, notes)


def _of_hub(name: str, online: bool) -> ModelSpec | None:
    """The model of a Hub id by its own config.json, with the sizes of its files where all of them are in the
    cache; None where the config is neither there nor may be fetched."""
    if not is_hub_id(name):
        return None
    snapshot = config_of(name) if online else cached_snapshot(name)
    if snapshot is None or not (snapshot / "config.json").is_file():
        return None
    return replace(model_from_directory(snapshot), name=name, hub=name)


def _base(plain: str, keys: Mapping[str, str]) -> str | None:
    """The entry whose shapes a name has, once the marks of a fine-tune are taken off, one by one."""
    candidate = plain
    while True:
        for tail in ("", "-hf", "-Instruct", "-chat-hf", "-Chat", "-it", "-v0.1"):
            if (listed := keys.get(_key(candidate + tail))) is not None:
                return listed
        shorter = TUNE_MARKS.sub("", candidate)
        if shorter == candidate:
            return None
        candidate = shorter


#: a size within a name, in billions of parameters: ``8b``, ``1.5B``, ``235B-A22B``
_SIZE = re.compile(
    r"(?<![a-z0-9.])(?:e|\d+x)?(\d+(?:\.\d+)?)b(?:-a\d+(?:\.\d+)?b)?(?![a-z0-9])", re.IGNORECASE
)


def _without_size(name: str) -> tuple[str, float]:
    """A name without the size and the marks of a fine-tune, for comparing, and the size; 0 where it has
    none."""
    short = name.split("/")[-1]
    size = _SIZE.search(short)
    rest = _SIZE.sub("", short)
    while (shorter := TUNE_MARKS.sub("", rest)) != rest:
        rest = shorter
    return _key(rest), float(size[1]) if size else 0.0


def _nearest(plain: str, known: Sequence[str]) -> list[str]:
    """The names that are most like one: those of its family whose size is nearest, then by spelling."""
    import difflib

    family, size = _without_size(plain)
    sizes = {entry: _without_size(entry) for entry in known}
    same = [entry for entry, (other, its) in sizes.items() if other == family and its]
    same.sort(
        key=lambda e: (
            abs(math.log(sizes[e][1] / size)) if size else sizes[e][1],
            -difflib.SequenceMatcher(None, _key(e), _key(plain)).ratio(),
        )
    )
    by_key: dict[str, str] = {}
    for entry in known:
        by_key.setdefault(_key(entry), entry)
    alike = [by_key[k] for k in difflib.get_close_matches(_key(plain), list(by_key), n=3, cutoff=0.6)]
    return list(dict.fromkeys([*same, *alike] if family else alike))[:3]


def _unknown(name: str, plain: str, known: Sequence[str]) -> UsageError:
    """The error for a name that is not known, with those that are most like it."""
    near = _nearest(plain, known)
    meant = f" Did you mean {any_of(near)}?" if near else ""
    hub = (
        "--online reads its config.json from the Hub" if is_hub_id(name) else "give its Hub id with --online"
    )
    return UsageError(
        f"--model is {name!r}: not in the catalogue (quant list models).{meant} Otherwise {hub}, or "
        "--model-path takes the checkpoint's directory"
    )


def _entry(
    listed: str,
    entries: Mapping[str, dict[str, Any]],
    name: str,
    quantization: dict[str, Any] | None,
    notes: list[str],
) -> ModelSpec:
    """
    Args:
        quantization: that the name tells; empty: none; None: it tells nothing of it.
    """
    entry = entries[listed]
    source = f"{entry['source']} ({entry['note']})" if "note" in entry else entry["source"]
    spec = spec_from_config(entry["config"], name, f"the catalogue's entry {listed}", source)
    if "caveat" in entry:
        notes = [*notes, f"the catalogue's entry holds the {entry['caveat']}"]
    spec = replace(
        spec, notes=(*spec.notes, *notes), hub=_hub_of(name, listed),
        uncertainty=spec.uncertainty + entry.get("uncertainty", 0.0),
    )  # fmt: skip
    own = spec.quantization or {}
    if quantization is None or own.get("quant_method") == quantization.get("quant_method"):
        return spec  # the entry knows its own scheme better than the name tells it
    return stored_as(spec, quantization) if quantization else replace(spec, quantization=None)


def _hub_of(name: str, listed: str) -> str:
    """A model's name on the Hub: its own where it has an owner, the entry's where that is the model."""
    if _key(listed) != _key(name):
        return name if is_hub_id(name) else ""
    owner = name.rpartition("/")[0]
    return listed if not owner or owner.lower() == listed.rpartition("/")[0].lower() else name


def stored_as(spec: ModelSpec, quantization: Mapping[str, Any]) -> ModelSpec:
    """A model whose name alone tells how it is stored.

    NVFP4 is published in several ways: of models with recurrent layers attention is in FP8, of others all
    linears or only the MLP are in NVFP4. Their sizes are uncertain by a tenth, of the others by a hundredth.
    FP8 in blocks leaves the small gates of gated delta nets in 16 bits, as Qwen publishes it; of a model
    whose linears blocks do not cut evenly FP8 is by channels.
    """
    config = dict(quantization)
    if block := config.get("weight_block_size"):
        gates = [
            f"model.layers.{w.layer}.{w.name}" for w in spec.weights if w.linear and w.name.endswith(GATES)
        ]
        linears = [w for w in spec.weights if w.linear and not w.name.endswith(GATES) and len(w.shape) == 2]
        uneven = any(size % side for w in linears for size, side in zip(w.shape, block, strict=True))
        if uneven or spec.model_type in BY_CHANNEL:
            config = _compressed(8, "float", None, True)
        elif gates:
            config["modules_to_not_convert"] = gates
    nvfp4 = config.get("quant_algo") == "NVFP4"
    if nvfp4 and any(c.kind == "state" for c in spec.cache):
        config["quant_algo"] = "MIXED_PRECISION"
    return replace(spec, quantization=config, uncertainty=spec.uncertainty + (0.1 if nvfp4 else 0.01))


def load_model(model: str | Path | ModelSpec | Mapping[str, Any], online: bool = False) -> ModelSpec:
    """A model given in any way: a spec, a config mapping, a directory, a config.json, or a name.

    Args:
        online: as :func:`find_model`.

    Raises:
        UsageError, CheckpointError: as the function for that way does.
    """
    if isinstance(model, ModelSpec):
        return model
    if isinstance(model, Mapping):
        return model_from_config(model)
    path = Path(model)
    if path.is_dir():
        return model_from_directory(path)
    if path.suffix == ".json" and path.is_file():
        return model_from_config(path)
    if isinstance(model, Path):
        return model_from_directory(path)
    return find_model(model, online)


def stored_bytes(spec: ModelSpec) -> int:
    """Bytes of the checkpoint's tensors: those of the files where they were read, else shapes times the
    config's dtype."""
    width = DTYPE_BYTES[spec.dtype]
    return int(sum(w.stored_bytes or w.parameters * width for w in spec.weights))
