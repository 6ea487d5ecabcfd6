"""Header-only stand-ins of published checkpoints: config.json, a tokenizer, and safetensors files whose
headers name every tensor with its dtype and shape, with a hole where the values would be.

Names are those that transformers' own class saves; of a model type that it does not know, those of the
planner's shapes under the family's spelling. Nothing is read from anywhere but the configs of the catalogue.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.writer import TensorSpec
from quant.formats import FormatRegistry
from quant.formats.base import FOREIGN
from quant.models.linears import decoder_refs
from quant.models.shapes import spec_from_config, weights_from_tensors
from quant.offline import transformers
from quant.pipeline.plan import kv_scales
from quant.planning.storage import source_schemes
from quant.vllm.config import KEYS, config_dtype, quantization_config, source_method, without_quantization
from quant.vllm.layers import Linear
from tests.helpers import add_tokenizer

#: Bytes of a shard.
_SHARD = 50 * 10**9
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
#: Model types that transformers does not know → one of the same parameters that it does.
_SAME = {"kimi_k2": "deepseek_v3"}
#: How families that transformers does not know spell the planner's names.
_SPELLINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "internlm2": (
        (r"self_attn\.q_proj", "attention.wqkv"),
        (r"self_attn\.o_proj", "attention.wo"),
        (r"mlp\.gate_proj", "feed_forward.w1"),
        (r"mlp\.up_proj", "feed_forward.w3"),
        (r"mlp\.down_proj", "feed_forward.w2"),
        (r"^embed_tokens", "model.tok_embeddings"),
        (r"^lm_head", "output"),
    ),
}
_USUAL = (
    (r"^(embed_tokens|norm)\b", r"model.\1"),
    (r"mlp\.router\.weight", "mlp.gate.weight"),
    (r"norm0\.weight", "input_layernorm.weight"),
    (r"norm1\.weight", "post_attention_layernorm.weight"),
)


def published_config(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A catalogue's config with what the published one has besides: the class, and the parts' model types;
    without drafting layers."""
    config = json.loads(json.dumps(entry))
    known = transformers()
    if config.get("architectures") == ["KimiVLForConditionalGeneration"]:
        config["model_type"], config["text_config"]["model_type"] = "kimi_vl", "deepseek_v3"
    for part in (config, config.get("text_config") or {}):
        if "num_nextn_predict_layers" in part:
            part["num_nextn_predict_layers"] = 0  # transformers has no class for drafting layers
    kind = config.get("model_type")
    if not hasattr(known, str((config.get("architectures") or [""])[0])) and kind in known.CONFIG_MAPPING:
        own = known.CONFIG_MAPPING[kind]
        for auto in (known.AutoModelForCausalLM, known.AutoModelForImageTextToText):
            if own in auto._model_mapping:
                config["architectures"] = [auto._model_mapping[own].__name__]
    if kind == "falcon":
        config.pop("head_dim", None)  # which it has always computed
    if kind == "qwen2_5_omni":
        config["architectures"] = ["Qwen2_5OmniForConditionalGeneration"]
        config["talker_config"] = {
            "model_type": "qwen2_5_omni_talker", "hidden_size": 896, "num_hidden_layers": 24,
            "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 8448, "embedding_size": 3584,
        }  # fmt: skip
    text = config.get("text_config") or {}
    if text:  # transformers' default for wrappers is not always what their files hold
        config.setdefault("tie_word_embeddings", spec_from_config(config).tied)
    config.setdefault("architectures", ["InternLM2ForCausalLM"])
    return config


