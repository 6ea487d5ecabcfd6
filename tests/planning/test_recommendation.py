"""The choice: what fits, what is precise, what a scenario wants, and what the commands say."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import quant
from quant.catalog import find_model, model_from_config
from quant.data import config_path, load_json
from quant.errors import NothingFits, Problems, QuantError, UsageError
from quant.hardware import named_gpu
from quant.planning import EngineRequest, Recommendation, get_optimized_config, plan, recommend, reload
from quant.planning.rule_of_thumb import rule_of_thumb
from quant.planning.scenarios import load_scenario, scenario_names
from quant.planning.speed import speed_bounds
from quant.units import GIB, parse_tokens
from quant.vllm.kernels import kernel_of
from tests.planning.tiny_models import TINY

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT.parent / "shared" / "data" / "vllm_memory_samples.yaml"
GB = 10**9
SMALL = model_from_config(TINY["gqa"], "small")


def by_scheme(found: Recommendation) -> dict[str, Any]:
    return {p.scheme: p for p in found.plans}


@pytest.mark.parametrize(
    ("model", "gpu", "count", "scheme", "method"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "L40S-48GB", 1, "none", None),
        ("Qwen/Qwen2.5-32B-Instruct", "L40S-48GB", 1, "w8a8-fp8", "fp8"),
        ("Qwen/Qwen2.5-32B-Instruct", "A6000", 1, "w8a16", "minmax"),
        ("meta-llama/Llama-3.1-70B-Instruct", "H100", 1, "w4a16", "yaqa"),
        ("meta-llama/Llama-3.1-70B-Instruct", "L40S-48GB", 4, "none", None),
        ("meta-llama/Llama-3.1-70B-Instruct", "L40S-48GB", 2, "w8a8-fp8", "fp8"),
        ("Qwen2.5-7B-Instruct-AWQ", "RTX 3060", 1, "none", None),
        ("Qwen/Qwen2.5-7B-Instruct", "RTX 3070 Ti Laptop", 1, "w4a16", "yaqa"),
    ],
)
def test_the_most_precise_scheme_that_fits_is_taken(
    model: str, gpu: str, count: int, scheme: str, method: str | None
) -> None:
    found = recommend(model, gpu, gpu_count=count, objective="quality")
    assert (found.recommended, found.method) == (scheme, method), found.reason
    chosen = by_scheme(found)[scheme]
    assert chosen.fits and chosen.meets
    better = [p for p in found.plans if sum(p.loss) < sum(chosen.loss)]
    assert not any(p.safe for p in better)


@pytest.mark.parametrize(
    ("model", "gpu", "count", "concurrency", "objective", "scheme"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "L40S-48GB", 1, 1, None, "w8a8-fp8"),
        ("meta-llama/Llama-3.1-8B-Instruct", "H100", 1, 16, None, "w8a8-fp8"),
        ("meta-llama/Llama-3.1-70B-Instruct", "H100", 4, 8, None, "w8a8-fp8"),
        # nothing within 1 % fits, nothing is gained
        ("meta-llama/Llama-3.1-70B-Instruct", "H100", 1, 1, None, "w4a16"),
        ("Qwen/Qwen2.5-0.5B", "H100", 1, 1, None, "none"),
        # with 64 at once operations count as well as bytes (arXiv 2411.02355), for one bytes alone
        ("meta-llama/Llama-3.1-8B-Instruct", "L40S-48GB", 1, 64, "throughput", "w8a8-fp8"),
        ("meta-llama/Llama-3.1-8B-Instruct", "H100", 1, 64, "throughput", "w8a8-fp8"),
        ("meta-llama/Llama-3.1-8B-Instruct", "L40S-48GB", 1, 1, "latency", "w4a16"),
    ],
)
def test_an_objective_takes_the_fastest_within_its_loss_and_16_bits_where_nothing_is_gained(
    model: str, gpu: str, count: int, concurrency: int, objective: str | None, scheme: str
) -> None:
    request = EngineRequest(context=2048, concurrency=concurrency)
    found = recommend(model, gpu, request, gpu_count=count, objective=objective)
    assert found.recommended == scheme, found.reason


def test_an_objective_that_is_none_is_refused_and_the_rule_of_thumb_has_none() -> None:
    with pytest.raises(UsageError, match="--objective"):
        recommend("microsoft/phi-2", "L40S", objective="best")
    with pytest.raises(UsageError, match="contradicts --objective"):
        recommend("microsoft/phi-2", "L40S", objective="quality", policy="rule-of-thumb")


def test_more_than_a_machine_is_said_in_machines_and_the_first_start_beside_the_next() -> None:
    found = recommend("deepseek-ai/DeepSeek-V3", "H100", gpu_count=8, scheme="none")
    assert "2 machines of 8" in found.reason and "--pipeline-parallel 2" in found.reason
    large = recommend("Qwen/Qwen3-14B", "L40S")
    assert large.plan is not None and large.plan.compile_bytes > 0
    assert any("first start" in note and "next" in note for note in large.notes)


def test_bounds_have_a_least_time_a_layer_and_prompts_of_fp8_files_run_in_fp8() -> None:
    spec, h200 = quant.find_model("deepseek-ai/DeepSeek-V3"), named_gpu("H200")
    request = EngineRequest(context=8192, tensor_parallel=8)
    bound = speed_bounds(spec, h200, quant.planning.plan(spec, [h200] * 8, None, request), 1)
    assert bound.decode_bound is not None and bound.decode_bound < 1 / (spec.layers * 2 * 8e-6)
    assert bound.prefill_bound is not None
    assert bound.prefill_bound > 1.5 * 8 * h200.rates["fp16"] / (2 * spec.active_parameters)


def test_schemes_that_the_gpu_does_not_compute_natively_are_refused_with_the_reason() -> None:
    plans = by_scheme(recommend("meta-llama/Llama-3.1-8B", "A100"))
    assert plans["w8a8-fp8"].plan is None and "8.0" in plans["w8a8-fp8"].why
    assert plans["w8a8-int8"].fits
    blackwell = by_scheme(recommend("meta-llama/Llama-3.1-8B", "B200"))
    assert blackwell["nvfp4"].fits and not blackwell["w8a8-int8"].fits
    volta = by_scheme(recommend("meta-llama/Llama-3.1-8B", "V100"))
    assert not volta["w4a16"].fits and volta["none"].fits


def test_concurrency_and_context_decide() -> None:
    one, many = (
        recommend("meta-llama/Llama-3.1-8B", "RTX 4090", EngineRequest(8192, c), objective="quality")
        for c in (1, 8)
    )
    assert one.recommended == "none" and many.recommended == "w8a8-fp8"
    assert by_scheme(many)["none"].fits and not by_scheme(many)["none"].meets


def test_the_margin_affects_only_the_choice() -> None:
    narrow = recommend("Qwen/Qwen2.5-32B", "RTX 4090", EngineRequest(context=2048))
    assert narrow.recommended == "w4a16" and not by_scheme(narrow)["w4a16"].safe and "margin" in narrow.reason
    wide, narrow = (
        recommend(
            "meta-llama/Llama-3.1-8B", "RTX 4090", EngineRequest(context=16384), margin=m, objective="quality"
        )
        for m in (0.0, 0.3)
    )
    assert [p.fits for p in wide.plans] == [p.fits for p in narrow.plans]
    assert wide.recommended == "none" and narrow.recommended == "w8a8-fp8"


def test_what_is_recommended_is_never_tight_and_smaller_requests_are_tried_before_nothing_fits() -> None:
    model, gpu = "meta-llama/Llama-3.1-8B", "RTX 4090"
    longest = by_scheme(recommend(model, gpu, EngineRequest(context=8192)))["none"].plan
    assert longest is not None
    edge = recommend(model, gpu, EngineRequest(context=longest.max_context), scheme="none")
    assert edge.plans[0].plan is not None and edge.request.max_num_seqs == 16 and edge.plans[0].plan.sure
    eager = by_scheme(recommend(model, gpu, EngineRequest(context=8192, enforce_eager=True)))["none"].plan
    assert eager is not None
    asked = EngineRequest(
        eager.max_context, kv_cache_dtype="bfloat16", max_num_seqs=eager.max_num_seqs, enforce_eager=True
    )
    tight = recommend(model, gpu, asked, scheme="none")
    assert tight.recommended is None and "tight" in tight.reason and tight.to_dict()["plans"][0]["tight"]
    laptop = recommend("Qwen/Qwen2.5-7B-Instruct", "RTX 3070 Ti Laptop")
    assert laptop.plan is not None and laptop.plan.sure
    assert f"--max-model-len {laptop.plan.context}" in laptop.commands[-1]


@pytest.mark.parametrize(
    ("model", "gpu", "count", "request_", "words"),
    [
        ("Llama-3.1-8B-Instruct", "L4", 1, EngineRequest(8192, 16), "--kv-cache-dtype fp8"),
        ("Llama-3.1-70B-Instruct", "H100", 4, EngineRequest(32768, 32), "--kv-cache-dtype fp8"),
        ("Qwen3-235B-A22B-FP8", "H100", 8, EngineRequest(8192), "--enable-expert-parallel"),
    ],
)
def test_an_fp8_cache_and_whole_experts_are_tried_before_nothing_fits(
    model: str, gpu: str, count: int, request_: EngineRequest, words: str
) -> None:
    found = recommend(model, gpu, request_, gpu_count=count)
    assert found.plan is not None and found.plan.sure and words in found.commands[-1]
    assert any(words in note for note in found.notes)


def test_recurrent_models_are_served_with_as_many_sequences_as_their_states_hold() -> None:
    found = recommend("nvidia/Qwen3.6-27B-NVFP4", "RTX 5090", EngineRequest(context=32768))
    assert found.plan is not None and found.plan.sure
    assert found.plan.max_num_seqs <= found.plan.kv_blocks
    assert f"--max-num-seqs {found.plan.max_num_seqs}" in found.commands[-1]


def test_commands_are_given_only_for_what_this_build_makes() -> None:
    request = EngineRequest(context=8192)
    found = recommend("meta-llama/Llama-3.1-70B", "H100", request, scheme="w8a8-fp8")
    assert found.recommended in ("w8a8-fp8", None)
    switched = recommend(
        "meta-llama/Llama-3.1-70B",
        "H100",
        replace(request, tensor_parallel=2),
        gpu_count=2,
        scheme="w8a8-fp8",
    )
    assert switched.method == "fp8" and any("--method fp8 --scheme w8a8-fp8" in c for c in switched.commands)
    smooth = recommend("meta-llama/Llama-3.1-8B", "A100", request, scheme="w8a8-int8")
    assert any("--outlier-suppression smooth_quant" in c for c in smooth.commands)


@pytest.mark.parametrize(
    ("scheme", "gpu", "options"),
    [
        ("w8a8-fp8", "H100", "--method fp8 --scheme w8a8-fp8"),
        ("w8a8-fp8-tensor", "H100", "--method fp8 --scheme w8a8-fp8-tensor"),
        ("fp8-block", "H100", "--method fp8 --scheme fp8-block"),
        ("w8a16-fp8", "A100", "--method fp8 --scheme w8a16-fp8"),
        ("w8a8-int8", "A100", "--method minmax --scheme w8a8-int8 --outlier-suppression smooth_quant"),
        ("nvfp4", "B200", "--effort balanced --scheme nvfp4"),
        ("mxfp4", "B200", "--effort balanced --scheme mxfp4"),
        ("mxfp8", "H100", "--method minmax --scheme mxfp8"),
    ],
)
def test_every_scheme_has_its_two_commands(scheme: str, gpu: str, options: str) -> None:
    found = recommend(SMALL, gpu, EngineRequest(context=4096), scheme=scheme, output_path="out")
    assert found.recommended == scheme, found.reason
    assert found.commands == (
        f"quant quantize --model-path small --output-path out {options}",
        "vllm serve out --max-model-len 4096",
    )


@pytest.mark.parametrize(
    ("scheme", "gpu"),
    [
        ("fp8-block", "V100"),
        ("w8a16-fp8", "V100"),
        ("mxfp4", "T4"),
        ("mxfp8", "V100"),
        ("w8a16-asym", "A100"),
    ],
)
def test_a_scheme_asked_for_by_name_is_refused_where_no_kernel_is(scheme: str, gpu: str) -> None:
    found = recommend(SMALL, gpu, EngineRequest(context=4096), scheme=scheme)
    assert found.recommended is None and "no kernel" in found.plans[0].why


def test_a_gpu_without_bfloat16_computes_gemma_in_fp32_and_nothing_of_it_quantized() -> None:
    """vLLM refuses it in fp16; weights take four bytes each then."""
    gemma = model_from_config({**TINY["gqa"], "model_type": "gemma2"}, "made")
    other = model_from_config(TINY["gqa"], "made")
    (wide, packed), (half, _) = (
        recommend(m, "T4", EngineRequest(context=4096)).plans[:2] for m in (gemma, other)
    )
    assert (wide.label, half.label) == ("fp32", "fp16")
    assert wide.plan is not None and half.plan is not None
    assert wide.plan.weights_bytes > 1.8 * half.plan.weights_bytes
    assert packed.plan is None and "do not take float32" in packed.why


def test_a_quantized_checkpoint_is_served_only_where_its_kernels_are() -> None:
    from quant.formats import Contents, FormatRegistry
    from quant.schemes import PRESETS
    from quant.vllm.layers import Linear

    linear = ("model.layers.0.mlp.down_proj", 256, 512)
    form = FormatRegistry.get("compressed-tensors")
    for scheme, refused, served in (
        ("w4a16", "V100", "T4"),
        ("w8a16-asym", "A100", "H100"),
        ("w8a16-asym", "B200", "H100"),
        ("w8a8-int8", "B200", "T4"),
        ("w8a8-fp8", "V100", "T4"),
        ("fp8-block", "V100", "H100"),
        ("nvfp4", "V100", "H100"),
        ("mxfp4", "T4", "A100"),
        ("mxfp8", "V100", "A100"),
    ):
        preset = PRESETS[scheme]
        config = form.config(Contents([Linear(*linear, preset.weights, preset.activations)], ["lm_head"]))
        spec = model_from_config({**TINY["gqa"], "quantization_config": config}, "made")
        no, yes = (
            recommend(spec, gpu, EngineRequest(context=4096), scheme="none") for gpu in (refused, served)
        )
        assert (
            no.recommended is None and f"no kernel for {kernel_of(preset)}, which the checkpoint" in no.reason
        )
        assert yes.commands == ("vllm serve made --max-model-len 4096",)
        half = recommend(replace(spec, dtype="float16"), served, EngineRequest(context=4096), scheme="none")
        assert ("--dtype bfloat16" in half.commands[0]) == scheme.startswith("mx")
    native = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    spec = model_from_config({**TINY["gqa"], "quantization_config": native}, "made")
    assert (
        recommend(spec, "V100", scheme="none").recommended is None
        and recommend(spec, "T4", scheme="none").recommended == "none"
    )


def test_ranks_that_would_cut_blocks_are_refused() -> None:
    for intermediate, why in ((11008, "blocks of 128"), (14336, "")):
        config = {
            **TINY["gqa"],
            "hidden_size": 4096,
            "intermediate_size": intermediate,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        }
        spec = model_from_config({**config, "head_dim": 128}, "m")
        request = EngineRequest(context=4096, tensor_parallel=4)
        (found,) = recommend(spec, "H100", request, scheme="fp8-block", gpu_count=4).plans
        assert found.fits == (not why) and why in found.why
        (found,) = recommend(
            model_from_config({**config, "head_dim": 64}, "m"),
            "H100",
            EngineRequest(context=4096, tensor_parallel=8),
            scheme="fp8-block",
            gpu_count=8,
        ).plans  # k_proj has 512 outputs: 64 for each rank
        named = why or "512 outputs over --tensor-parallel 8 do not divide into blocks of 128"
        assert not found.fits and named in found.why


def test_a_scheme_asked_for_by_name_may_run_as_packed_weights() -> None:
    request = EngineRequest(context=4096)
    for scheme, gpu in (("w8a8-fp8", "A100"), ("fp8-block", "T4"), ("nvfp4", "H100"), ("mxfp8", "L40S-48GB")):
        found = recommend(SMALL, gpu, request, scheme=scheme)
        assert found.recommended == scheme and "only as packed weights" in found.notes[-1]
        assert found.reason.startswith(f"{scheme} holds what was asked: ")
        speed, plain = found.plans[0].speed, recommend(SMALL, gpu, request, scheme="none").plans[0].speed
        assert speed and plain and speed.prefill_bound == plain.prefill_bound
    native, nvidia = (recommend(SMALL, "B200", request, scheme=s) for s in ("mxfp4", "nvfp4"))
    assert native.notes == () and native.plans[0].speed and nvidia.plans[0].speed
    assert native.plans[0].speed.prefill_bound == nvidia.plans[0].speed.prefill_bound
    assert "packed weights" not in " ".join(recommend(SMALL, "A100", request, scheme="w8a16-fp8").notes)


def test_microscaling_numbers_of_an_fp16_model_are_planned_and_served_in_bf16() -> None:
    half = replace(SMALL, dtype="float16")
    found = recommend(half, "B200", EngineRequest(context=4096), scheme="mxfp4", output_path="out")
    assert (
        found.commands[-1] == "vllm serve out --max-model-len 4096 --dtype bfloat16"
        and "bf16 alone" in found.notes[-1]
    )
    assert (
        recommend(half, "B200", EngineRequest(context=4096), scheme="nvfp4", output_path="out")
        .commands[-1]
        .endswith("4096")
    )


def test_the_commands_say_exactly_what_was_planned(tmp_path: Path) -> None:
    import json

    (tmp_path / "config.json").write_text(
        json.dumps(quant.find_model("Llama-3.1-70B") and _config("meta-llama/Llama-3.1-70B-Instruct"))
    )
    request = EngineRequest(
        context=8192, concurrency=2, tensor_parallel=2, max_num_seqs=64, kv_cache_dtype="fp8"
    )
    found = recommend(tmp_path, "L40S-48GB", request, gpu_count=2, scheme="w4a16", output_path="out dir")
    make, serve = found.commands
    assert shlex.split(make)[:2] == ["quant", "quantize"] and str(tmp_path) in make
    words = shlex.split(serve)
    assert words[:3] == ["vllm", "serve", "out dir"]
    for flag, value in (
        ("--max-model-len", "8192"),
        ("--tensor-parallel-size", "2"),
        ("--max-num-seqs", "64"),
        ("--kv-cache-dtype", "fp8"),
    ):
        assert words[words.index(flag) + 1] == value
    assert "--enforce-eager" not in words


def _config(name: str) -> dict[str, Any]:
    from quant.catalog import catalogue

    found: dict[str, Any] = catalogue()[name]["config"]
    return found


def test_a_smaller_group_is_chosen_where_ranks_would_cut_larger_ones() -> None:
    config = {**TINY["gqa"], "intermediate_size": 11008, "num_attention_heads": 8, "num_key_value_heads": 8}
    found = recommend(
        config, "L40S", EngineRequest(context=1024, tensor_parallel=4), gpu_count=4, scheme="w4a16"
    )
    assert found.group_size == 64 and "--group-size 64" in found.commands[0]


def test_nothing_fits_says_what_would_and_it_does() -> None:
    found = recommend("meta-llama/Llama-3.1-70B", "RTX 4090")
    assert found.recommended is None and found.commands == () and len(found.plans) >= 5
    with pytest.raises(NothingFits, match="--gpu-count 4"):
        found.check()
    assert by_scheme(recommend("meta-llama/Llama-3.1-70B", "RTX 4090", gpu_count=4))["w4a16"].fits


def test_4_bits_on_a_cpu_take_layers_of_multiples_of_32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of queries, keys and values as vLLM fuses them: `kernels/linear/mixed_precision/cpu.py`."""
    # those of the machine here may be few
    monkeypatch.setattr("quant.hardware.cpu_instructions", lambda *_: None)
    shapes = {"hidden_size": 160, "num_attention_heads": 8, "num_key_value_heads": 1}
    for size, taken in ((20, False), (32, True)):
        config = {**TINY["gqa"], **shapes, "head_dim": size}
        found = recommend(config, "cpu", gpu_memory=64 * 2**30, scheme="w4a16").plans[0]
        assert found.fits is taken
        assert ("qkv_proj has 200 outputs" in found.why and "multiples of 32" in found.why) is not taken


