"""llama.cpp computes from a GGUF file what transformers computes from the checkpoint, and
reads text alike."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quant.catalog import load_model
from quant.checkpoint.reader import open_checkpoint
from quant.evaluation.verify import verify
from quant.formats.reading import dequantized
from quant.gguf import llama_cpp as library
from quant.gguf.levels import OWN_LEVELS
from quant.gguf.tokenizer import PRE_TOKENIZERS
from quant.pipeline.gguf import export_gguf
from quant.pipeline.importance import importance
from quant.pipeline.manager import QuantizationManager
from quant.pipeline.plan import plan_job
from quant.planning.gguf import level_bytes
from quant.progress import silent
from quant.recipe import make_recipe
from tests.gguf.damage import assert_damage_is_told
from tests.helpers import TINYLM, make_checkpoint, quantize, short_text

Ask = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
_SCALED = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
#: Everything that a row of the table, a scaling of rotary embeddings or a layout of experts is written for.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {
            "attention_bias": True, "mlp_bias": True,
            "rope_parameters": _SCALED
            | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
    ),
    "mistral": ("mistral", {"sliding_window": None, "rope_parameters": _SCALED | {"rope_type": "linear"}}),
    "qwen2": ("qwen2", {"rope_parameters": _SCALED | {"rope_type": "yarn"}, "tie": True}),
    "qwen3-moe": ("qwen3_moe", _EXPERTS | {"head_dim": 32, "norm_topk_prob": True}),
    "qwen2-moe": (
        "qwen2_moe",
        _EXPERTS
        | {"num_experts_per_tok": 2, "shared_expert_intermediate_size": 96, "norm_topk_prob": False},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("gemma2", {"tie": True}),
    "gemma3": ("gemma3_text", {"tie": True}),
    "longrope": (
        "phi3",
        {
            "max_position_embeddings": 128, "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0,
                "short_factor": [1.0 + i / 10 for i in range(8)],
                "long_factor": [2.0 + i / 3 for i in range(8)],
            },
        },
    ),
}  # fmt: skip


def reference(folder: Path, rows: list[list[int]], file: Path) -> tuple[float, list[int]]:
    """Writes transformers' log-probabilities of rows; the mean of −log p, and 12 tokens decoded greedily.
    Of a quantized checkpoint, those of its dequantized values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = dequantized(open_checkpoint(folder))
    config = AutoConfig.from_pretrained(checkpoint.path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if checkpoint.computed:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        values = {n: checkpoint.read(n).float() for n in checkpoint.tensors}
        assert not model.load_state_dict(values, strict=False).unexpected_keys
        model.tie_weights()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logs = torch.stack([model(torch.tensor([r])).logits[0, :-1].log_softmax(-1) for r in rows])
        np.save(file, logs.numpy())
        targets = torch.tensor(rows)[:, 1:, None]
        greedy = list(rows[0][:16])
        for _ in range(12):
            greedy.append(int(model(torch.tensor([greedy])).logits[0, -1].argmax()))
    return float(-logs.gather(2, targets).mean()), greedy[16:]


def test_every_family_computes_the_same(tmp_path: Path, llama_cpp: Ask) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [[0, *torch.randint(2, 4096, (99,), generator=generator).tolist()] for _ in range(2)]
    requests, wanted = [], []
    for name, (kind, changes) in MODELS.items():
        folder = make_checkpoint(tmp_path / name, kind, dtype=torch.float16, **changes)
        file = tmp_path / f"{name}.gguf"
        export_gguf(folder, file)
        logs = tmp_path / f"{name}.npy"
        wanted.append(reference(folder, rows, logs))
        requests.append({"file": str(file), "rows": rows, "reference": str(logs), "greedy": 12})
    for name, answer, (loss, greedy) in zip(MODELS, llama_cpp(requests), wanted, strict=True):
        assert answer["kl"] < 1e-4, name  # another row order, offset or factor costs 0.01 and more
        assert abs(answer["loss"] - loss) < 1e-3, name
        if name != "longrope":  # llama.cpp takes the long factors by the context, transformers by the text
            assert answer["greedy"][:4] == greedy[:4], name


@pytest.fixture(scope="module")
def texts() -> list[str]:
    strange = "It's 12345 items!\n\n  Tabs\t\tand\r\nünïcode 東京 🙂 don't STOP'LL <s>x</s>  ١٢٣ naïve\u0301"
    return [short_text().read_text(encoding="utf-8")[:4000], strange, " leading", "trailing  ", ""]


def test_a_trained_model_at_every_exact_level(tmp_path: Path, llama_cpp: Ask, texts: list[str]) -> None:
    """Perplexity within 0.5 %, greedy text and tokens equal: the source's values, then codes of GPTQ as Q4_0
    and of 8 bits as Q8_0, which are stored as they are."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINYLM)
    ids = tokenizer(texts[0]).input_ids
    rows = [ids[:200], [0, *ids[200:399]]]
    four, eight = tmp_path / "four", tmp_path / "eight"
    quantize(TINYLM, four, method="gptq", group_size=32)
    quantize(TINYLM, eight, method="minmax", bits=8, group_size=128)
    requests, wanted = [], []
    for folder, level in ((TINYLM, "f16"), (TINYLM, "bf16"), (TINYLM, "q8_0"), (four, None), (eight, None)):
        file, logs = tmp_path / f"{folder.name}-{level}.gguf", tmp_path / f"{folder.name}-{level}.npy"
        made = export_gguf(folder, file, level)
        if level is None:
            assert (made.level, made.exact) == ({"four": "q4_0", "eight": "q8_0"}[folder.name], 28)
        wanted.append(reference(folder, rows, logs))
        requests.append(
            {"file": str(file), "rows": rows, "reference": str(logs), "greedy": 12, "texts": texts}
        )
    for request, answer, (loss, greedy) in zip(requests, llama_cpp(requests), wanted, strict=True):
        name = Path(request["file"]).name
        assert abs(math.expm1(answer["loss"] - loss)) < 0.005, name
        assert answer["kl"] < 2e-3, name
        if "four" not in name:  # llama.cpp rounds activations to 8 bits before it multiplies by 4-bit blocks
            assert answer["greedy"] == greedy, name
        assert answer["tokens"] == [tokenizer(t).input_ids for t in texts], name


def tokenizers_of_every_kind() -> Iterator[tuple[str, Any]]:
    """A tokenizer trained for each rule of words, and SentencePiece's BPE with bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    lines = short_text().read_text(encoding="utf-8").splitlines()[:400]
    for steps, whole, name in PRE_TOKENIZERS:
        parts: list[Any] = [
            pre_tokenizers.Digits(individual_digits=True)
            if s == "digit"
            else pre_tokenizers.Split(Regex(s), "isolated")
            for s in steps
            if s != "bytes"
        ]
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="bytes" in steps))
        tokenizer = Tokenizer(models.BPE(ignore_merges=bool(whole)))
        tokenizer.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        )  # fmt: skip
        tokenizer.train_from_iterator(lines, trainer)
        yield name, tokenizer
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    pieces = ["▁" + "▁".join(line.split()) for line in lines]
    tokenizer.train_from_iterator(pieces, trainer)
    said = json.loads(tokenizer.to_str())
    said["added_tokens"] = said["added_tokens"][:3]
    yield "sentencepiece", Tokenizer.from_str(json.dumps(said))


