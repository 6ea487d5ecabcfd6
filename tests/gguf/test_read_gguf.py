"""A GGUF file is read like any checkpoint: the numbers and the tokenizer that it was made of come back, and
what is damaged or of no use is said by name."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from quant.checkpoint.reader import open_checkpoint
from quant.errors import CheckpointError, QuantError
from quant.evaluation.verify import verify
from quant.formats.reading import dequantized
from quant.gguf.levels import LEVELS
from quant.pipeline.export import export
from quant.pipeline.gguf import export_gguf
from quant.pipeline.searching import search
from quant.planning.recommendation import recommend
from quant.recipe import make_recipe
from quant.serving.deployment import DeploymentRequest
from quant.serving.engines import plan
from tests.gguf.damage import assert_damage_is_told
from tests.gguf.test_llama_cpp import MODELS, tokenizers_of_every_kind
from tests.helpers import (
    change_config,
    copy_model,
    load_all,
    make_checkpoint,
    read_config,
    save_all,
    short_text,
)


def test_every_family_comes_back_as_it_was(tmp_path: Path) -> None:
    """All tensors bit for bit, and a config by which transformers computes the same."""
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(2, 4096, (1, 80), generator=torch.Generator().manual_seed(3))
    for name, (kind, changes) in MODELS.items():
        source, file, back = (tmp_path / f"{name}{end}" for end in ("", ".gguf", "-back"))
        make_checkpoint(source, kind, dtype=torch.float16, **changes)
        export_gguf(source, file)
        report = export(file, back)
        assert report.format == "plain" and not report.conversion.repairs, name
        wanted, found = load_all(source), load_all(back)
        assert set(wanted) == set(found), name
        for tensor, value in wanted.items():  # Gemma's norms are written in its dtype, bf16
            slack = 2**-8 if kind.startswith("gemma") and value.ndim == 1 else 0.0
            assert (found[tensor].float() - value.float()).abs().max() <= slack, (name, tensor)
        with torch.no_grad():
            a, b = (
                AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(tokens).logits
                for f in (source, back)
            )
        assert (a - b).abs().max() < (0.05 if kind.startswith("gemma") else 1e-4), name


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        ({"group_size": 32}, (4, True)),
        ({"group_size": 32, "symmetric": False}, (4, False)),
        ({"group_size": 32, "bits": 8}, (8, True)),
    ],
)
def test_codes_come_back_as_a_scheme_of_vllm(
    quantized: Callable[..., Path], tmp_path: Path, options: dict[str, Any], scheme: tuple[int, bool]
) -> None:
    source, file, back = quantized(method="minmax", **options), tmp_path / "a.gguf", tmp_path / "back"
    export_gguf(source, file)
    report = export(file, back)
    assert report.format == "compressed-tensors" and report.conversion.linears == 14
    weights = read_config(back)["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["symmetric"], weights["group_size"]) == (*scheme, 32)
    wanted, found = dequantized(open_checkpoint(source)), dequantized(open_checkpoint(back))
    for name in wanted.computed:
        assert torch.equal(wanted.read(name), found.read(name)), name


def test_every_level_is_read_as_the_gguf_package_reads_it(llama: Path, tmp_path: Path) -> None:
    for level in LEVELS:
        file = tmp_path / f"{level}.gguf"
        export_gguf(llama, file, level)
        stored = {t.name: t for t in gguf.GGUFReader(file).tensors}
        checkpoint = dequantized(open_checkpoint(file))
        for target, name in (
            ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
            ("output.weight", "lm_head.weight"),
        ):
            tensor = stored[target]
            wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(checkpoint.read(name).float().numpy(), wanted), (level, name)
            pieces = [p.float().clone() for p in checkpoint.read_rows(name, 7)]
            assert np.array_equal(torch.cat(pieces).numpy(), wanted), (level, name)


def test_tokenizers_come_back(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    texts = [
        short_text().read_text(encoding="utf-8")[:3000],
        "It's 12345 items!\n\n ünï 東京 🙂 <s>x</s> STOP'LL",
    ]
    for name, tokenizer in tokenizers_of_every_kind():
        rows = -(-tokenizer.get_vocab_size() // 64) * 64
        folder = make_checkpoint(tmp_path / name, vocab_size=rows, num_hidden_layers=1)
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        export_gguf(folder, tmp_path / f"{name}.gguf", "f16")
        back = open_checkpoint(tmp_path / f"{name}.gguf").path
        assert (back / "chat_template.jinja").read_text() == "{{ messages }}"
        again = Tokenizer.from_file(str(back / "tokenizer.json"))
        for text in texts:
            assert again.encode(text).ids == tokenizer.encode(text).ids, name
        assert again.decode(again.encode(texts[0]).ids) == texts[0], name
        assert json.loads((back / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    made = tmp_path_factory.mktemp("gguf") / "model.gguf"
    export_gguf(llama, made, "q8_0")
    return made


def test_verify_names_what_differs_from_the_source(file: Path, llama: Path, tmp_path: Path) -> None:
    assert verify(file, source=llama).passed
    other = copy_model(llama, tmp_path / "other")
    tensors = load_all(other)
    tensors["model.layers.1.mlp.up_proj.weight"] = -tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"][3] += 1
    save_all(other, tensors)
    found = [c.detail for c in verify(file, source=other).checks if not c.passed]
    assert len(found) == 1 and "mlp.up_proj.weight is -1.000 times the source's" in found[0]
    assert "model.norm.weight is F32, and not the source's numbers" in found[0]


def test_rows_that_are_not_the_source_s_are_told_from_rounded_ones(
    llama: Path, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    """Of codes that GPTQ moved too, and of 4 bits rounded once more, judged against the first source."""
    few: dict[str, Any] = {"method": "gptq", "samples": 4, "sequence_length": 64}
    four, uneven = quantized(**few), quantized(**few, symmetric=False)
    for source, level in (
        (llama, "q8_0"), (llama, "q4_0"), (llama, "f16"), (four, None), (uneven, "q8_0")
    ):  # fmt: skip
        file = tmp_path / f"{source.parent.name}-{level}.gguf"
        export_gguf(source, file, level)
        assert_damage_is_told(file, llama, tmp_path)


@pytest.mark.parametrize("level", ["q8_0", "q5_1", "q4_0"])
def test_a_matrix_multiplied_by_a_number_is_another_one(level: str, llama: Path, tmp_path: Path) -> None:
    """By so little that every row is as near as rounding alone could leave it."""
    export_gguf(llama, tmp_path / "model.gguf", level)
    other = copy_model(llama, tmp_path / "other")
    tensors = load_all(other)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.25
    save_all(other, tensors)
    (said,) = verify(tmp_path / "model.gguf", source=other).failed
    size = re.search(
        rf"mlp.up_proj.weight is (.*) times the source's, where rounding to {level.upper()}", said
    )
    assert size is not None and float(size[1]) == pytest.approx(0.8, abs=0.01)


def test_verify_compares_all_that_the_graph_is_built_from(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """What a file says otherwise than its source, or not at all, is told by its key."""
    scaled = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    llama3 = scaled | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    yarn = scaled | {"rope_type": "yarn"}
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    cases: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        ("llama", {"rope_parameters": llama3}, {"rope_parameters": plain}, "rope_freqs.weight is"),
        ("llama", {"rope_parameters": plain}, {"rope_parameters": llama3}, "rope_freqs.weight is not stated"),
        (
            "llama", {"rope_parameters": llama3}, {"rope_parameters": llama3 | {"high_freq_factor": 8.0}},
            "rope_freqs.weight is",
        ),
        (
            "llama", {"rope_parameters": plain}, {"rope_parameters": yarn},
            "rope.scaling.type is not stated, of the source 'yarn'",
        ),
        (
            "llama", {"rope_parameters": yarn}, {"rope_parameters": yarn | {"beta_fast": 8.0}},
            "rope.scaling.yarn_beta_fast is 32.0, of the source 8.0",
        ),
        ("llama", {}, {"max_position_embeddings": 99}, "context_length is"),
        ("llama", {}, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("gemma2", {"tie": True}, {"sliding_window": 9}, "attention.sliding_window is 16, of the source 9"),
        (
            "gemma2", {"tie": True}, {"final_logit_softcapping": 10.0},
            "final_logit_softcapping is 30.0, of the source 10.0",
        ),
        ("gemma3_text", {"tie": True}, {"rope_local_base_freq": 7.0, "rope_parameters": None}, "freq_base"),
    ]  # fmt: skip
    for number, (kind, options, changes, said) in enumerate(cases):
        source, file = checkpoints(kind, **options), tmp_path / f"{number}.gguf"
        export_gguf(source, file)
        assert verify(file, source=source).passed, number
        other = copy_model(source, tmp_path / str(number))
        change_config(other, **changes)
        found = verify(file, source=other).failed
        assert len(found) == 1 and said in found[0], (number, found)


def test_a_source_is_a_wrapper_or_has_its_experts_in_one_tensor(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """Its text part is compared, whatever stands before the names; a head that is lost is named."""
    plain = checkpoints("gemma3_text", tie=True)
    wrapper = copy_model(plain, tmp_path / "wrapper")
    config = json.loads((plain / "config.json").read_text())
    whole = {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": config
    }  # fmt: skip
    (wrapper / "config.json").write_text(json.dumps(whole))
    tensors = {n.replace("model.", "model.language_model.", 1): t for n, t in load_all(plain).items()}
    tower = {"model.vision_tower.encoder.layers.0.mlp.fc1.weight": torch.zeros(8, 8)}
    save_all(wrapper, tensors | tower)
    export_gguf(wrapper, tmp_path / "w.gguf", "q8_0")
    assert not verify(tmp_path / "w.gguf", source=wrapper).failed
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    save_all(wrapper, tensors | tower | {name: -tensors[name]})
    (said,) = verify(tmp_path / "w.gguf", source=wrapper).failed
    assert "layers.1.mlp.up_proj.weight is -1.000 times" in said

    mixture = checkpoints("mixtral", num_local_experts=4, num_experts_per_tok=2)
    export_gguf(mixture, tmp_path / "m.gguf", "q8_0")
    fused = copy_model(mixture, tmp_path / "fused")
    stored = load_all(mixture)
    for block in range(read_config(mixture)["num_hidden_layers"]):
        prefix = f"model.layers.{block}.block_sparse_moe"
        inside = [f"{prefix}.experts.{{}}.{w}.weight" for w in ("w1", "w3", "w2")]
        first, second, third = (torch.stack([stored.pop(n.format(e)) for e in range(4)]) for n in inside)
        stored[f"model.layers.{block}.mlp.experts.gate_up_proj"] = torch.cat([first, second], 1)
        stored[f"model.layers.{block}.mlp.experts.down_proj"] = third
        stored[f"model.layers.{block}.mlp.gate.weight"] = stored.pop(f"{prefix}.gate.weight")
    save_all(fused, stored)
    assert not verify(tmp_path / "m.gguf", source=fused).failed
    export_gguf(fused, tmp_path / "f.gguf", "q8_0")
    assert not verify(tmp_path / "f.gguf", source=mixture).failed

    llama = checkpoints("llama", tie=True)
    export_gguf(llama, tmp_path / "l.gguf", "q8_0")
    untied = copy_model(llama, tmp_path / "untied-llama")
    change_config(untied, tie_word_embeddings=False)
    both = load_all(llama)
    save_all(untied, both | {"lm_head.weight": both["model.embed_tokens.weight"].clone()})
    assert (
        "lm_head.weight of the source is not in the file"
        in verify(tmp_path / "l.gguf", source=untied).failed[0]
    )


def test_a_file_is_advised_to_be_made_into_what_vllm_loads(file: Path) -> None:
    """Which has no loader of it; a search among schemes reads its config all the same."""
    advice = recommend(file, "L40S-48GB")
    assert advice.recommended not in (None, "none")
    assert f"quantize --model-path {file}" in advice.commands[0] and ".gguf" not in advice.commands[1]
    assert any("--engine llama.cpp" in row.why for row in advice.plans if row.scheme == "none")
    asked = {"model_path": file, "output_path": file.parent / "out", "method": "gptq", "target_bits": 6.0}
    searched = search(make_recipe(asked), run=False)
    assert searched.entries


def test_split_files_are_one_model(file: Path, llama: Path, tmp_path: Path) -> None:
    """Written by the gguf package as llama.cpp's own llama-gguf-split names them."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=8)
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    for path in (tmp_path, parts[0]):
        assert verify(path, source=llama).passed
    parts[1].unlink()
    with pytest.raises(CheckpointError, match="-00002-of-00003.gguf is not beside it"):
        open_checkpoint(tmp_path)
    for part in (parts[0], parts[2]):
        part.unlink()
    (tmp_path / "mmproj-model.gguf").write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="holds mmproj-model.gguf alone, the tower"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="holds mmproj-model.gguf alone, the tower"):
        plan(tmp_path, DeploymentRequest(), "llama.cpp")