def test_a_machines_cpus_are_one_device() -> None:
    with pytest.raises(UsageError, match="--gpu-count is 4: --gpu cpu is the whole machine"):
        recommend("Qwen/Qwen3-0.6B", "cpu", gpu_count=4)
    with pytest.raises(Problems, match="planned as one device: leave --tensor-parallel"):
        recommend("Qwen/Qwen3-0.6B", "cpu", EngineRequest(tensor_parallel=2), gpu_memory=64 * 2**30)


def test_what_would_fit_a_model_too_large_for_a_cpu_is_not_more_gpus() -> None:
    found = recommend("meta-llama/Llama-3.1-70B", "cpu", gpu_memory=24 * 2**30)
    with pytest.raises(NothingFits, match="take a machine with more memory") as raised:
        found.check()
    assert "GPU" not in str(raised.value)


def test_several_gpus_in_a_name_are_as_many() -> None:
    named, counted = (
        recommend("meta-llama/Llama-3.1-70B", n, gpu_count=c) for n, c in (("2xH100", None), ("H100", 2))
    )
    assert named.to_dict() == counted.to_dict() and "--tensor-parallel-size 2" in named.commands[-1]


def test_a_quantized_checkpoint_is_quantized_again_only_to_fewer_bits() -> None:
    plans = by_scheme(recommend("Qwen2.5-7B-Instruct-AWQ", "L40S"))
    assert plans["none"].fits and "already quantized (awq) to 4 bits" in plans["w4a16"].why
    eight = recommend("Qwen2.5-32B-Instruct-FP8", "RTX 4090", EngineRequest(context=2048))
    plans = by_scheme(eight)
    assert not plans["none"].fits and "to 8 bits: as many or more gain no room" in plans["w8a8-fp8"].why
    assert plans["w4a16"].fits and eight.recommended == "w4a16"
    plain = by_scheme(recommend("Qwen2.5-32B-Instruct", "RTX 4090", EngineRequest(context=2048)))
    assert plans["w4a16"].to_dict()["weights_bytes"] == plain["w4a16"].to_dict()["weights_bytes"]
    unread = by_scheme(recommend("Qwen2.5-7B-Instruct-bnb-4bit", "L40S"))
    assert "which is not read here" in unread["w4a16"].why


