"""`quant quantize` without a method: the planner decides, or says why it cannot."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from quant.errors import NothingFits, UsageError
from quant.hardware import Detection, Host
from quant.pipeline.checks import target_problems
from quant.planning.target import choose, method_for, settings
from quant.schemes import PRESETS
from quantize import cli

MODEL = Path(__file__).resolve().parents[2] / "examples/tinylm-4m"
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.planning.target.detect", lambda: Detection((), Host(1, 1, 1, 1, 1), "no GPU"))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    return tmp_path


def test_a_checkpoint_that_fits_as_it_is_is_left_alone(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli, ["quantize", "-m", str(MODEL), "-o", str(tmp_path / "out"), "--gpu", "T4"]
    )
    assert result.exit_code == 0
    assert "Nothing to quantize" in result.stdout and f"vllm serve {MODEL}" in result.stdout
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_one_is_asked_for(tmp_path: Path, without_gpu: None) -> None:
    with pytest.raises(UsageError, match="--gpu L40S-48GB.*--scheme w4a16"):
        choose(MODEL, tmp_path / "out", gpu=None, tensor_parallel=None, vllm_version="0.32")


def test_a_model_that_does_not_fit_gets_the_recommended_scheme(large: Path) -> None:
    found = choose(
        large / "config.json", large / "out", gpu="H100", tensor_parallel=None, vllm_version="0.32"
    )
    assert settings(found)["method"] == "yaqa" and settings(found)["scheme"] == "w4a16"


def test_nothing_fits_a_small_gpu(large: Path) -> None:
    with pytest.raises(NothingFits):
        choose(large / "config.json", large / "out", gpu="T4", tensor_parallel=None, vllm_version="0.32")


@pytest.mark.parametrize(("scheme", "method"), [("w4a16", "yaqa"), ("w8a16", "minmax")])
def test_a_scheme_brings_its_method(scheme: str, method: str, tmp_path: Path) -> None:
    assert method_for(PRESETS[scheme], MODEL) == (method, "")
    result = CliRunner().invoke(
        cli,
        [
            "quantize",
            "-m",
            str(MODEL),
            "-o",
            str(tmp_path / "out"),
            "--scheme",
            scheme,
            "--dry-run",
            "--json",
        ],
    )
    assert result.exit_code == 0 and json.loads(result.stdout)["method"] == method


def test_a_gpu_without_kernels_and_a_release_without_the_format_are_refused_together() -> None:
    problems = target_problems(PRESETS["w4a16"], "compressed-tensors", "V100-32GB", "0.6.0")
    assert len(problems) == 2
    assert "0.6.2" in problems[0] and "7.0" in problems[1] and "7.5" in problems[1]
    assert target_problems(PRESETS["w4a16"], "plain", "V100-32GB", "0.32") == []
