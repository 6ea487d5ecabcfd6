"""A context beyond the model's positions: refused in the same words wherever it is asked for, taken where
vLLM would take it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quant.engines import ENGINES
from quant.errors import CheckpointError, QuantError, UsageError
from quant.planning.recommendation import recommend
from quant.planning.request import EngineRequest
from quant.serving.deployment import Deployment, DeploymentRequest
from quant.serving.engines import plan
from quant.vllm.arguments import engine_arguments
from quant.vllm.context import ALLOW, context_length, overridden
from tests.contexts import CONTEXTS
from tests.helpers import ROOT

BEYOND = "has positions for 1024; give at most that, or a checkpoint whose config.json extends it"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "examples/tinylm-4m", tmp_path / "model"))


def _length(made: Deployment) -> int:
    return next(int(a.value) for a in made.arguments if a.name == made.word("max-model-len"))


@pytest.mark.parametrize(("changes", "overrides", "asked", "longest"), CONTEXTS)
def test_the_longest_context_is_the_one_that_vllm_derives(
    changes: dict[str, Any], overrides: dict[str, Any], asked: int | None, longest: int
) -> None:
    """The same table is asked of vLLM itself (tests/vllm/test_vllm_context.py)."""
    config = json.loads((ROOT / "examples/tinylm-4m/config.json").read_text()) | changes
    passed = {"hf-overrides": json.dumps(overrides)} if overrides else {}
    assert context_length(overridden(config, passed)) == longest


def test_some_families_state_their_positions_as_they_are_after_scaling() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    for kind, longest in (("gemma3_text", 1024), ("llama", 8192)):
        config = {"model_type": kind, "max_position_embeddings": 1024}
        assert context_length(config | {"rope_parameters": linear}) == longest
        nested = {"full_attention": linear, "sliding_attention": {"rope_type": "default"}}
        assert context_length(config | {"rope_parameters": nested}) == longest
    for odd in ({"rope_type": []}, {"type": {}, "factor": 2.0}, {"rope_type": "linear", "factor": 10**400}):
        context_length(config | {"rope_scaling": odd})
    assert context_length({}) is None
    absurd = {"max_position_embeddings": 2**30, "rope_scaling": {"type": "linear", "factor": 1e300}}
    assert context_length(absurd) == 2**30


@pytest.mark.parametrize("engine", [name for name, row in ENGINES.items() if not row.files])
def test_every_engine_is_refused_it(engine: str, source: Path) -> None:
    with pytest.raises(UsageError, match=f"--max-model-len is 1025: model {BEYOND}") as found:
        plan(source, DeploymentRequest(max_model_len=1025), engine)
    assert found.value.exit_code == 2
    word = ENGINES[engine].word("max-model-len")
    flag = word.replace("_", "-")
    with pytest.raises(UsageError, match=f"-- --{flag} is 1025: model {BEYOND}"):
        plan(source, DeploymentRequest(extra=(f"--{word}", "1025")), engine)
    (source / "vllm_config.json").write_text(json.dumps({"max-model-len": 1025}))
    with pytest.raises(CheckpointError, match=f"vllm_config.json: max-model-len is 1025: model {BEYOND}"):
        plan(source, DeploymentRequest(), engine)
    assert _length(plan(source, DeploymentRequest(max_model_len=1000), engine)) == 1000


def test_recommend_and_export_refuse_it_in_the_same_words(source: Path) -> None:
    with pytest.raises(QuantError, match=f"--context is 1025: model {BEYOND}"):
        recommend(source, "L4", EngineRequest(context=1025))
    config = json.loads((source / "config.json").read_text())
    with pytest.raises(UsageError, match=f"--max-model-len is 1025: the model {BEYOND}"):
        engine_arguments(config, max_model_len=1025)


def test_what_lets_vllm_take_it_is_passed_on_and_told(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW, "1")
    made = plan(source, DeploymentRequest(gpu="L4", max_model_len=2048))
    assert _length(made) == 2048 and made.environment[ALLOW] == "1"
    assert [w for w in made.warnings if "beyond the model's 1,024 positions" in w] == list(made.warnings)
    assert ALLOW not in plan(source, DeploymentRequest(gpu="L4")).environment
    found = recommend(source, "L4", EngineRequest(context=2048))
    assert found.plan is not None and found.plan.context == 2048 and found.plan.max_context == 2048
    assert any("beyond the model's 1,024 positions" in note for note in found.notes)
    with pytest.raises(UsageError, match=BEYOND):  # it is a variable of vLLM's
        plan(source, DeploymentRequest(max_model_len=2048), "sglang")


def test_overrides_of_the_config_count(source: Path) -> None:
    longer = ("--hf-overrides", '{"rope_scaling": {"rope_type": "linear", "factor": 4}}')
    made = plan(source, DeploymentRequest(gpu="L4", max_model_len=4096, extra=longer))
    assert _length(made) == 4096 and not made.warnings
    assert _length(plan(source, DeploymentRequest(extra=longer))) == 4096
    dotted = ("--hf-overrides.max_position_embeddings=8192",)
    assert _length(plan(source, DeploymentRequest(extra=dotted))) == 8192
    for wrong in ("{", "[1]"):
        with pytest.raises(UsageError, match="--hf-overrides is .*: a JSON object is needed"):
            plan(source, DeploymentRequest(extra=("--hf-overrides", wrong)))


def test_more_positions_of_a_file_are_planned(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    scaled = config | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    (source / "config.json").write_text(json.dumps(scaled))
    found = recommend(source, "L4", EngineRequest(context=4096))
    assert found.plan is not None and found.plan.max_context == 4096
    assert _length(plan(source, DeploymentRequest())) == 4096
