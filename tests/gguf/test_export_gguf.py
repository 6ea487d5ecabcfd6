"""What a GGUF file holds is what the checkpoint says, bit for bit where nothing is to be rounded; and what
stands against one is said before anything is written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from quant import jobs
from quant.checkpoint.reader import open_checkpoint
from quant.errors import DiskFull, QuantError
from quant.formats.reading import dequantized
from quant.gguf.levels import LEVELS
from quant.pipeline.gguf import export_gguf
from tests.helpers import change_config, copy_model, load_all, make_checkpoint, save_all


def values(file: Path) -> dict[str, np.ndarray]:
    """Every tensor, dequantized by the ``gguf`` package, outermost dimension first."""
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(*map(int, t.shape[::-1]))
        for t in gguf.GGUFReader(file).tensors
    }


def turned(weight: torch.Tensor, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's rotary embeddings want them, one after the other."""
    half = len(weight) // heads // 2
    rows = [h * 2 * half + i + second * half for h in range(heads) for i in range(half) for second in (0, 1)]
    return weight[rows].numpy()


@pytest.mark.parametrize(
    ("options", "level"),
    [
        ({"group_size": 32}, "q4_0"),
        ({"bits": 8, "group_size": 32}, "q8_0"),
        ({"symmetric": False, "group_size": 32}, "q4_1"),
        ({"format": "gptq", "group_size": 32}, "q4_0"),
        ({"format": "awq", "symmetric": False, "group_size": 32}, "q4_1"),
    ],
)
def test_codes_in_groups_of_32_are_stored_as_they_are(
    quantized: Callable[..., Path], tmp_path: Path, options: dict[str, Any], level: str
) -> None:
    folder = quantized(method="minmax", **options)
    made = export_gguf(folder, tmp_path / "out.gguf")
    assert (made.level, made.exact) == (level, 14)
    plain, file = dequantized(open_checkpoint(folder)), values(tmp_path / "out.gguf")
    for name, target in (("mlp.down_proj", "ffn_down"), ("self_attn.o_proj", "attn_output")):
        for block in (0, 1):
            wanted = plain.read(f"model.layers.{block}.{name}.weight").numpy()
            # of a minimum fp16 keeps 11 bits
            slack = 0.0 if level != "q4_1" else 2**-10 * np.abs(wanted).max()
            assert np.abs(file[f"blk.{block}.{target}.weight"] - wanted).max() <= slack, (name, block)
    query = turned(plain.read("model.layers.1.self_attn.q_proj.weight"), 4)
    assert np.abs(file["blk.1.attn_q.weight"] - query).max() <= slack


def test_every_level_is_as_large_as_its_blocks_and_as_near_as_its_bits(llama: Path, tmp_path: Path) -> None:
    weight = load_all(llama)["model.layers.0.mlp.up_proj.weight"].float().numpy()
    errors = {}
    for level in LEVELS:
        made = export_gguf(llama, tmp_path / f"{level}.gguf", level)
        file = values(tmp_path / f"{level}.gguf")
        errors[level] = float(np.square(file["blk.0.ffn_up.weight"] - weight).mean())
        assert made.file_bytes == (tmp_path / f"{level}.gguf").stat().st_size
    assert errors["bf16"] == 0.0 and errors["f16"] < 1e-10
    assert errors["q8_0"] < errors["q5_1"] < errors["q5_0"] < errors["q4_1"] < errors["q4_0"]