def test_mixed_gpus_are_planned_by_the_smallest() -> None:
    found = recommend(
        "meta-llama/Llama-3.1-8B",
        [named_gpu("H100"), named_gpu("RTX 4090")],
        EngineRequest(tensor_parallel=2),
    )
    assert found.plan is not None and found.plan.total_bytes == named_gpu("RTX 4090").total_bytes
    assert any("differ" in n for n in found.notes)


def test_held_memory_lowers_the_share_that_is_asked_for() -> None:
    busy = replace(named_gpu("L40S"), free_bytes=20 * 2**30)
    found = recommend("Qwen/Qwen2.5-7B", busy)
    assert found.plan is not None and found.plan.requested_bytes <= busy.free_bytes
    assert "--gpu-memory-utilization 0.45" in found.commands[-1]


def test_the_json_has_the_contracts_keys_also_when_nothing_fits() -> None:
    needed = {
        "scheme", "fits", "why", "weights_bytes", "kv_bytes_per_token", "kv_cache_bytes", "kv_tokens",
        "max_context", "max_concurrency",
        "activation_bytes", "cuda_graph_bytes", "other_bytes",
    }  # fmt: skip
    for gpu in ("L40S", "RTX 3060"):
        value = recommend("meta-llama/Llama-3.1-70B", gpu).to_dict()
        assert {"gpu", "model", "recommended", "plans"} <= set(value)
        assert value["plans"] and all(needed <= set(p) for p in value["plans"])
    assert value["recommended"] is None
    kept = recommend("meta-llama/Llama-3.1-8B", "L40S").to_dict()["recommended"]
    assert {"scheme", "method", "reason", "commands"} <= set(kept)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"policy": "astrology"}, UsageError, "--policy"),
        ({"policy": "rule-of-thumb", "scheme": "w4a16"}, UsageError, "contradicts --scheme"),
        ({"policy": "rule-of-thumb", "scenario": "chat"}, UsageError, "contradicts --scenario"),
        ({"scenario": "chatt"}, UsageError, "chat"),
        ({"scheme": "w4a61"}, UsageError, "w4a16"),
        ({"gpus": "L40X"}, UsageError, "L40"),
        ({"gpu_memory": 10**30}, UsageError, "--gpu-memory"),
        ({"gpu_count": 0}, UsageError, "--gpu-count"),
        ({"margin": 1.0}, UsageError, "margin"),
        ({"request": EngineRequest(tensor_parallel=2)}, Problems, "needs 2 GPUs"),
    ],
)
def test_bad_requests_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        recommend("meta-llama/Llama-3.1-8B", **{"gpus": "L40S", **options})


