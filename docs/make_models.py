#!/usr/bin/env python3
"""Measures which methods take which families of models, and writes the table of docs/models.md.

    docs/make_models.py                        writes docs/models.md from docs/models.json
    docs/make_models.py --check                fails where the page is not what docs/models.json says
    docs/make_models.py --measure [NAME ...]   measures all families, or those named, into docs/models.json;
                                               with --methods awq that method alone, again

A family is measured on a checkpoint of random weights that transformers' own configuration makes, cut down to
two or more blocks of width 128: every method quantizes it in a process of its own, and the values of an 8-bit
output are loaded by transformers, whose logits are compared with the source's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PAGE, DATA = ROOT / "docs/models.md", ROOT / "docs/models.json"
#: What each column asks for.
METHODS: dict[str, dict[str, Any]] = {
    "minmax": {"method": "minmax", "scheme": "w4a16", "group_size": 32},
    "fp8": {"method": "fp8"},
    "gptq": {"method": "gptq", "scheme": "w4a16", "group_size": 32},
    "awq": {"method": "awq", "scheme": "w4a16", "group_size": 32},
}
CALIBRATION = {"samples": 8, "sequence_length": 64}
#: Characters of the bundled text that they are taken from.
TEXT = 20_000
#: Seconds that one family may take.
LIMIT = 900
#: Largest relative difference of the logits of an 8-bit model. A router's choice may turn on the last bit.
NOISE, ROUTED_NOISE = 0.1, 0.35

#: Sizes of tiny models, by the names that configurations have for them.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), 128),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "intermediate_size_mlp"), 256),
    **dict.fromkeys(("shared_intermediate_size", "block_ff_dim", "dense_intermediate_size"), 256),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 1024),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 64),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads", "index_n_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_head_dim"), 32),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 4096),
    **dict.fromkeys(("word_embed_proj_dim",), 128),
    **dict.fromkeys(("sliding_window", "index_topk", "attention_chunk_size"), 64),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank"), 32),
    "rotary_dim": 16, "partial_rotary_factor": 0.5, "mamba_d_head": 32, "mamba_head_dim": 32,
    "mamba_d_ssm": 128, "mamba_dt_rank": 8, "time_step_rank": 8,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "query_pre_attn_scalar": 32, "global_head_dim": 64, "altup_num_inputs": 2, "num_kv_shared_layers": 0,
}  # fmt: skip
#: Of towers beside the text decoder.
TOWER: dict[str, Any] = {
    "hidden_size": 64, "embed_dim": 64, "intermediate_size": 128, "num_hidden_layers": 2, "depth": 2,
    "num_layers": 2, "num_attention_heads": 2, "num_heads": 2, "attention_heads": 2, "patch_size": 14,
    "image_size": 56, "out_hidden_size": 128, "num_position_embeddings": 16, "projection_dim": 64,
    "num_global_layers": 1, "vision_output_dim": 128, "projector_input_dim": 128,
    "projector_output_dim": 128,
}  # fmt: skip
_PAIRS = ["linear_attention", "full_attention"] * 2
_SLIDING = ["sliding_attention", "full_attention"] * 2
_LATENT = {"num_hidden_layers": 3, "num_key_value_heads": 4, "head_dim": ...}
_ROTARY = {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}}
_GREEDY = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
_LLAMA4 = {"num_hidden_layers": 4, "num_experts_per_tok": 1, "intermediate_size": 64}
#: Families: name → model type, and what its configuration needs beyond the sizes (``...``: leave it out).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        kind: (kind, {})
        for kind in (
            "apertus", "arcee", "bloom", "cohere", "cohere2", "ernie4_5",
            "ernie4_5_moe", "exaone4", "flex_olmo", "gemma", "gemma2", "glm", "glm4", "glm4_moe",
            "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "gpt_oss", "granite", "granitemoe",
            "granitemoeshared", "helium", "internlm3",
            "jais2", "llama", "mamba", "mimo_v2_flash", "minimax_m2",
            "ministral3", "mistral", "mixtral", "mpt", "nanochat", "olmo", "olmo2", "olmo3", "olmoe",
            "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
            "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma",
        )
    },
    "bamba": ("bamba", {"mamba_n_heads": 8, "attn_layer_indices": [1]}),
    "dbrx": (
        "dbrx",
        {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}}
        | {"ffn_config": {"ffn_hidden_size": 64, "hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2}},
    ),
    "dots1": (
        "dots1",
        {"head_dim": 32, "num_hidden_layers": 3, "n_routed_experts": 8, "num_experts_per_tok": 2}
        | {"n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 32}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"head_dim": 32}),
    "mamba2": ("mamba2", {"num_heads": 8}),
    "ministral": ("ministral", {"head_dim": 32}),
    "nemotron": ("nemotron", {"head_dim": 32, "num_key_value_heads": 2}),
    "llama (tied head)": ("llama", {"tie_word_embeddings": True}),
    "llama (biases)": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "falcon": ("falcon", {"multi_query": True, "new_decoder_architecture": False}),
    "falcon_h1": ("falcon_h1", {}),
    "jamba": ("jamba", {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "recurrent_gemma": ("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 128}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": ("lfm2_moe", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "nemotron_h": (
        "nemotron_h",
        {"num_hidden_layers": 4, "layers_block_type": ["mamba", "mlp", "attention", "mlp"], "expand": 1},
    ),
    "granitemoehybrid": ("granitemoehybrid", {"layer_types": ["mamba", "attention"], "mamba_expand": 1}),
    "minimax": ("minimax", {"layer_types": _PAIRS[:2]}),
    "qwen3_next": ("qwen3_next", {"num_hidden_layers": 4}),
    "qwen3_5_text": ("qwen3_5_text", {"num_hidden_layers": 4}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {"num_hidden_layers": 4}),
    "kimi_linear": (
        "kimi_linear",
        _LATENT
        | {"num_hidden_layers": 4, "num_expert_group": 1, "num_experts_per_token": 2, "linear_num_heads": 4}
        | {"linear_head_dim": 32, "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    ),
    "deepseek_v2": ("deepseek_v2", _LATENT | _GREEDY),
    "deepseek_v2 (lite)": ("deepseek_v2", _LATENT | _GREEDY | {"q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "glm4_moe_lite": ("glm4_moe_lite", _LATENT),
    "glm_moe_dsa": ("glm_moe_dsa", _LATENT),
    "longcat_flash": (
        "longcat_flash",
        _LATENT | {"num_layers": 2, "zero_expert_num": 2, "head_dim": 32, "qk_head_dim": ...},
    ),
    "llama4_text": ("llama4_text", _LLAMA4),
    "gemma3_text": ("gemma3_text", {"layer_types": _SLIDING[:2]}),
    "gemma3n_text": (
        "gemma3n_text",
        {"num_hidden_layers": 4, "layer_types": _SLIDING, "num_kv_shared_layers": 2}
        | {"intermediate_size": [256] * 4, "activation_sparsity_pattern": [0.0] * 4},
    ),
    "gemma4_text": (
        "gemma4_text",
        {"num_hidden_layers": 4, "layer_types": _SLIDING, "num_kv_shared_layers": 2},
    ),
    "gemma4_text (mixture)": (
        "gemma4_text",
        {"num_hidden_layers": 4, "layer_types": _SLIDING, "hidden_size_per_layer_input": 0}
        | {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64},
    ),
    # wrappers: the values are the text decoder's
    "aya_vision": ("aya_vision", {}),
    "gemma3": ("gemma3", {"layer_types": _SLIDING[:2]}),
    "idefics3": ("idefics3", {}),
    "internvl": ("internvl", {}),
    "llama4": ("llama4", _LLAMA4),
    "llava": ("llava", {}),
    "llava_next": ("llava_next", {}),
    "mistral3": ("mistral3", {}),
    "mllama": ("mllama", {"num_hidden_layers": 3, "cross_attention_layers": [1]}),
    "paligemma": ("paligemma", {}),
    "qwen2_vl": ("qwen2_vl", _ROTARY),
    "qwen2_5_vl": ("qwen2_5_vl", _ROTARY),
    "qwen3_vl": ("qwen3_vl", _ROTARY),
    "qwen3_vl_moe": ("qwen3_vl_moe", _ROTARY),
    "qwen3_5": ("qwen3_5", {"num_hidden_layers": 4}),
    "qwen3_5_moe": ("qwen3_5_moe", {"num_hidden_layers": 4}),
    "smolvlm": ("smolvlm", {}),
}  # fmt: skip


def shrunk(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the sizes in the places of its own, parts of it too; what follows from other
    values is left to its class."""
    layers = config.get("num_hidden_layers")
    made: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and "model_type" in value:
            text = key in ("text_config", "llm_config", "attn_config", "ffn_config")
            made[key] = shrunk(value, SIZES if text else TOWER)
        elif key in ("attn_config", "ffn_config"):
            made[key] = shrunk(value, sizes)
        elif key in ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "moe_layers"):
            continue
        elif isinstance(value, list) and len(value) == layers:
            continue
        elif key in sizes and value is not None and not isinstance(value, (list, dict)):
            made[key] = sizes[key]
        elif key in ("model_type", "rope_parameters") or not isinstance(value, (dict, list)):
            made[key] = value
    for key in ("transformers_version", "architectures", "dtype", "rope_parameters", "_name_or_path"):
        made.pop(key, None)
    return made