def test_a_wrapper_s_text_part_is_written_alone(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """Names with the wrapper's prefix, norms with Gemma's offset; the tower stays out, and is named."""
    source = checkpoints("gemma3_text", tie=True)
    folder = copy_model(source, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    wrapper = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": config,
    }
    (folder / "config.json").write_text(json.dumps(wrapper))
    tensors = {f"language_model.{n}": t for n, t in load_all(source).items()}
    tower = torch.zeros(8, 8)
    save_all(folder, {**tensors, "vision_tower.encoder.layers.0.mlp.fc1.weight": tower})
    made = export_gguf(folder, tmp_path / "out.gguf")
    assert list(made.dropped) == ["vision_tower.encoder.layers.0.mlp.fc1.weight"]
    file, plain = values(tmp_path / "out.gguf"), load_all(source)
    assert (
        file["blk.2.attn_q_norm.weight"]
        == plain["model.layers.2.self_attn.q_norm.weight"].float().numpy() + 1
    ).all()
    assert "output.weight" not in file and len(file) == len(plain)


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("olmo2", {}, "model type 'olmo2'"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor of rotary scaling linear is None"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0}},
            "attention_factor of YaRN is 2.0: llama.cpp multiplies by 1.13863",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": "x"}},
            "attention_factor of rotary scaling yarn is 'x', no number",
        ),
        ("llama", {"rope_parameters": [2]}, "rotary scaling is \\[2\\], no object"),
        ("llama", {"rms_norm_eps": "x"}, "rms_norm_eps is 'x', no number"),
        ("llama", {"max_position_embeddings": 1.5}, "max_position_embeddings is 1.5, no positive whole"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is None: .* caps always"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("gemma2", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar is 7"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "layer_types": None}, "_window is 9"),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_compute_is_refused_by_name(
    checkpoints: Callable[..., Path], tmp_path: Path, kind: str, config: dict[str, Any], said: str
) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    folder = copy_model(checkpoints(kind, **(experts if "moe" in kind else {})), tmp_path / "model")
    change_config(folder, **config)
    with pytest.raises(QuantError, match=said):
        export_gguf(folder, tmp_path / "out.gguf")
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_bad_input_leaves_everything_as_it_was(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there.gguf"
    there.write_text("mine")
    with pytest.raises(QuantError, match="exists already"):
        export_gguf(llama, there)
    assert there.read_text() == "mine"
    with pytest.raises(QuantError, match="lies in the source directory"):
        export_gguf(llama, llama / "inside.gguf")
    bare = copy_model(llama, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(QuantError, match="tokenizer.json: it is missing"):
        export_gguf(bare, tmp_path / "no.gguf")
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0)], unk_id=0, byte_fallback=False))
    unigram.save(str(bare / "tokenizer.json"))
    with pytest.raises(QuantError, match="its model is 'Unigram': BPE alone.*serve the checkpoint with vLLM"):
        export_gguf(bare, tmp_path / "no.gguf")
    damaged = copy_model(llama, tmp_path / "damaged")
    tensors = load_all(damaged)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_all(damaged, tensors)
    with pytest.raises(QuantError, match="model.layers.1.mlp.up_proj.weight: holds NaN"):
        export_gguf(damaged, tmp_path / "no.gguf", "q4_0")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_all(damaged, tensors)
    with pytest.raises(QuantError, match="beyond fp16.*bf16"):
        export_gguf(damaged, tmp_path / "no.gguf", "f16")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFull, match="the disk is full"):
        export_gguf(llama, tmp_path / "no.gguf")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["bare", "damaged", "there.gguf"]


def test_rows_that_are_no_whole_blocks_stay_in_16_bits_and_are_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", intermediate_size=80)
    made = export_gguf(folder, tmp_path / "out.gguf", "q4_0")
    assert made.tensors["F16"] == 2 and made.tensors["Q4_0"] == 13
    assert [n for n in made.notes if "blk.1.ffn_down.weight is F16: its rows of 80" in n]


def test_a_level_is_a_scheme_of_a_job(llama: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    """The method's codes are in the file, and nothing else is left beside it."""
    few = ("--samples", 4, "--sequence-length", 64, "-q", "--json")
    file, rounded = tmp_path / "a.gguf", tmp_path / "b.gguf"
    made = cli("quantize", "-m", llama, "-o", file, "--scheme", "Q4_0", "--method", "gptq", *few)
    assert made.code == 0 and json.loads(made.out)["exact_linears"] == 14, made.err
    assert cli("quantize", "-m", llama, "-o", rounded, "--scheme", "q4_0", "-q").code == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]
    name = "blk.0.ffn_up.weight"
    assert not np.array_equal(values(file)[name], values(rounded)[name])
    (stored,) = (t.data for t in gguf.GGUFReader(file).tensors if t.name == name)
    scales = stored.reshape(-1, 18)[:, :2].copy().view(np.float16)
    assert 0.2 < (scales < 0).mean() < 0.8, "negative scales were not tried"
    assert gguf.GGUFReader(file).fields["general.name"].contents() == llama.resolve().name
    for words, said in (
        (("-o", tmp_path / "c", "--scheme", "q8_0"), "ends in .gguf"),
        (("-o", tmp_path / "c.gguf", "--scheme", "q4_k_m", "--method", "gptq"), "leave --method out"),
        (("-o", tmp_path / "c.gguf", "--scheme", "q5_0", "--bits", 4), "--bits has no meaning"),
        (("-o", tmp_path / "c.gguf", "--scheme", "q5_0", "--dry-run"), "--dry-run is for checkpoints"),
    ):
        refused = cli("quantize", "-m", llama, *words)
        assert refused.code == 2 and said in refused.err, refused.err


def test_a_model_that_gguf_has_no_place_for_is_refused_before_its_codes_are_chosen(
    checkpoints: Callable[..., Path], tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "run", lambda *_: pytest.fail("the job was run"))
    words = ("-o", tmp_path / "a.gguf", "--scheme", "q4_0", "--method", "gptq")
    refused = cli("quantize", "-m", checkpoints("stablelm"), *words)
    assert refused.code == 2 and "model type 'stablelm' cannot be written as GGUF here" in refused.err
    assert not [*tmp_path.iterdir()]