# -- scenarios -----------------------------------------------------------------------------------------------


def test_the_five_scenarios_and_seven_profiles_are_there() -> None:
    assert scenario_names() == ["chat", "code", "high-throughput", "low-latency", "multi-model"]
    assert len(scenario_names(profiles=True)) == 12


@pytest.mark.parametrize("name", [n for n in scenario_names(profiles=True) if n.startswith("l40s-")])
def test_every_profile_fits_what_it_was_written_for(name: str) -> None:
    profile = load_scenario(name)
    example = profile.example
    found = recommend(
        example["model"],
        example["gpu"],
        gpu_count=example["gpu_count"],
        scenario=name,
        scheme=example["scheme"],
    )
    assert found.recommended == example["scheme"], found.reason
    assert by_scheme(found)[example["scheme"]].safe


@pytest.mark.parametrize("name", scenario_names())
@pytest.mark.parametrize(
    "model", ["Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-14B-Instruct", "meta-llama/Llama-3.1-70B-Instruct"]
)
def test_every_scenario_serves_small_medium_and_large_models_on_large_gpus(name: str, model: str) -> None:
    found = recommend(model, "H200", gpu_count=2, scenario=name)
    assert found.recommended is not None, found.reason


def test_a_latency_scenario_takes_the_fewest_bytes_and_throughput_the_batch() -> None:
    latency = recommend("meta-llama/Llama-3.1-8B", "L40S", scenario="low-latency")
    bounds = {
        p.scheme: p.speed.decode_bound for p in latency.plans if p.safe and p.speed and p.speed.decode_bound
    }
    assert latency.recommended == max(bounds, key=lambda s: bounds[s]) == "w4a16"
    assert recommend("meta-llama/Llama-3.1-8B", "L40S", scenario="chat").recommended == "none"