def _patched(data: bytes, at: int, letter: str, value: Any) -> bytes:
    return data[:at] + struct.pack(letter, value) + data[at + struct.calcsize(letter) :]


def _after(data: bytes, key: bytes, more: int = 0) -> int:
    return data.index(key) + len(key) + more


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: b"GGML" + d[4:], "begins with b'GGML'"),
        (lambda d: b"", "begins with b''"),
        (lambda d: _patched(d, 4, ">I", 3), "big-endian GGUF"),
        (lambda d: _patched(d, 4, "<I", 1), "GGUF of version 1"),
        (lambda d: _patched(d, 8, "<Q", 2**60), "tensors takes"),
        (lambda d: _patched(d, 16, "<Q", 2**60), "keys takes"),
        (lambda d: d[: len(d) // 2], "it is truncated"),
        (lambda d: d[:3000], "left of the file"),
        (lambda d: _patched(d, _after(d, b"tokenizer.ggml.tokens", 8), "<Q", 2**62), "left of the file"),
        (lambda d: _patched(d, _after(d, b"tokenizer.ggml.tokens", 4), "<I", 9), "array of type 9"),
        (lambda d: _patched(d, _after(d, b"llama.block_count"), "<I", 77), "type 77, which no version"),
        (lambda d: _patched(d, _after(d, b"llama.block_count", 4), "<I", 0), "block_count is 0"),
        (lambda d: _patched(d, _after(d, b"llama.block_count", 4), "<I", 3), "num_hidden_layers"),
        (lambda d: d.replace(b"llama.block_count", b"llama.block_sount"), "block_count is missing"),
        (lambda d: d.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"), "appears twice"),
        (lambda d: d.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"), "ffn_xx.weight', which no"),
        (lambda d: _patched(d, _after(d, b"blk.1.ffn_up.weight"), "<I", 99), "has 99 sides"),
        (lambda d: _patched(d, _after(d, b"blk.1.ffn_up.weight", 4), "<Q", 2**63), "no whole blocks"),
        (lambda d: _patched(d, _after(d, b"blk.1.ffn_up.weight", 20), "<I", 31), "ggml's type 31"),
        (lambda d: _patched(d, _after(d, b"blk.1.ffn_up.weight", 24), "<Q", 2**50), "it is truncated"),
        (lambda d: _patched(d, _after(d, b"blk.1.ffn_up.weight", 24), "<Q", 0), "lies over the one before"),
        (lambda d: d.replace(b"\0\0\0llama", b"\0\0\0mamba", 1), "architecture 'mamba' cannot"),
    ],
)  # fmt: skip
def test_damaged_and_hostile_files_are_refused_by_name(
    file: Path, tmp_path: Path, damage: Callable[[bytes], bytes], said: str
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(damage(file.read_bytes()))
    try:
        found = "; ".join(verify(bad).failed)
    except QuantError as error:
        found = str(error)
    assert said in found and (str(bad) in found or "num_hidden" in found or "ffn_xx" in found)


def test_a_folder_of_several_files_is_ambiguous(file: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).symlink_to(file)
    with pytest.raises(CheckpointError, match="holds 2 GGUF files"):
        open_checkpoint(tmp_path)
    (tmp_path / "b.gguf").unlink()
    assert len(open_checkpoint(tmp_path).tensors) == 21
