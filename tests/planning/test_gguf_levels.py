"""How large a file of a level is, known before it is made, and which level is advised."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from quant.catalog import load_model
from quant.gguf.llama_cpp import PYTHON_VARIABLE
from quant.hardware import Gpu
from quant.pipeline.gguf import export_gguf
from quant.planning.gguf import best_level, cache_bytes, file_cache_bytes, level_bytes, plan_level


@pytest.mark.parametrize(
    ("level", "gigabytes"),
    [
        ("q8_0", 8.10), ("q6_k", 6.25), ("q5_k_m", 5.44), ("q4_k_m", 4.68), ("iq4_xs", 4.22),
        ("q3_k_m", 3.81), ("q2_k", 3.02),
    ],
)  # fmt: skip
def test_a_model_of_7b_is_as_large_as_its_published_files(level: str, gigabytes: float) -> None:
    """Of huggingface.co/bartowski/Qwen2.5-7B-Instruct-GGUF, made with an importance matrix; sizes are rounded
    to 10 MB."""
    found = level_bytes(load_model("Qwen2.5-7B-Instruct"), level) / 1e9
    assert abs(found - gigabytes) <= 0.005 * gigabytes + 0.005


def test_our_own_levels_are_as_large_as_said(
    checkpoints: Callable[..., Path], quantized: Callable[..., Path], tmp_path: Path
) -> None:
    """Of sources in 16 bits and quantized ones, whose codes are stored and whose other matrices stay."""
    some: list[Path] = [
        checkpoints("llama"),
        checkpoints("gemma2", tie=True),
        checkpoints("llama", intermediate_size=80),
        quantized(method="minmax"),
        quantized(method="minmax", ignore=["re:.*down_proj"]),
    ]
    for number, folder in enumerate(some):
        spec = load_model(str(folder))
        for level in ("bf16", "q5_1", "q4_0"):
            file = tmp_path / f"{number}-{level}.gguf"
            export_gguf(folder, file, level)
            stored = sum(int(t.n_bytes) for t in gguf.GGUFReader(file).tensors)
            assert level_bytes(spec, level) - spec.vocabulary * 36 == stored, (number, level)
            file.unlink()


def test_what_a_token_reads_is_of_the_experts_chosen_and_of_the_windows(
    checkpoints: Callable[..., Path],
) -> None:
    """Of a folder, whose experts are tensors of their own, as of a catalogue's shapes."""
    spec = load_model(str(checkpoints("mixtral", num_local_experts=4, num_experts_per_tok=1)))
    cpu = Gpu("CPU", 1 << 30, 1 << 30, bandwidth=1e9, platform="cpu")
    found = plan_level(spec, "f16", cpu, 100, "m").tokens_per_second
    inside = sum(2 * w.parameters / (4 if w.role == "experts" else 1) for w in spec.weights)
    inside += 2 * sum(w.parameters for w in spec.weights if w.role in ("norm", "router"))  # fp32
    inside -= 2 * sum(w.parameters for w in spec.weights if w.role == "embedding")
    cache = 2 * 2 * spec.layers * spec.kv_heads * spec.head_dim * 100
    assert cache_bytes(spec, 100) == cache
    assert found == pytest.approx(1e9 / (inside + cache / 2))
    slides = load_model(str(checkpoints("gemma2", sliding_window=64)))  # the last of every two attends to all
    each = 2 * 2 * slides.kv_heads * slides.head_dim
    assert slides.layers == 3 and cache_bytes(slides, 4096) == each * (4096 + 2 * (64 + 512))
    keys = {
        "block_count": 3, "attention.head_count": slides.heads, "context_length": 4096,
        "attention.head_count_kv": slides.kv_heads, "attention.key_length": slides.head_dim,
        "attention.sliding_window": 64,
    }  # fmt: skip
    fields = {"general.architecture": "gemma2", **{f"gemma2.{k}": v for k, v in keys.items()}}
    assert file_cache_bytes(fields, None) == cache_bytes(slides, 4096)
    assert file_cache_bytes(fields, 4096, 2) == each * (2 * 4096 + 2 * (2 * 64 + 512))


def test_the_level_advised_fits_and_its_command_runs(
    tinylm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    model, cpu = load_model("Qwen2.5-7B-Instruct"), Gpu("CPU", 6 << 30, 6 << 30, platform="cpu")
    monkeypatch.setenv(PYTHON_VARIABLE, "/anything")
    levels = [best_level(model, memory << 30, cpu, 4096, "m") for memory in (16, 5, 4)]
    assert [str(x).partition(" ")[0] for x in levels] == ["q4_k_m", "iq4_xs", "q2_k"]
    assert str(best_level(model, 2 << 30, cpu, 4096, "m")).startswith("even q2_k takes")
    card = Gpu("card", 4 << 30, 4 << 30, bandwidth=300e9)
    some = plan_level(model, "q4_k_m", card, 4096, "m")
    assert 0 < some.gpu_layers < model.layers and some.tokens_per_second is None
    whole = plan_level(model, "q4_k_m", Gpu("card", 24 << 30, 24 << 30, bandwidth=300e9), 4096, "m")
    assert whole.gpu_layers == model.layers and 55 < (whole.tokens_per_second or 0) < 72
    monkeypatch.delenv(PYTHON_VARIABLE)
    monkeypatch.chdir(tmp_path)
    said = cli("recommend", "-m", tinylm, "--gpu", "cpu", "--json")
    why = next(e["why"] for e in json.loads(said.out)["engines"] if "llama" in e["name"])
    words = shlex.split(why.partition("): ")[2])
    assert words[:2] == ["quant", "export-gguf"] and cli(*words[1:], "-q").code == 0
    assert (tmp_path / words[words.index("-o") + 1]).is_file()