def test_what_the_user_asks_wins_over_the_scenario() -> None:
    found = recommend("meta-llama/Llama-3.1-8B", "L40S", EngineRequest(context=2048), scenario="code")
    assert found.request.context == 2048 and found.request.concurrency == 4


def test_an_fp8_cache_is_not_asked_of_a_gpu_without_fp8() -> None:
    assert (
        recommend("meta-llama/Llama-3.1-8B", "A100", scenario="high-throughput").request.kv_cache_dtype
        == "auto"
    )
    assert (
        recommend("meta-llama/Llama-3.1-8B", "L40S", scenario="high-throughput").request.kv_cache_dtype
        == "fp8"
    )


def test_a_key_that_nothing_reads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "scenarios"
    folder.mkdir()
    (folder / "mine.yaml").write_text("title: mine\ndefaults: {contxt: 5}\n")
    monkeypatch.setattr("quant.planning.scenarios.config_path", lambda name: tmp_path / name)
    with pytest.raises(UsageError, match="contxt"):
        load_scenario("mine")


def test_engines_follow_the_need() -> None:
    assert recommend("Qwen/Qwen2.5-7B", "L40S").engine == "vLLM"
    assert recommend("Qwen/Qwen2.5-7B", "cpu", gpu_memory=64 * 2**30).engine == "llama.cpp / Ollama"
    assert recommend("meta-llama/Llama-3.1-70B", "RTX 3060").engine == "llama.cpp / Ollama"
    found = recommend("Qwen/Qwen2.5-7B", "H100", scenario="low-latency")
    fast = {e.name: e for e in found.engines}
    # what it reads is another layout than the one that is recommended
    assert fast["TensorRT-LLM"].suits and "--scheme fp8-block --format fp8" in fast["TensorRT-LLM"].why
    assert found.engine == "vLLM" and not fast["SGLang"].suits  # one request at a time


@pytest.mark.parametrize(
    ("model", "gpu", "sglang", "tensorrt"),
    [
        ("meta-llama/Llama-3.1-70B-Instruct", "2xH100", "reads w8a8-fp8", "FP8 blocks"),
        ("Qwen/Qwen2.5-7B", "MI300X", "reads w8a8-fp8", "reads no w8a8-fp8"),
        ("Qwen/Qwen2.5-32B-Instruct", "L40S", None, None),
    ],
)
def test_what_an_engine_reads_decides_whether_it_is_named(
    model: str, gpu: str, sglang: str | None, tensorrt: str | None
) -> None:
    found = recommend(model, gpu, scenario="high-throughput")
    named = {e.name: e for e in found.engines}
    if sglang is None:
        assert found.recommended is None and not named["SGLang"].suits and named["llama.cpp / Ollama"].suits
        return
    assert named["vLLM"].suits and named["SGLang"].suits and sglang in named["SGLang"].why
    assert not named["TensorRT-LLM"].suits and str(tensorrt) in named["TensorRT-LLM"].why


