"""What a model's name, config.json or directory says of it, before anything is downloaded or loaded.

``configs/models.json`` holds the config facts of public models, each with its source, with a note on how it
was read, and with a caveat where a part of the model is missing. A name that is not
there is tried without the marks that quantizers add (``-AWQ``, ``-GPTQ-Int4``, ``.w4a16``), then without the
marks of a fine-tune, and at last by the size that it names; what was assumed is in :attr:`ModelSpec.notes`
and :attr:`ModelSpec.uncertainty`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant.checkpoint.reader import open_checkpoint, read_json
from quant.data import load_json
from quant.errors import UsageError
from quant.models.roles import leftovers_note
from quant.models.shapes import spec_from_config, weights_from_tensors
from quant.models.spec import DTYPE_BYTES, ModelSpec

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

#: marks of a fine-tune: the shapes are the base model's
TUNE_MARKS = re.compile(
    r"-(instruct|chat|it|hf|base|thinking|reasoning|\d{4}|v\d+(\.\d+)?|pt|preview|finetune|sft|dpo)$",
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
    if (directory / "config.json").is_file() and not any(directory.glob("*.safetensors*")):
        spec = spec_from_config(
            read_json(directory / "config.json", "the config"),
            directory.resolve().name,
            str(directory / "config.json"),
        )
        return replace(spec, notes=(*spec.notes, "no safetensors files: sizes are computed from config.json"))
    checkpoint = open_checkpoint(directory)
    spec = spec_from_config(checkpoint.config, directory.resolve().name, str(checkpoint.path / "config.json"))
    weights = tuple(weights_from_tensors(checkpoint.tensors.values(), checkpoint.config, spec.layers))
    note = leftovers_note(checkpoint.tensors.values())
    notes = (*spec.notes, *([note] if note else []))
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
        notes=notes,
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


def find_model(name: str) -> ModelSpec:
    """A model by its hub name, without the organisation if need be.

    >>> find_model("Qwen2.5-7B-Instruct-AWQ").quantization["quant_method"]
    'awq'

    Raises:
        UsageError: neither a known name nor a size in it; the nearest known names are offered.
    """
    name = name.strip().rstrip("/")
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
            plain, quantization = plain[: match.start()], config or None
            if config:
                notes.append(f"stored as {config['quant_method']}, by its name")
            break
    candidate = plain
    while True:
        listed = candidate if candidate in entries else keys.get(_key(candidate))
        if listed is None:
            listed = next(
                (
                    keys[_key(candidate + tail)]
                    for tail in ("-hf", "-Instruct", "-chat-hf", "-Chat", "-it", "-v0.1")
                    if _key(candidate + tail) in keys
                ),
                None,
            )
        if listed is not None:
            if _key(listed) != _key(name):
                notes.append(f"shapes of {listed}")
            return _entry(listed, entries, name, quantization, notes)
        shorter = TUNE_MARKS.sub("", candidate)
        if shorter == candidate:
            break
        candidate = shorter
    return _by_size(name, plain, quantization, entries, list(keys.values()))


def _entry(
    listed: str,
    entries: Mapping[str, dict[str, Any]],
    name: str,
    quantization: dict[str, Any] | None,
    notes: list[str],
) -> ModelSpec:
    entry = entries[listed]
    source = f"{entry['source']} ({entry['note']})" if "note" in entry else entry["source"]
    spec = spec_from_config(entry["config"], name, f"the catalogue's entry {listed}", source)
    if "caveat" in entry:
        notes = [*notes, f"the catalogue's entry holds the {entry['caveat']}"]
    hub = listed if _key(listed) == _key(name) else ""
    spec = replace(spec, notes=(*spec.notes, *notes), hub=hub)
    # the entry knows its own scheme
    return stored_as(spec, quantization) if quantization and not spec.quantization else spec


def stored_as(spec: ModelSpec, quantization: Mapping[str, Any]) -> ModelSpec:
    """A model whose name alone tells how it is stored.

    NVFP4 is published in several ways: of models with recurrent layers attention is in FP8, of others all
    linears or only the MLP are in NVFP4. Their sizes are uncertain by a tenth, of the others by a hundredth.
    """
    config = dict(quantization)
    nvfp4 = config.get("quant_algo") == "NVFP4"
    if nvfp4 and any(c.kind == "state" for c in spec.cache):
        config["quant_algo"] = "MIXED_PRECISION"
    return replace(spec, quantization=config, uncertainty=spec.uncertainty + (0.1 if nvfp4 else 0.01))


def _by_size(
    name: str,
    plain: str,
    quantization: dict[str, Any] | None,
    entries: Mapping[str, dict[str, Any]],
    known: list[str],
) -> ModelSpec:
    """A model whose name tells only its size: the shapes of the nearest known model, with as many layers as
    give that size."""
    sizes = re.findall(r"(?:^|[-_. ])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?=$|[-_. ])", plain, re.IGNORECASE)
    if not sizes:
        import difflib

        by_tail = {k.split("/")[-1].lower(): k for k in known}
        near = difflib.get_close_matches(plain.split("/")[-1].lower(), list(by_tail), n=4, cutoff=0.3)
        hint = f"; nearest: {', '.join(by_tail[n] for n in near)}" if near else ""
        raise UsageError(
            f"--model is {name!r}: not in the catalogue, and no size (such as 7B) in its name{hint}. "
            "Give one of them, or the checkpoint's directory with --model-path"
        )
    times, number, unit = sizes[0]
    target = float(number) * (1e9 if unit.lower() == "b" else 1e6) * (int(times) if times else 1)
    if not 1e6 <= target <= 1e14:
        raise UsageError(
            f"--model is {name!r}: a size of {number}{unit} is no model; sizes from 1M to 100000B can be "
            "planned"
        )
    active = re.search(r"[-_]A(\d+(?:\.\d+)?)B", plain)
    mixture = bool(times or active)
    family = re.match(r"[a-z]+", _key(plain))
    import math

    def distance(entry_name: str) -> float:
        """How far an entry is by the size in its own name; the family that the name begins with comes
        first."""
        sizes = re.findall(
            r"(?:^|[-_. ])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?=$|[-_. ])",
            entry_name.split("/")[-1],
            re.IGNORECASE,
        )
        if not sizes:
            return math.inf
        size = float(sizes[0][1]) * (1e9 if sizes[0][2].lower() == "b" else 1e6) * int(sizes[0][0] or 1)
        return abs(math.log(size / target)) + (
            0.0 if family and _key(entry_name).startswith(family[0]) else 0.3
        )

    spec = None
    for entry_name in sorted(known, key=distance):
        candidate = spec_from_config(entries[entry_name]["config"], name, entry_name)
        plain_cache = all(c.kind in ("full", "sliding") for c in candidate.cache)
        if (
            plain_cache
            and not candidate.vision
            and (candidate.moe is not None) == mixture
            and not candidate.quantization
        ):
            spec = candidate
            break
    assert spec is not None
    block = sum(w.parameters for w in spec.weights if w.layer == spec.layers - 1)
    outside = sum(w.parameters for w in spec.weights if w.layer < 0)
    layers = max(1, round((target - outside) / block)) if target > outside + block else 1
    weights = [w for w in spec.weights if w.layer < 0]
    last = [w for w in spec.weights if w.layer == spec.layers - 1]
    weights += [replace(w, layer=i) for i in range(layers) for w in last]
    scale = target / sum(w.parameters for w in weights)
    cache = tuple(replace(spec.cache[i % len(spec.cache)], layer=i) for i in range(layers))
    notes = (
        f"{name} is not in the catalogue: sized by the {number}{unit.upper()} in its name, with the shapes "
        f"of {entry_name} "
        f"({layers} layers); sizes may be off by 15 %, the KV cache by a factor of 4",
    )
    if not 0.8 < scale < 1.25:
        weights = [replace(w, shape=(max(1, round(w.shape[0] * scale)), *w.shape[1:])) for w in weights]
    return replace(
        spec, name=name, layers=layers, weights=tuple(weights), cache=cache, quantization=quantization,
        uncertainty=0.15, source="name",
        notes=notes,
    )  # fmt: skip


def load_model(model: str | Path | ModelSpec | Mapping[str, Any]) -> ModelSpec:
    """A model given in any way: a spec, a config mapping, a directory, a config.json, or a name.

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
    return find_model(model)


def stored_bytes(spec: ModelSpec) -> int:
    """Bytes of the checkpoint's tensors: those of the files where they were read, else shapes times the
    config's dtype."""
    width = DTYPE_BYTES[spec.dtype]
    return int(sum(w.stored_bytes or w.parameters * width for w in spec.weights))