def with_fewer_experts(config: Mapping[str, Any], experts: int) -> dict[str, Any]:
    """A config with at most so many routed experts a layer, of which a token sees fewer still."""
    changed: dict[str, Any] = json.loads(json.dumps(config))
    for part in (changed, changed.get("text_config") or {}):
        for key in (*KEYS["experts"], *KEYS["active"]):
            if isinstance(part.get(key), int):
                part[key] = min(part[key], experts if key in KEYS["experts"] else experts // 2)
    return changed


def write_stand_in(config: Mapping[str, Any], folder: Path) -> Path:
    """A stand-in of the checkpoint that a config.json belongs to, quantized as it says."""
    return write_files(config, _stored(config, plain_tensors(config)), folder)


def write_files(config: Mapping[str, Any], tensors: Iterable[TensorSpec], folder: Path) -> Path:
    """A checkpoint of config.json, a tokenizer, and shards of headers with holes for the values."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    add_tokenizer(folder)
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in tensors:
        if size + spec.nbytes > _SHARD and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, end = {}, 0
        for spec in shard:
            header[spec.name] = {
                "dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes],
            }  # fmt: skip
            end += spec.nbytes
            weight_map[spec.name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def plain_tensors(config: Mapping[str, Any]) -> list[TensorSpec]:
    """Every tensor of the model with nothing quantized, in the config's dtype."""
    dtype = _STORED[config_dtype(config) or "bfloat16"]
    plain = without_quantization(config)
    model = _built(plain)
    if model is None:
        return [TensorSpec(n, dtype, s) for n, s in _planned(plain)]
    from transformers.core_model_loading import revert_weight_conversion

    state = dict(model.state_dict())
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if source in state:
            state.pop(name, None)
    saved = revert_weight_conversion(model, state)
    buffers = {n for n, _ in model.named_buffers()}
    return [TensorSpec(n, dtype, tuple(t.shape)) for n, t in saved.items() if n not in buffers or t.ndim]


def _built(config: Mapping[str, Any]) -> Any:
    """transformers' model on the meta device; None of a model type that it does not know."""
    known = transformers()
    changed = json.loads(json.dumps(config))
    for part in (changed, changed.get("text_config") or {}):
        part["model_type"] = _SAME.get(str(part.get("model_type")), part.get("model_type"))
    if changed["model_type"] not in known.CONFIG_MAPPING:
        return None
    own = known.AutoConfig.for_model(**changed)
    kind = getattr(known, config["architectures"][0], None)
    if kind is None:
        kind = known.AutoModelForCausalLM._model_mapping[type(own)]
    with torch.device("meta"), torch.no_grad():
        return kind(own)


def _planned(config: Mapping[str, Any]) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Names and shapes by the planner's count, as the family's files spell them."""
    spec = spec_from_config(config)
    own = _SPELLINGS.get(spec.model_type, ())
    lead = "language_model." if "text_config" in config else ""
    for weight in spec.weights:
        if weight.role == "mtp":
            continue
        if weight.role == "tower":  # by name alone, where no row and no class says how its files spell it
            part = weight.name.rpartition(".")[2]
            yield from ((f"vision_tower.{i}.{part}.weight", weight.shape) for i in range(weight.count))
            continue
        shape = weight.shape
        if spec.model_type == "internlm2" and weight.name.startswith("self_attn."):
            if weight.name in ("self_attn.k_proj", "self_attn.v_proj"):
                continue
            if weight.name == "self_attn.q_proj":
                shape = (shape[0] + 2 * spec.kv_heads * spec.head_dim, shape[1])
        name = weight.tensor
        for pattern, spelling in (*own, *_USUAL):
            name = re.sub(pattern, spelling, name)
        if weight.role == "experts":
            head, _, last = name.partition(".experts.")
            yield from ((f"{lead}{head}.experts.{i}.{last}", shape) for i in range(weight.count))
        else:
            yield lead + name, shape


def _stored(config: Mapping[str, Any], tensors: list[TensorSpec]) -> Iterator[TensorSpec]:
    """The tensors as a quantized checkpoint has them: each linear in the scheme that its config says."""
    quantization = quantization_config(config)
    if quantization is None:
        yield from tensors
        return
    method = source_method(quantization)
    form = next(f for f in (*FormatRegistry, *FOREIGN.values()) if method in (f.quant_method, *f.also))
    spec = spec_from_config(config)
    scheme_of = source_schemes(spec)
    infos = {t.name: TensorInfo(t.name, t.dtype, t.shape, Path("-"), 0, t.nbytes) for t in tensors}
    weights = {w.name: w for w in weights_from_tensors(infos.values(), config, spec.layers)}
    linears: dict[str, list[Linear]] = {}
    for ref in decoder_refs(infos, config).values():
        if (weight := weights.get(ref.tensor)) and (scheme := scheme_of(weight)):
            numbers = scheme.weights
            if method == "awq":
                numbers = replace(numbers, symmetric=False)
            linear = Linear(ref.name, ref.n, ref.k, numbers, scheme.activations)
            linears.setdefault(ref.tensor, []).append(linear)
    for tensor in tensors:
        if tensor.name not in linears:
            yield tensor
        elif method == "mxfp4":
            count, k, n = tensor.shape
            yield TensorSpec(f"{tensor.name}_blocks", "U8", (count, n, k // 32, 16))
            yield TensorSpec(f"{tensor.name}_scales", "U8", (count, n, k // 32))
        else:
            for linear in linears[tensor.name]:
                yield from form.specs(linear, tensor.dtype)
    if quantization.get("kv_cache_scheme"):
        for scales in kv_scales([n.removesuffix(".weight") for n in infos]).values():
            yield from scales