def test_programs_get_engine_arguments_and_a_reload_that_looks_again() -> None:
    config = get_optimized_config("meta-llama/Llama-3.1-8B-Instruct", "chat", "L40S-48GB")
    assert (
        config["max_model_len"] == 8192 and config["tensor_parallel_size"] == 1 and config["scheme"] == "none"
    )
    with pytest.raises(NothingFits):
        get_optimized_config("meta-llama/Llama-3.1-70B-Instruct", "chat", "RTX 3060")
    released = []
    found = reload("meta-llama/Llama-3.1-8B", lambda: released.append(True), gpus="L40S")
    assert released == [True] and found.recommended == "w8a8-fp8"
    assert quant.recommend is recommend and quant.get_optimized_config is get_optimized_config


def test_speed_bounds_are_bytes_over_bandwidth() -> None:
    spec, gpu = quant.find_model("meta-llama/Llama-3.1-8B"), named_gpu("H100")
    p = quant.planning.plan(spec, [gpu], None, EngineRequest(context=1024))
    bound = speed_bounds(spec, gpu, p, 1)
    read = 2 * (spec.parameters - spec.by_role["embedding"]) + 131072 * 512
    assert bound.decode_bound == pytest.approx(3350e9 / read)
    assert bound.prefill_bound == pytest.approx(989e12 / (2 * spec.active_parameters))
    moe = quant.find_model("Qwen/Qwen3-30B-A3B")
    sparse = speed_bounds(moe, gpu, quant.planning.plan(moe, [gpu], None, EngineRequest(context=1024)), 1)
    assert (
        sparse.decode_bound is not None
        and bound.decode_bound is not None
        and sparse.decode_bound > 1.5 * bound.decode_bound
    )


# -- the rule of thumb ---------------------------------------------------------------------------------------


def test_the_worked_example_of_the_original_design() -> None:
    chosen, plans = rule_of_thumb(int(5.75 * GB), 8 * GB)
    needed = {p.scheme: p.needed_bytes / GB for p in plans}
    for scheme, value in (("none", 7.47), ("fp16", 3.45), ("int8", 1.66), ("int4", 0.79)):
        assert needed[scheme] == pytest.approx(value, abs=0.02), scheme
    assert {p.scheme: p.fits for p in plans} == {"none": False, "fp16": True, "int8": True, "int4": True}
    assert chosen == "fp16" and "7.20" in plans[0].why


@pytest.mark.parametrize(
    ("total", "allowed"), [(16, "none"), (15.9, "fp16"), (7.9, "int8"), (5.9, "int4"), (2.9, None)]
)
def test_the_minimum_memory_table_applies_to_the_total(total: float, allowed: str | None) -> None:
    assert rule_of_thumb(10**6, int(total * GB), 2 * GB)[0] == allowed


def test_every_expected_loss_names_where_it_was_read_or_says_that_it_was_not() -> None:
    schemes = load_json("quality.json")["schemes"]
    for name, row in schemes.items():
        low, high = row["loss_percent"]
        assert 0 <= low <= high <= 10, name
        assert name == "none" or re.search("https://|model cards? |^unchecked", row["source"]), name
    assert [name for name, row in schemes.items() if row["source"].startswith("unchecked")] == ["w4a16-asym"]
    told = {
        p["scheme"]: p["expected_loss_source"]
        for p in recommend("meta-llama/Llama-3.1-8B", "L40S").to_dict()["plans"]
    }
    assert told["w8a8-fp8"] == schemes["w8a8-fp8"]["source"]


def test_the_policy_is_reachable_and_needs_no_plan() -> None:
    found = recommend("meta-llama/Llama-3.1-8B", "RTX 4090", policy="rule-of-thumb")
    assert found.policy == "rule-of-thumb" and found.recommended == "none" and "16-bit" not in found.reason
    assert len(found.to_dict()["plans"]) == 4


def test_the_worked_example_through_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.planning.recommendation.stored_bytes", lambda spec: int(5.75 * GB))
    found = recommend("microsoft/phi-2", "RTX 3070", gpu_memory=8 * GB, policy="rule-of-thumb")
    assert found.recommended == "fp16" and "7.20" in found.to_dict()["plans"][0]["why"]


@pytest.mark.parametrize("size", [0, -5, 10**30])
def test_the_rule_refuses_sizes_that_are_none(size: int) -> None:
    with pytest.raises(UsageError):
        rule_of_thumb(size, 8 * GB)


# -- measured starts -----------------------------------------------------------------------------------------


def benchmark() -> ModuleType:
    described = importlib.util.spec_from_file_location(
        "planner_accuracy", ROOT / "benchmarks" / "planner_accuracy.py"
    )
    assert described and described.loader
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


@pytest.mark.skipif(not SAMPLES.is_file(), reason="../shared is not there")
def test_measured_starts_are_reproduced_within_the_limits() -> None:
    program = benchmark()
    files = sorted(SAMPLES.parent.glob("vllm_memory_samples*.yaml"))
    samples = program.read_samples(files, sorted(SAMPLES.parent.glob("model_configs_*.json")))
    figures = program.summary([program.judge(s) for s in samples])
    assert figures["planned"] == figures["samples"]
    for kind in ("unquantized", "quantized"):
        assert figures[f"weights_{kind}"]["within"] >= 0.9 * figures[f"weights_{kind}"]["starts"]
    assert figures["kv_bytes_per_token"]["exact"] == figures["kv_bytes_per_token"]["starts"]
    assert figures["non_kv_gib"]["worst_model_median"] <= 0.5 and figures["non_kv_gib"]["p90"] <= 1.5
    assert figures["kv_cache_gib"]["median"] <= 0.5 and figures["kv_cache_gib"]["p90"] <= 2
    assert figures["longest_context"]["median"] <= 0.05
    started, failed, tight = (figures[k] for k in ("verdicts_started", "verdicts_failed", "tight"))
    assert started["right"] >= 0.95 * started["of"] and failed["right"] >= 0.8 * failed["of"]
    assert tight["starts"] <= 0.15 * tight["of"]
    assert failed["right"] > 2 * figures["verdicts_failed_naive"]["right"]