def tiny_config(name: str) -> Any:
    """The configuration of a family's tiny model."""
    from transformers import AutoConfig

    kind, changes = FAMILIES[name]
    values = shrunk(AutoConfig.for_model(kind).to_dict(), SIZES)
    text = values["text_config"] if isinstance(values.get("text_config"), dict) else values
    for key, value in changes.items():
        if value is ...:
            text.pop(key, None)
        else:
            text[key] = value
    values.pop("model_type", None)
    return AutoConfig.for_model(kind, **values)


def make(name: str, folder: Path) -> Any:
    """Writes a family's tiny checkpoint; returns transformers' model, fp32."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = tiny_config(name)
    kinds = [AutoModelForCausalLM, AutoModelForImageTextToText]
    wrapper = config.get_text_config() is not config
    tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
    torch.manual_seed(0)
    model = kinds[wrapper].from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.ndim >= 2 and "conv" not in key and "embed" not in key and "wte" not in key:
                value.normal_(0, value.shape[-1] ** -0.5)
            elif value.ndim >= 2 and "embed" in key:
                value.normal_(0, 0.1 if tied else 1.0)
            elif "norm" in key:
                value.add_(torch.randn_like(value) * 0.05)
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "examples/tinylm-4m" / file, folder / file)
    return model.float().eval()


def stored_bits(source: Path, output: Path) -> float:
    """Bits of an output's files for each weight of the decoder's matrices: what the files hold beyond the
    tensors that are no such matrices, times 8, over the weights."""
    from math import prod

    from quant.checkpoint.reader import open_checkpoint
    from quant.models.account import decoder_matrices

    before, after = open_checkpoint(source), open_checkpoint(output)
    matrices = decoder_matrices(before.tensors, before.config)
    rest = sum(i.nbytes for n, i in before.tensors.items() if n not in matrices)
    return 8 * (after.nbytes - rest) / sum(prod(i.shape) for i in matrices.values())


def measured(name: str, folder: Path, methods: Collection[str]) -> dict[str, Any]:
    """What methods make of a family, or why they do not; and, of all methods, the logits of the 8-bit
    model."""
    import torch

    import quant
    from quant.errors import QuantError

    source = folder / "source"
    model = make(name, source)
    routed = "expert" in json.dumps(model.config.to_dict())
    found: dict[str, Any] = {"architecture": type(model).__name__, "routed": routed, "methods": {}}
    text = folder / "text.txt"
    with gzip.open(ROOT / "quant/calibration/data/wikipedia.txt.gz", "rt", encoding="utf-8") as stream:
        text.write_text(stream.read(TEXT), encoding="utf-8")
    calibration = CALIBRATION | {"calibration_dataset": [text]}
    for method in methods:
        output, asked = folder / method, METHODS[method]
        needs = calibration if method in ("gptq", "awq") else {}
        try:
            report = quant.quantize(
                quant.make_recipe({"model_path": source, "output_path": output, **asked, **needs})
            )
        except QuantError as error:
            reason = getattr(error, "problems", None) or [str(error)]
            found["methods"][method] = {
                "reason": str(reason[0]).replace(f"{source}: ", "").replace(str(source), "")
            }
            continue
        job = report.quantization
        assert job is not None and report.verify["passed"]
        found["methods"][method] = {
            "linears": len(job.tensors.quantized),
            "bits": job.bits_per_weight,
            "stored_bits": round(stored_bits(source, output), 4),
            "left": len(job.left),
            "rounded": len(job.fallbacks),
            "scaled": len({n for f in job.folds.values() for n in f.linears}),
        }
    if set(methods) != set(METHODS):
        return found
    try:
        quant.quantize(
            quant.make_recipe(
                {"model_path": source, "output_path": folder / "plain", "method": "minmax", "bits": 8}
                | {"group_size": 32, "format": "plain", "target": "other"}
            )
        )
    except QuantError:
        return found
    tokens = torch.randint(20, 4000, (2, 48), generator=torch.Generator().manual_seed(0))
    loaded, told = type(model).from_pretrained(
        folder / "plain", dtype=torch.float32, output_loading_info=True
    )
    with torch.no_grad():
        wanted, made = (m(input_ids=tokens).logits for m in (model, loaded.eval()))
    wanted, made = (x - x.mean(-1, keepdim=True) for x in (wanted, made))
    found["logits"] = round(float((wanted - made).norm() / wanted.norm()), 4)
    found["missing"] = len(told["missing_keys"]) + len(told["unexpected_keys"]) + len(told["mismatched_keys"])
    return found


def measure(name: str, methods: Collection[str]) -> dict[str, Any]:
    """:func:`measured` in a process of its own, so that whatever happens there is a result."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)
        os.close(reading)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        try:
            with tempfile.TemporaryDirectory(prefix="quant-models-") as folder:
                result = measured(name, Path(folder), methods)
        except BaseException as error:
            traceback.print_exc()
            result = {
                "failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            }
        with os.fdopen(writing, "w") as stream:
            json.dump(result, stream)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"failed": f"did not end within {LIMIT} s, or was killed"}


