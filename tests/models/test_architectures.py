"""Whether vLLM has a class for a model, and that every command says the same of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from quant.errors import NothingFits, Problems, VerificationFailed
from quant.evaluation.verify import verify
from quant.pipeline.export import export
from quant.pipeline.plan import plan_job
from quant.planning import recommend
from quant.planning.request import EngineRequest
from quant.serving.deployment import DeploymentRequest, plan
from quant.vllm.architectures import architecture_problem, text_alone
from quant.vllm.arguments import engine_arguments
from tests.helpers import change_config, make_checkpoint, quantize, recipe

#: What config.json says → words of the reason; None: it is served, or not known not to be.
CONFIGS: dict[str, tuple[dict[str, Any], str | None]] = {
    "a class of its own": ({"architectures": ["Qwen3MoeForCausalLM"]}, None),
    "through transformers by name": ({"architectures": ["GPTNeoXForCausalLM"]}, None),
    "through transformers": ({"architectures": ["MinistralForCausalLM"]}, None),
    "through transformers, which had one": ({"architectures": ["Dots1ForCausalLM"]}, None),
    "the second is served": ({"architectures": ["MptForCausalLM", "LlamaForCausalLM"]}, None),
    "code of its own": ({"architectures": ["XForCausalLM"], "auto_map": {"AutoModel": "x.X"}}, None),
    "no class stated": ({}, None),
    "no class that writes": ({"architectures": ["XModel"]}, None),
    "not text": ({"architectures": [None, 3]}, None),
    "not a list": ({"architectures": "MptForCausalLM"}, None),
    "loads no file": ({"architectures": ["DbrxForCausalLM"]}, r"loads no file.*models/dbrx\.py"),
    "dropped": ({"architectures": ["MptForCausalLM"]}, "was in vLLM until 0.28.0"),
    "in the text part": ({"text_config": {"architectures": ["MptForCausalLM"]}}, "until 0.28.0"),
    "not compatible": ({"architectures": ["GPTNeoForCausalLM"]}, "attention is its own"),
    "unknown": ({"architectures": ["XForCausalLM"]}, "neither vLLM .* nor transformers"),
    "recurrent by keys": ({"architectures": ["BambaForCausalLM"], "mamba_d_state": 16}, "mamba_d_state"),
    "recurrent by kinds": (
        {"architectures": ["MiniMaxForCausalLM"], "layer_types": ["full_attention", "linear_attention"]},
        r"last with one was 0\.23\.0.*linear_attention",
    ),
    "a key that its loader of mixtures does not know": (
        {"architectures": ["AriaTextForCausalLM"], "moe_topk": 2},
        "num_experts_per_tok.*calls moe_topk",
    ),
    "encoder and decoder": (
        {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        "an encoder",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_reasons(name: str) -> None:
    config, words = CONFIGS[name]
    reason = architecture_problem(config)
    if words is None:
        assert reason is None
    else:
        assert re.search(words, str(reason))


def test_images_are_kept_out_where_vllm_would_stop_at_them() -> None:
    """Llama 3.2 Vision: served through transformers, whose processor counts no tokens of images."""
    config = {"architectures": ["MllamaForConditionalGeneration"], "vision_config": {"depth": 2}}
    assert architecture_problem(config) is None and text_alone(config)
    arguments = {a.name: a.value for a in engine_arguments(config)}
    assert arguments["limit-mm-per-prompt"] == '{"image": 0}'
    found = recommend("meta-llama/Llama-3.2-11B-Vision-Instruct", "L40S-48GB")
    assert found.commands[-1].endswith("""--limit-mm-per-prompt '{"image": 0}'""")
    for other in ("AyaVisionForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"):
        assert not text_alone(config | {"architectures": [other]})
    assert not text_alone({"architectures": ["MllamaForCausalLM"]})


def test_earlier_releases_have_what_they_had() -> None:
    config = {"architectures": ["MptForCausalLM"]}
    assert architecture_problem(config, "0.28.0") is None
    assert "0.28.0" in str(architecture_problem(config, "0.29.0"))
    assert architecture_problem({"architectures": ["DbrxForCausalLM"]}, "0.28.0") is None
    # of classes that came later nothing is known
    assert architecture_problem({"architectures": ["XForCausalLM"]}, "0.28.0") is None


def test_all_commands_say_the_same(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    change_config(source, architectures=["MptForCausalLM"])
    request = recipe(source, tmp_path / "out", group_size=32)
    with pytest.raises(Problems, match=r"until 0\.28\.0.*--target other"):
        plan_job(request)
    plan_job(recipe(source, tmp_path / "out", group_size=32, vllm_version="0.28.0"))
    assert [c.name for c in verify(source).checks if not c.passed] == ["model class"]
    assert verify(source, vllm_version="0.28.0").passed and verify(source, target="other").passed
    with pytest.raises(VerificationFailed, match=r"until 0\.28\.0"):
        plan(source, DeploymentRequest())
    nothing = recommend(str(source), "L40S-48GB")
    assert nothing.recommended is None and not any(p.fits for p in nothing.plans)
    with pytest.raises(NothingFits, match=r"L40S-48GB: MptForCausalLM was in vLLM until 0\.28\.0[^:;]*$"):
        nothing.check()
    assert recommend(str(source), "L40S-48GB", EngineRequest(vllm_version="0.28.0")).recommended


def test_what_is_made_for_a_release_is_served_by_it(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    change_config(source, architectures=["MptForCausalLM"])
    quantize(source, tmp_path / "out", group_size=32, vllm_version="0.28.0")
    assert verify(tmp_path / "out").passed and plan(tmp_path / "out", DeploymentRequest())
    assert not verify(tmp_path / "out", vllm_version="0.32").passed


def test_target_other_makes_it_and_plain_values_need_no_class(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    change_config(source, architectures=["MptForCausalLM"])
    quantize(source, tmp_path / "out", group_size=32, target="other")
    with pytest.raises(Problems, match=r"until 0\.28\.0.*--target other"):
        export(tmp_path / "out", tmp_path / "gptq", "gptq")
    export(tmp_path / "out", tmp_path / "plain", "plain")
    assert json.loads((tmp_path / "plain/config.json").read_text())["architectures"] == ["MptForCausalLM"]