def test_memory_alone_is_planned_for_and_nothing_is_chosen_that_some_gpu_lacks() -> None:
    found = recommend("meta-llama/Llama-3.1-70B", gpu_memory=24 * GIB, gpu_count=4)
    plans = {p.scheme: p for p in found.plans}
    assert found.recommended == "w8a16" and plans["w8a8-fp8"].meets
    assert "takes compute capability 8.9 on (L4" in plans["w8a8-fp8"].why
    assert not plans["w4a16"].condition and plans["nvfp4"].condition
    named = recommend("meta-llama/Llama-3.1-70B", "L4", gpu_memory=24 * GIB, gpu_count=4)
    same = next(p for p in named.plans if p.scheme == "w4a16")
    assert plans["w4a16"].plan and same.plan and plans["w4a16"].plan.weights_bytes == same.plan.weights_bytes
    assert plans["w4a16"].bound("decode_bound") == 0 and "faster" not in found.reason
    assert any("name the GPU" in note for note in found.notes)
    assert recommend("openai/gpt-oss-20b", gpu_memory=24 * GIB, scheme="w8a8-fp8").recommended is None


def test_an_fp8_cache_is_tried_before_four_bits_where_quality_counts() -> None:
    request = EngineRequest(context=8192, concurrency=4)
    found = recommend("Llama-3.3-70B-Instruct", "2xL40S", request)
    assert found.recommended == "w8a8-fp8" and found.request.kv_cache_dtype == "fp8"
    assert {p.plan.kv_cache_dtype for p in found.plans if p.plan} == {"fp8"}
    assert any("in 16 bits nothing within 1 % of expected loss surely fits" in n for n in found.notes)
    own = recommend("Llama-3.3-70B-Instruct", "2xL40S", replace(request, kv_cache_dtype="fp8"))
    assert found.plan == own.plan
    fast = recommend("Llama-3.3-70B-Instruct", "2xL40S", request, objective="latency")
    assert fast.recommended == "w4a16" and fast.request.kv_cache_dtype == "auto"


def test_groups_that_all_gpus_cannot_cut_are_planned_in_stages() -> None:
    """GLM-4.5-Air's dense MLP has 10,944 inputs: 2 GPUs hold whole groups of 32 of it, 4 none of any size."""
    found = recommend("zai-org/GLM-4.5-Air", "4x4090", EngineRequest(context=16384))
    assert found.recommended == "w4a16" and found.plan is not None
    assert (found.plan.tensor_parallel, found.plan.pipeline_parallel) == (2, 2)
    assert any("2 stages of 2 GPUs" in note for note in found.notes)
    asked = recommend("zai-org/GLM-4.5-Air", "4x4090", EngineRequest(context=16384, tensor_parallel=4))
    assert asked.recommended is None
    assert "groups of 128: quantize with --group-size -1," in by_scheme(asked)["w4a16"].why


def test_several_machines_hold_stages_and_that_is_said() -> None:
    found = recommend("deepseek-ai/DeepSeek-V3", "16xA100-80GB")
    assert found.recommended == "none" and found.plan is not None
    assert (found.plan.tensor_parallel, found.plan.pipeline_parallel) == (8, 2)
    assert any("2 machines of 8 GPUs" in note and "Ray" in note for note in found.notes)
    assert any("Marlin, W8A16" in note for note in found.notes)


def test_the_route_of_a_checkpoint_in_fp8_on_a_gpu_without_it_is_said() -> None:
    small = recommend("deepseek-ai/DeepSeek-V3", "8xA100-80GB")
    assert small.recommended == "w4a16" and "quant quantize" in small.commands[1]
    assert any("dequantized as they are read" in note for note in small.notes)
    hopper = recommend("Qwen/Qwen3-32B-FP8", "H100")
    assert hopper.recommended == "none" and not any("Marlin" in note for note in hopper.notes)


@pytest.mark.parametrize(
    ("model", "gpu", "why"),
    [
        ("openai/gpt-oss-20b", "T4", "mxfp4 checkpoints from compute capability 8.0"),
        ("deepseek-ai/DeepSeek-V3.2", "8xA100", "capabilities 9.x, 10.x, 12.x alone"),
        ("zai-org/GLM-5", "8xL40S", "capabilities 9.x, 10.x, 12.x alone"),
    ],
)
def test_a_model_without_kernels_on_a_gpu_is_refused_there(model: str, gpu: str, why: str) -> None:
    found = recommend(model, gpu)
    assert found.recommended is None and why in by_scheme(found)["none"].why


@pytest.mark.parametrize(
    ("odd", "said"),
    [({"layer_types": ["conv", "full_attention"] * 2}, "conv"), ({"mamba_d_state": 16}, "mamba_d_state")],
)
def test_layers_of_unknown_kinds_get_no_sure_verdict(odd: dict[str, Any], said: str) -> None:
    plain = {**TINY["gqa"], "model_type": "novel"}
    assert recommend(model_from_config(plain), "L4", EngineRequest(context=128)).recommended is not None
    found = recommend(model_from_config(plain | odd), "L4", EngineRequest(context=128))
    plan = by_scheme(found)["none"].plan
    assert found.recommended is None and plan is not None and not plan.sure and said in plan.tight
    assert said in found.reason and any("no verdict is sure" in note for note in found.notes)


def test_sixteen_bits_are_called_what_the_gpu_serves_them_in() -> None:
    labels = {gpu: by_scheme(recommend("Llama-3.2-1B", gpu))["none"].label for gpu in ("T4", "V100", "A100")}
    assert labels == {"T4": "fp16", "V100": "fp16", "A100": "bf16"}


