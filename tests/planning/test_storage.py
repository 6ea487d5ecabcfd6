"""Predicted bytes of quantized checkpoints: against tensors packed in the test, and against what the command
writes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quant.catalog import find_model, model_from_directory, stored_bytes
from quant.checkpoint.header import read_header
from quant.errors import UsageError
from quant.planning.recommendation import MAKEABLE
from quant.planning.storage import checkpoint_bytes, file_bytes, packed, source_storage, storage_of
from tests.helpers import load_all, quantize, short_text

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT.parent / "shared" / "data" / "models"
MODEL = MODELS / "tinylm-11m"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "group"), [(64, 256, 128), (48, 352, 32), (8, 128, -1), (172, 64, 64)])
def test_packed_bytes_are_those_of_the_tensors(
    bits: int, symmetric: bool, n: int, k: int, group: int
) -> None:
    groups = 1 if group == -1 else k // group
    per_word = 32 // bits
    tensors = [
        np.zeros((n, -(-k // per_word)), np.int32),
        np.zeros((n, groups), np.float16),
        np.zeros(2, np.int64),
    ]
    if not symmetric:
        tensors.append(np.zeros((-(-n // per_word), groups), np.int32))
    assert packed(bits, group, symmetric).bytes(n, k, 2) == sum(t.nbytes for t in tensors)


def test_a_quantized_checkpoint_keeps_embeddings_head_and_norms() -> None:
    spec = find_model("meta-llama/Llama-3.1-8B-Instruct")
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    kept = 2 * (spec.parameters - linears)
    expected = kept + linears // 2 + linears // 128 * 2 + 32 * 7 * 16
    assert checkpoint_bytes(spec, "w4a16") == expected


def test_linears_that_groups_do_not_divide_stay_as_they_are() -> None:
    spec = find_model("openai-community/gpt2")
    assert checkpoint_bytes(spec, "w4a16", 512) > checkpoint_bytes(spec, "w4a16", 128)


def test_a_smaller_group_costs_its_scales() -> None:
    spec = find_model("meta-llama/Llama-3.1-8B")
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    assert (
        checkpoint_bytes(spec, "w4a16", 32) - checkpoint_bytes(spec, "w4a16", 128) == linears * 2 * 3 // 128
    )


@pytest.mark.parametrize(
    ("name", "gib"),
    [  # as printed by vLLM when loading on one GPU
        ("openai/gpt-oss-20b", 12.0), ("RedHatAI/Qwen2.5-7B-Instruct-FP8-dynamic", 8.14),
        ("Meta-Llama-3.1-8B-Instruct-quantized.w4a16", 5.38),
    ],
)  # fmt: skip
def test_quantized_sources_are_read_in_their_own_scheme(name: str, gib: float) -> None:
    spec = find_model(name)
    storage, covered = source_storage(spec)
    total = sum(
        storage.bytes(w.shape[0], w.shape[1], 2) * w.count if covered(w) else 2 * w.parameters
        for w in spec.weights
        if w.role != "mtp"
    )
    assert total / 2**30 == pytest.approx(gib, rel=0.08 if "oss" in name else 0.02)


def test_an_ignore_list_leaves_its_modules_in_16_bits() -> None:
    spec = find_model("moonshotai/Kimi-K2.5")
    storage, covered = source_storage(spec)
    assert {w.role for w in spec.weights if covered(w)} == {"experts"} and storage.bits == 4


def test_an_unknown_scheme_offers_the_nearest() -> None:
    with pytest.raises(UsageError, match="w4a16"):
        storage_of("w4a15")


def test_an_unknown_source_format_asks_for_the_directory() -> None:
    from dataclasses import replace

    with pytest.raises(UsageError, match="--model-path"):
        source_storage(replace(find_model("Llama-2-7b"), quantization={"quant_method": "novel"}))


@pytest.mark.skipif(not MODEL.is_dir(), reason="../shared is not there")
@pytest.mark.parametrize(
    ("model", "scheme", "group"),
    [
        ("tinylm-11m", "w4a16", 128),
        ("tinylm-11m", "w4a16-asym", 128),
        ("tinylm-11m", "w8a16", 128),
        ("tinylm-4m", "w4a16", 32),
        ("babyllama-tok105", "w4a16-asym", 32),
    ],
)
def test_predicted_bytes_are_what_quantize_writes(
    tmp_path: Path, model: str, scheme: str, group: int
) -> None:
    import quantize as command

    if "quantize" not in command.cli.commands:
        pytest.skip("this build has no quantize command")
    out, source = tmp_path / "out", model_from_directory(MODELS / model)
    arguments = [
        "quantize",
        "-m",
        str(MODELS / model),
        "-o",
        str(out),
        "--method",
        "minmax",
        "--scheme",
        scheme,
        "--group-size",
        str(group),
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "quantize.py"), *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert checkpoint_bytes(source, scheme, group) == stored_bytes(model_from_directory(out))
    files = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert file_bytes(source, scheme, group) == pytest.approx(files, rel=0.005)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("scheme", sorted({*MAKEABLE} - {"none"}))
def test_every_scheme_that_is_made_takes_what_was_predicted(
    scheme: str, kind: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """Small models, of which headers and numbers of whole tensors are a large part: what is left out of the
    count shows."""
    sides = {
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    }
    model, output = checkpoints(kind, **sides), tmp_path / "out"
    source = model_from_directory(model)
    text = {"samples": 4, "sequence_length": 32, "calibration_dataset": [short_text()]}
    report = quantize(model, output, method="minmax", scheme=scheme, **text)
    assert report["scheme"]["name"] == scheme and len(report["layers"]) == 14
    tensors = sum(t.nbytes for t in load_all(output).values())
    assert checkpoint_bytes(source, scheme) == tensors == stored_bytes(model_from_directory(output))
    assert file_bytes(source, scheme) == pytest.approx(
        sum(f.stat().st_size for f in output.glob("*.safetensors")), rel=0.005
    )


@pytest.mark.skipif(not MODEL.is_dir(), reason="../shared is not there")
def test_a_directory_as_it_is_costs_its_file() -> None:
    spec = model_from_directory(MODEL)
    sizes = 0
    for name, info in read_header(MODEL / "model.safetensors")[0].items():
        assert info.dtype == "BF16", name
        sizes += 2 * info.numel
    assert checkpoint_bytes(spec, "none") == sizes
