"""Checkpoints whose class is code of their own: it is run where a person says so, and never unasked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quant.errors import CheckpointError, UsageError
from quant.planning.recommendation import recommend
from quant.serving.deployment import Deployment, DeploymentRequest
from quant.serving.engines import plan
from quant.serving.process import running
from quant.serving.reference import open_server
from quant.vllm.arguments import engine_arguments
from tests.helpers import ROOT, change_config

OWN: dict[str, Any] = {
    "architectures": ["XForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"},
}
FLAG = "--trust-remote-code"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(ROOT / "examples/tinylm-4m", tmp_path / "own"))
    change_config(folder, **OWN)
    return folder


def _said(made: Deployment) -> str:
    return " ".join(made.warnings)


def test_a_plan_says_that_vllm_runs_the_files_code_and_with_which_flag(own: Path) -> None:
    made = plan(own, DeploymentRequest())
    assert made.command.count(FLAG) == 1
    reason = next(a.reason for a in made.arguments if a.name == "trust-remote-code")
    assert "configuration_x.py, modeling_x.py" in reason
    assert "vLLM has no class XForCausalLM" in _said(made) and FLAG in _said(made)
    agreed = plan(own, DeploymentRequest(extra=(FLAG,)))
    assert agreed.command.count(FLAG) == 1 and "vLLM has no class" in _said(agreed)
    found = recommend(own, "L4", scheme="none")
    assert found.commands[-1].endswith(FLAG)


def test_a_class_of_vllms_is_run_without_the_files_code(own: Path) -> None:
    change_config(own, architectures=["LlamaForCausalLM"])
    made = plan(own, DeploymentRequest())
    assert FLAG not in made.command and not made.warnings
    assert FLAG not in recommend(own, "L4", scheme="none").commands[-1]
    for engine in ("sglang", "tgi", "tensorrt-llm"):
        assert not any("trust" in word for word in plan(own, DeploymentRequest(), engine).command)


@pytest.mark.parametrize("engine", ["sglang", "tgi"])
def test_other_engines_are_told_it_too(engine: str, own: Path) -> None:
    change_config(own, model_type="x")
    made = plan(own, DeploymentRequest(), engine)
    assert made.command.count(FLAG) == 1 and "modeling_x.py" in _said(made)


def test_nothing_here_starts_it_unasked(own: Path) -> None:
    """Before any Python of vLLM's is looked for."""
    with (
        pytest.raises(UsageError, match=rf"modeling_x\.py\), which is not run here unasked: .* -- {FLAG}"),
        running(plan(own, DeploymentRequest()), python="/no/python"),
    ):
        pass
    plan(own, DeploymentRequest(extra=(FLAG,))).demand_trust()


def test_a_comparison_does_not_start_it(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.serving.reference.find_vllm", lambda python: None)
    with pytest.raises(UsageError, match="not run here unasked"):
        open_server(own, "/no/python")


def test_a_file_beside_the_weights_cannot_say_it(own: Path) -> None:
    """What is downloaded does not vouch for itself; neither does an export write it."""
    assert not [a for a in engine_arguments(OWN) if "trust" in a.name]
    (own / "vllm_config.json").write_text(json.dumps({"trust-remote-code": "true"}))
    with pytest.raises(CheckpointError, match="trust-remote-code does not belong there"):
        plan(own, DeploymentRequest())