def test_a_context_in_thousands_is_the_models_own_where_that_is_meant() -> None:
    own = recommend("Qwen2.5-VL-7B-Instruct", "H100", EngineRequest(context=parse_tokens("128k")))
    assert own.request.context == 128_000
    assert (
        recommend("Qwen2.5-7B", "H100", EngineRequest(context=parse_tokens("32k"))).request.context == 32768
    )
    with pytest.raises(QuantError, match="positions for 40960"):
        recommend("Qwen3-8B", "H100", EngineRequest(context=parse_tokens("128k")))


@pytest.mark.parametrize(
    "name",
    [
        "catalog",
        "data",
        "errors",
        "hardware",
        "parts",
        "schemes",
        "units",
        *(f"models.{m}" for m in ("linears", "roles", "support")),
        *(f"vllm.{m}" for m in ("releases", "kernels", "layers", "cache", "config")),
        *(f"planning.{m}" for m in ("recommendation", "rule_of_thumb", "storage")),
    ],
)
def test_the_examples_in_the_docstrings_run(name: str) -> None:
    module = importlib.import_module(f"quant.{name}")
    assert doctest.testmod(module).failed == 0


def test_the_scenarios_folder_is_found_where_the_data_is() -> None:
    assert config_path("scenarios/chat.yaml").is_file()


@pytest.mark.parametrize(
    ("objective", "scheme", "cache"), [("throughput", "w8a8-fp8", "fp8"), ("quality", "w4a16", "auto")]
)
def test_throughput_takes_an_fp8_cache_where_a_faster_scheme_then_holds_what_was_asked(
    objective: str, scheme: str, cache: str
) -> None:
    """70B on two H100 for 64 streams: in 16 bits the cache leaves room for 4-bit weights alone, which compute
    in 16 bits; with the cache in FP8 the weights may be, and many streams are bound by computing."""
    request = EngineRequest(context=4096, concurrency=64)
    found = recommend("Llama-3.3-70B-Instruct", "2xH100", request, objective=objective)
    assert (found.recommended, found.request.kv_cache_dtype) == (scheme, cache)
    said = any("with the cache in 16 bits nothing as fast surely fits" in note for note in found.notes)
    assert said is (objective == "throughput")
    assert ("--kv-cache-dtype fp8" in found.commands[-1]) is (cache == "fp8")
    asked = replace(request, kv_cache_dtype="bfloat16")  # what was asked for stays
    found = recommend("Llama-3.3-70B-Instruct", "2xH100", asked, objective="throughput")
    assert found.recommended == "w4a16" and found.request.kv_cache_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("gpu", "said"), [("V100S", True), ("V100-32GB", True), ("T4", False), ("cpu", False)]
)
def test_a_gpu_that_the_usual_builds_have_no_code_for_says_so(gpu: str, said: bool) -> None:
    found = recommend("Qwen2.5-1.5B-Instruct", gpu, EngineRequest(context=2048))
    assert found.commands and any("built with CUDA 12" in note for note in found.notes) is said


def test_gpus_that_a_plan_leaves_unused_are_told() -> None:
    found = recommend("Qwen3-8B", "3xL4", EngineRequest(context=4096))
    assert found.request.tensor_parallel == 2
    assert any("1 of 3 GPUs stays unused: the layers divide over 2 at most" in note for note in found.notes)
    asked = recommend("Qwen3-8B", "5xL4", EngineRequest(context=4096, pipeline_parallel=2))
    (said,) = [note for note in asked.notes if "unused" in note]
    assert said == "1 of 5 GPUs stays unused: they do not divide into 2 stages"
    stages = recommend("Qwen3-8B", "3xL4", EngineRequest(context=4096, pipeline_parallel=3))
    assert stages.recommended is not None and not any("unused" in note for note in stages.notes)


def test_a_gpu_that_shares_the_hosts_memory_is_asked_for_less_of_it() -> None:
    found = recommend("Qwen/Qwen3-30B-A3B", "DGX Spark")
    assert "--gpu-memory-utilization 0.85" in found.commands[-1]
    assert any("shares its memory with the host: utilization 0.85 instead of 0.92" in n for n in found.notes)
    asked = recommend("Qwen/Qwen3-30B-A3B", "DGX Spark", EngineRequest(gpu_memory_utilization=0.9))
    assert "--gpu-memory-utilization 0.9" in asked.commands[-1]
    one, two = (
        plan(
            find_model("Qwen/Qwen3-30B-A3B"),
            [named_gpu("DGX Spark")] * n,
            None,
            EngineRequest(context=8192, tensor_parallel=n),
        )
        for n in (1, 2)
    )
    assert two.other_bytes - one.other_bytes == int(6.5 * 2**30)


@pytest.mark.parametrize("gpu", ["RTX-4060", "RTX-5060-Ti-8GB"])
def test_a_small_gpu_serves_without_graphs_what_fits_no_other_way(gpu: str) -> None:
    """Qwen3-8B in 4 bits starts on 8 GB cards; the first start's compilation alone takes more than a GiB."""
    found = recommend("Qwen/Qwen3-8B", gpu)
    assert found.recommended == "w4a16" and found.plan is not None and found.plan.sure
    assert found.commands[-1].endswith("--enforce-eager") and found.engine == "vLLM"
    assert any(n.startswith("planned with --enforce-eager") for n in found.notes)
    asked = recommend("Qwen/Qwen3-8B", gpu, EngineRequest(context=40960))
    assert asked.recommended is None  # what was asked for is not shortened


def test_graphs_are_kept_where_anything_else_helps() -> None:
    for model, gpu in (("Qwen/Qwen3-4B", "RTX-4060"), ("google/gemma-3-27b-it", "RTX-4090")):
        assert "--enforce-eager" not in recommend(model, gpu).commands[-1]


def test_a_checkpoint_that_can_only_be_served_as_it_is_holds_what_was_asked() -> None:
    alone = recommend("openai/gpt-oss-20b", "RTX-4090")
    assert alone.reason.startswith("as it is (mxfp4) holds what was asked: ")
    assert recommend("meta-llama/Llama-3.1-8B", "L40S-48GB").reason.startswith("w8a8-fp8 is the fastest")
