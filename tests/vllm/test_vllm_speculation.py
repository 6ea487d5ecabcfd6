"""What speculation is predicted to accept, beside what vLLM counts; and that greedy text stays as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.speculation.dflash import dflash
from quant.speculation.heads import eagle3, native_head
from quant.speculation.measure import Acceptance, measure
from quant.speculation.proposers import Draft, Model, NGram, Proposer
from quant.speculation.run import SpeculationRequest, _prompts
from quant.speculation.sampling import Sampling
from tests.helpers import ROOT
from tests.speculation import guessed
from tests.speculation.drafts import (
    STEPS,
    TINY,
    trained,
    trained_parallel,
    write_cut,
    write_dflash,
    write_eagle3,
    write_mtp,
)
from tests.vllm.conftest import HERE

CPU, TOKENS, K = torch.device("cpu"), 96, 3
#: Proposer → vLLM's config of it; the drafts' places come later.
WAYS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "prompt_lookup_max": 5, "prompt_lookup_min": 2},
    "draft": {"method": "draft_model"},
    "eagle3": {"method": "eagle3"},
    "dflash": {"method": "dflash"},
    "mtp": {"method": "mtp"},
    "qwen3_5_text": {"method": "mtp"},
    "deepseek_v3": {"method": "mtp"},
}
#: Those that read a draft by its path.
DRAFTS = ("draft", "eagle3", "dflash")
#: Weights by chance leave ties, which bf16 rounds either way; in fp32 there are none, where vLLM has it.
IN_FP32 = ("deepseek_v3",)


def _target(name: str) -> str:
    """Which of the paths is continued."""
    return name if name == "mtp" or name in guessed.FAMILIES else "target"


@pytest.fixture(scope="module")
def paths(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model, and drafts that were trained on its text just now."""
    folder = tmp_path_factory.mktemp("drafts")
    return {
        "target": TINY,
        "draft": write_cut(folder / "cut", 2),
        "eagle3": write_eagle3(folder / "eagle3", trained("eagle3", STEPS)),
        "mtp": write_mtp(folder / "mtp", trained("mtp", STEPS)),
        "dflash": write_dflash(folder / "dflash", trained_parallel(STEPS, K)),
        "qwen3_5_text": guessed.write("qwen3_5_text", folder / "qwen3_5_text"),
        "deepseek_v3": guessed.write("deepseek_v3", folder / "deepseek_v3", "float32"),
    }


@pytest.fixture(scope="module")
def said(
    paths: dict[str, Path], vllm_python: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What vLLM answers and counts, without and with each speculation."""
    folder, rows = tmp_path_factory.mktemp("vllm"), _rows(TINY)
    jobs = []
    plain = dict.fromkeys(f"{name}-plain" for name in {*map(_target, WAYS)} - {*guessed.FAMILIES})
    for name, config in {**plain, **WAYS}.items():
        if config is not None:
            config = config | {"num_speculative_tokens": K}
            config |= {"model": str(paths[name])} if name in DRAFTS else {}
        path = paths[_target(name.removesuffix("-plain"))]
        jobs.append(
            {"name": name, "path": str(path), "config": config, "rows": rows, "new_tokens": TOKENS,
             "log": str(folder / f"{name}.log"), "dtype": "float32" if name in IN_FP32 else "bfloat16"}
        )  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [vllm_python, str(HERE / "speculate_many.py"), str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    found = [json.loads(x[7:]) for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    assert len(found) == len(jobs), done.stderr[-3000:]
    return {f["name"]: f for f in found}


def _rows(path: Path) -> list[list[int]]:
    return _prompts(path, SpeculationRequest(new_tokens=TOKENS))


def _predicted(name: str, paths: dict[str, Path], scratch: Path) -> Acceptance:
    target = Model(paths[_target(name)], CPU, scratch)
    proposer: Proposer
    if name == "ngram":
        proposer = NGram(5, 2)
    elif name == "draft":
        proposer = Draft(Model(paths["draft"], CPU, scratch), target.vocabulary)
    elif name == "eagle3":
        proposer = eagle3(target, paths[name])
    elif name == "dflash":
        proposer = dflash(target, paths[name])
    else:
        proposer = native_head(target, scratch)
    return measure(target, proposer, _rows(TINY), TOKENS, K, Sampling())


@pytest.mark.parametrize("name", WAYS)
def test_what_is_predicted_is_what_vllm_counts(
    name: str, paths: dict[str, Path], said: dict[str, Any], tmp_path: Path
) -> None:
    assert "error" not in said[name], said[name]
    counted = {k.rpartition("spec_decode_")[2]: v for k, v in said[name]["counted"].items()}
    found = _predicted(name, paths, tmp_path)
    drafts, proposed = counted["num_drafts"], counted["num_draft_tokens"]
    assert drafts > 50 and 0.05 < found.rate < 1.0
    assert abs(found.rate - counted["num_accepted_tokens"] / proposed) < (0.005 if name in IN_FP32 else 0.03)
    by_position = counted["num_accepted_tokens_per_pos"]
    # where weights by chance leave ties, texts part and the shares of a few hundred drafts with them
    apart = 0.005 if name in IN_FP32 else 0.05 if name in guessed.FAMILIES else 0.03
    for ours, theirs in zip(found.by_position, by_position, strict=True):
        assert abs(ours / found.drafts - theirs / drafts) < apart, (found, counted)
    tokens = sum(map(len, said[name]["tokens"]))
    per_step = tokens / (tokens - counted["num_accepted_tokens"])
    assert abs(found.tokens_per_step / per_step - 1) < 0.1


# weights by chance leave ties that bf16 rounds either way, so those families' texts are not compared
@pytest.mark.parametrize("name", [name for name in WAYS if name not in guessed.FAMILIES])
def test_greedy_text_stays_as_it_was(name: str, said: dict[str, Any]) -> None:
    plain = said[f"{_target(name)}-plain"]["tokens"]
    assert said[name]["tokens"] == plain


def test_the_command_proves_its_choice_on_real_servers(paths: dict[str, Path], vllm_python: str) -> None:
    options = [
        "--draft",
        str(paths["eagle3"]),
        "--proposer",
        "eagle3",
        "--tokens",
        "2",
        "--prompt-count",
        "4",
    ]
    command = [
        sys.executable,
        str(ROOT / "deploy_vllm.py"),
        "speculate",
        str(TINY),
        *options,
        "--prove",
        "--json",
    ]
    done = subprocess.run([*command, "-q"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    proof, guess = value["vllm"], value["predicted"]
    assert value["chosen"] == "EAGLE-3" and proof["same"] and proof["drafts"] > 20
    assert abs(proof["acceptance_rate"] - guess["acceptance_rate"]) < 0.03
    assert abs(proof["tokens_per_step"] / guess["tokens_per_step"] - 1) < 0.1