def _cell(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "–"
    if "reason" in result:
        return "refused"
    notes = [
        f"{result[key]} {word}" for key, word in (("left", "left"), ("rounded", "rounded")) if result.get(key)
    ]
    if result.get("scaled"):
        notes.append(f"{result['scaled']} scaled")
    return f"{result['bits']:.2f}" + (f" ({', '.join(notes)})" if notes else "")


def page(data: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of docs/models.md."""
    complete = [n for n, f in data.items() if all("bits" in f["methods"].get(m, {}) for m in METHODS)]
    lines = [
        "# Families and methods",
        "",
        "Made by `docs/make_models.py` from `docs/models.json`, which `docs/make_models.py --measure`",
        "measures on tiny checkpoints of random weights that transformers' own configurations make.",
        "`make lint` checks that the page is current.",
        "",
        f"{len(complete)} of {len(data)} families take {', '.join(METHODS)}. A cell is the stored bits per",
        "weight of the decoder's matrices, those that stay as they are included (4-bit codes in groups of",
        "32; 8-bit floats); in parentheses the linears that were left in 16 bits because their inputs do",
        "not divide into groups, that were rounded to the nearest number because no calibration token is",
        "seen to reach them, and that were scaled. The last column is how far the logits of an 8-bit model",
        "are from the source's, as transformers loads both.",
        "",
        "| family | class | " + " | ".join(METHODS) + " | logits |",
        "|---|---|" + "---|" * (len(METHODS) + 1),
    ]
    reasons: dict[str, list[str]] = {}
    for name, found in sorted(data.items()):
        cells = [_cell(found["methods"].get(m)) for m in METHODS]
        logits = f"{found['logits']:.1%}" if "logits" in found else "–"
        lines.append(f"| {name} | `{found['architecture']}` | {' | '.join(cells)} | {logits} |")
        for method, result in found["methods"].items():
            if "reason" in result:
                reasons.setdefault(f"{name}: {result['reason']}", []).append(method)
    if reasons:
        lines += ["", "## Refused", ""]
        lines += [f"- **{', '.join(methods)}** {reason}" for reason, methods in reasons.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument(
        "--methods", type=lambda text: text.split(","), default=list(METHODS), metavar="METHOD,..."
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    data = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
    if arguments.measure:
        if unknown := [n for n in arguments.names if n not in FAMILIES]:
            parser.error(f"no such family: {', '.join(unknown)}")
        if unknown := [m for m in arguments.methods if m not in METHODS]:
            parser.error(f"no such method: {', '.join(unknown)}; there are {', '.join(METHODS)}")
        # loaded once, before the processes of the families
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText  # noqa: F401

        import quant.pipeline.manager  # noqa: F401

        torch.set_num_threads(1)
        for name in arguments.names or FAMILIES:
            result = measure(name, arguments.methods)
            print(name, json.dumps(result), file=sys.stderr, flush=True)
            if "failed" not in result:
                before = data.get(name, {})
                data[name] = {**before, **result, "methods": before.get("methods", {}) | result["methods"]}
                DATA.write_text(json.dumps(dict(sorted(data.items())), indent=1) + "\n", encoding="utf-8")
    text = page({n: f for n, f in data.items() if n in FAMILIES})
    if arguments.check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            raise SystemExit("docs/models.md is not what docs/models.json says: run docs/make_models.py")
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