def test_every_kind_of_tokenizer_reads_text_alike(tmp_path: Path, llama_cpp: Ask, texts: list[str]) -> None:
    requests, wanted = [], {}
    for name, tokenizer in tokenizers_of_every_kind():
        rows = -(-tokenizer.get_vocab_size() // 64) * 64
        folder = make_checkpoint(tmp_path / name, vocab_size=rows, num_hidden_layers=1)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"})
        )
        export_gguf(folder, tmp_path / f"{name}.gguf", "q8_0")
        wanted[name] = [tokenizer.encode(t).ids for t in texts]
        requests.append({"file": str(tmp_path / f"{name}.gguf"), "texts": texts})
    for (name, ids), answer in zip(wanted.items(), llama_cpp(requests), strict=True):
        assert answer["tokens"] == ids, name


def test_llama_cpp_s_own_levels_are_better_with_our_importance(tmp_path: Path, llama_cpp: Ask) -> None:
    """Two bits, where weighing shows most, on text that calibration did not see; each expert's weights are
    of its own tokens, or llama.cpp refuses the matrix for its size."""
    from transformers import AutoTokenizer

    text = short_text().read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text[: len(text) // 2])
    few = {"samples": 16, "sequence_length": 256, "calibration_dataset": [tmp_path / "text.txt"]}
    ids = AutoTokenizer.from_pretrained(TINYLM)(text[len(text) // 2 :]).input_ids
    rows = [[0, *ids[i : i + 255]] for i in range(0, 4 * 255, 255)]
    wide = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 256, "num_experts_per_tok": 2}
    experts = make_checkpoint(tmp_path / "experts", "qwen3_moe", **_EXPERTS | wide | {"norm_topk_prob": True})
    logs, requests = tmp_path / "reference.npy", []
    reference(TINYLM, rows, logs)
    for folder, weighed in ((TINYLM, True), (TINYLM, False), (experts, True)):
        file = tmp_path / f"{folder.name}-{weighed}.gguf"
        made = export_gguf(folder, file, "q2_k", imatrix=weighed, calibration=few)
        assert made.tensors["Q2_K"] > 4 and not made.notes
        requests.append({"file": str(file), "rows": rows, "reference": str(logs)})
    weighed_kl, plain_kl, _ = (a["kl"] for a in llama_cpp(requests))
    assert weighed_kl < plain_kl
    assert_damage_is_told(tmp_path / f"{TINYLM.name}-True.gguf", TINYLM, tmp_path)
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_our_importance_is_what_llama_cpp_gathers_itself(tmp_path: Path, llama_cpp: Ask) -> None:
    """Of the same rows, by the hook that `llama-imatrix` uses; and a level made with either loses as much."""
    few = {"samples": 8, "sequence_length": 256}
    values = {"method": "gptq", "target": "other", "model_path": TINYLM, "output_path": tmp_path / "none"}
    rows = QuantizationManager(plan_job(make_recipe({**values, **few}))).prepare()[0].tokens
    wide, gathered, logs = tmp_path / "f16.gguf", tmp_path / "theirs.npz", tmp_path / "reference.npy"
    export_gguf(TINYLM, wide, "f16")
    llama_cpp([{"file": str(wide), "rows": rows.tolist(), "importance": str(gathered)}])
    theirs = {n: v for n, v in np.load(gathered).items() if n.startswith("blk.")}
    ours = {
        name: mean.numpy()
        for linear, mean in importance(TINYLM, tmp_path / "scratch", few).items()
        if (name := _called(linear))
    }
    assert ours.keys() == theirs.keys() and len(ours) == 28
    for name, mean in ours.items():
        np.testing.assert_allclose(mean, theirs[name], rtol=0.02, err_msg=name)
    requests, judged = [], rows[:4].tolist()
    reference(TINYLM, judged, logs)
    for kind, weights in (("ours", ours), ("theirs", theirs)):
        file = tmp_path / f"{kind}.gguf"
        library.quantize(wide, file, OWN_LEVELS["q2_k"], weights, 1, silent)
        requests.append({"file": str(file), "rows": judged, "reference": str(logs)})
    mine, its = (a["kl"] for a in llama_cpp(requests))
    assert mine == pytest.approx(its, rel=0.02)


def _called(linear: str) -> str:
    """What a Llama's linear is called in a file."""
    _, _, block, _, kind = linear.split(".")
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    return f"blk.{block}.{names.get(kind) or 'ffn_' + kind.removesuffix('_proj')}.weight"


def test_llama_cpp_s_own_levels_are_evaluated_as_it_computes_them(tmp_path: Path, llama_cpp: Ask) -> None:
    """Perplexity of the dequantized numbers within 0.5 % of llama.cpp's, which multiplies by the blocks."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(TINYLM)(short_text().read_text(encoding="utf-8")[:4000]).input_ids
    rows, requests, wanted = [[0, *ids[i : i + 199]] for i in (0, 199, 398)], [], []
    for level in OWN_LEVELS:
        file, logs = tmp_path / f"{level}.gguf", tmp_path / f"{level}.npy"
        export_gguf(TINYLM, file, level, imatrix=False)
        assert verify(file, source=TINYLM).passed, level
        wanted.append(reference(file, rows, logs)[0])
        requests.append({"file": str(file), "rows": rows, "reference": str(logs)})
    for level, answer, loss in zip(OWN_LEVELS, llama_cpp(requests), wanted, strict=True):
        assert abs(math.expm1(answer["loss"] - loss)) < 0.005 and answer["kl"] < 1e-3, level


def test_rows_that_are_no_blocks_of_256_fall_back_by_name(tmp_path: Path, llama_cpp: Ask) -> None:
    folder = make_checkpoint(tmp_path / "model")
    made = export_gguf(folder, tmp_path / "out.gguf", "q4_k_m", imatrix=False)
    assert "Q4_K" not in made.tensors
    assert any(n.startswith("blk.1.ffn_down.weight is Q") and "rows of 96" in n for n in made.notes)
    llama_cpp([{"file": str(tmp_path / "out.gguf")}])


def test_llama_cpp_s_levels_are_as_large_as_planned(tmp_path: Path, llama_cpp: Ask) -> None:
    """The sum of all tensors, to the byte: blocks that get more bits, fused and routed matrices."""
    import gguf

    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 64}
    for kind, changes, level in (
        ("phi3", {}, "q4_k_m"),
        ("phi3", {}, "q3_k_m"),
        ("mixtral", experts, "q4_k_m"),
        ("llama", {"num_key_value_heads": 1, "head_dim": 64, "tie": True}, "iq4_xs"),
    ):
        folder = tmp_path / f"{kind}-{level}"
        make_checkpoint(folder, kind, **wide, **changes)
        export_gguf(folder, tmp_path / "a.gguf", level, imatrix=False)
        stored = sum(int(t.n_bytes) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors)
        spec = load_model(str(folder))
        assert level_bytes(spec, level, weighed=False) - spec.vocabulary * 36 == stored, (kind, level)
        (tmp_path / "a.gguf").unlink()
