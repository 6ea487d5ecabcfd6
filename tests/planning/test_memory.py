"""The accounting: vLLM's rules worked by hand, releases against one another, refusals with their remedies."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest

from quant.catalog import find_model, model_from_config
from quant.errors import Problems, UsageError
from quant.hardware import Gpu, cpu_device, named_gpu
from quant.planning import EngineRequest, plan
from quant.planning.profile import graph_sizes
from quant.planning.storage import stage_layers
from quant.schemes import PRESETS, UNQUANTIZED, Scheme
from quant.vllm.releases import parse_version, rules_for
from tests.planning.tiny_models import TINY

GIB = 2**30
H100 = named_gpu("H100")
L40S = named_gpu("L40S")
LLAMA8 = find_model("meta-llama/Llama-3.1-8B-Instruct")
LLAMA70 = find_model("meta-llama/Llama-3.1-70B-Instruct")


def test_the_parts_add_up_to_the_requested_memory() -> None:
    p = plan(LLAMA8, [L40S], None, EngineRequest(context=8192))
    parts = p.weights_bytes + p.activation_bytes + p.cuda_graph_bytes + p.other_bytes + p.kv_cache_bytes
    assert parts == p.requested_bytes == ceil(L40S.total_bytes * 0.92)
    assert p.fits and p.kv_blocks == p.kv_cache_bytes // (16 * p.kv_bytes_per_token)


def test_no_scheme_and_the_unquantized_one_are_the_checkpoint_as_it_is() -> None:
    request = EngineRequest(context=4096)
    for name in ("meta-llama/Llama-3.1-8B", "openai/gpt-oss-20b"):
        spec = find_model(name)
        assert plan(spec, [H100], None, request) == plan(spec, [H100], UNQUANTIZED, request)


def test_weights_are_every_parameter_once_with_padding_and_rotary_table() -> None:
    p = plan(LLAMA8, [H100], None, EngineRequest(context=8192))
    # 128256 rows are a multiple of 64 already
    assert p.weights_bytes == 2 * LLAMA8.parameters + 131072 * 128 * 2
    phi = find_model("ibm-granite/granite-3.1-2b-instruct")  # 49155 rows are padded to 49216
    padded = plan(phi, [H100], None, EngineRequest(context=8192)).weights_bytes
    assert padded == 2 * (phi.parameters + 61 * 2048) + 131072 * 64 * 2


@pytest.mark.parametrize(
    ("name", "ranks", "dtype", "expected"),
    [
        ("meta-llama/Llama-3.1-8B", 1, "auto", 32 * 2 * 8 * 128 * 2),
        ("meta-llama/Llama-3.1-8B", 4, "auto", 32 * 2 * 2 * 128 * 2),
        ("meta-llama/Llama-3.1-8B", 16, "auto", 32 * 2 * 1 * 128 * 2),  # fewer KV heads than ranks: repeated
        ("meta-llama/Llama-3.1-8B", 1, "fp8", 32 * 2 * 8 * 128),
        ("meta-llama/Llama-2-7b-hf", 1, "auto", 32 * 2 * 32 * 128 * 2),
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", 1, "auto", 27 * 576 * 2),
        ("deepseek-ai/DeepSeek-V3", 8, "auto", 61 * 576 * 2),  # one latent, not cut by tensor parallelism
        # 52 sliding and 10 full, padded to groups of 10
        ("google/gemma-3-27b-it", 1, "auto", 70 * 2 * 16 * 128 * 2),
        ("google/gemma-3-12b-it", 1, "auto", 48 * 2 * 8 * 256 * 2),
        ("openai/gpt-oss-120b", 1, "auto", 36 * 2 * 8 * 64 * 2),
    ],
)
def test_kv_bytes_per_token(name: str, ranks: int, dtype: str, expected: int) -> None:
    gpus = [replace(H100, total_bytes=2**43, free_bytes=2**43)] * ranks
    assert (
        plan(
            find_model(name),
            gpus,
            None,
            EngineRequest(context=4096, tensor_parallel=ranks, kv_cache_dtype=dtype),
        ).kv_bytes_per_token
        == expected
    )


def test_before_latent_caching_every_head_was_cached_whole() -> None:
    spec = find_model("deepseek-ai/DeepSeek-V2-Lite-Chat")
    old = plan(spec, [H100], None, EngineRequest(context=4096, vllm_version="0.6.6")).kv_bytes_per_token
    padded = plan(spec, [H100], None, EngineRequest(context=4096, vllm_version="0.7.3")).kv_bytes_per_token
    assert old == 27 * 16 * 2 * 256 * 2
    assert padded == 27 * 640 * 2  # 1152 bytes aligned to 256


def test_a_window_bounds_what_a_long_request_needs() -> None:
    spec = find_model("google/gemma-3-27b-it")
    request = EngineRequest(context=131072, max_num_batched_tokens=2048)
    p = plan(spec, [replace(H100, total_bytes=2**42, free_bytes=2**42)], None, request)
    assert p.layout is not None
    sliding = ceil((1023 + 2 * 2048) / 16) + 1
    assert p.layout.blocks_for(131072, 2 * 2048) == 6 * sliding + 8192
    without = plan(
        spec,
        [replace(H100, total_bytes=2**42, free_bytes=2**42)],
        None,
        replace(request, vllm_version="0.8.5"),
    )
    assert without.layout is not None and len(without.layout.groups) == 1


def test_recurrent_layers_enlarge_the_block_until_a_page_holds_a_state() -> None:
    p = plan(
        find_model("Qwen/Qwen3-Next-80B-A3B-Instruct"),
        [replace(H100, total_bytes=2**42, free_bytes=2**42)],
        None,
        EngineRequest(context=4096),
    )
    assert p.layout is not None
    state = (2 * 2048 + 4096) * 3 * 2 + 32 * 128 * 128 * 2
    assert p.block_tokens * 2048 >= state > (p.block_tokens - 16) * 2048
    assert {g.kind for g in p.layout.groups} == {"state", "full"}


@pytest.mark.parametrize(("version", "share"), [("0.19", 0.9), ("0.32", 0.92)])
def test_the_default_share_follows_the_release(version: str, share: float) -> None:
    assert (
        plan(LLAMA8, [H100], None, EngineRequest(context=4096, vllm_version=version)).gpu_memory_utilization
        == share
    )


def test_the_sampler_dominates_where_it_sorted_and_the_forward_pass_where_it_does_not() -> None:
    request = EngineRequest(context=4096, max_num_seqs=1024, max_num_batched_tokens=8192)
    sorting, kernel, newest = (
        plan(LLAMA8, [H100], None, replace(request, vllm_version=v)) for v in ("0.11", "0.19", "0.32")
    )
    assert sorting.activation_bytes == 1024 * 128256 * 39
    assert kernel.activation_bytes == 1024 * 128256 * 16
    warm = 8192 * (3 * 14336 + 4 * 4096) * 2
    assert newest.activation_bytes - newest.compile_bytes == warm


def test_graphs_come_on_top_before_and_out_of_the_cache_since_0_20() -> None:
    before = plan(LLAMA8, [H100], None, EngineRequest(context=4096, vllm_version="0.19"))
    eager = plan(LLAMA8, [H100], None, EngineRequest(context=4096, vllm_version="0.19", enforce_eager=True))
    assert (
        before.kv_cache_bytes == eager.kv_cache_bytes
        and before.cuda_graph_bytes > 0 == eager.cuda_graph_bytes
    )
    after = plan(LLAMA8, [H100], None, EngineRequest(context=4096))
    lazy = plan(LLAMA8, [H100], None, EngineRequest(context=4096, enforce_eager=True))
    assert lazy.kv_cache_bytes - after.kv_cache_bytes == after.cuda_graph_bytes + after.compile_bytes


@pytest.mark.parametrize(
    ("release", "ranks", "cold"), [("0.32", 1, True), ("0.32", 2, True), ("0.16", 1, False)]
)
def test_the_first_start_compiles_on_a_table_as_large_as_the_embeddings(
    release: str, ranks: int, cold: bool
) -> None:
    request = EngineRequest(
        context=4096, max_num_seqs=16, max_num_batched_tokens=2048, tensor_parallel=ranks,
        vllm_version=release,
    )  # fmt: skip
    p = plan(LLAMA8, [H100] * ranks, None, request)
    table = (128256 * 4096 // ranks + 4 * 2048 * 4096) * 2
    assert (p.compile_bytes > 0) is cold and (not cold or p.activation_bytes == table)
    assert not plan(LLAMA8, [H100] * ranks, None, replace(request, enforce_eager=True)).compile_bytes


def test_hybrids_kept_the_first_runner_until_0_29_and_its_graphs_count_a_pass_over_the_batch() -> None:
    hybrid = find_model("Qwen/Qwen3.8-27B")
    a, b = (
        plan(hybrid, [H100], None, EngineRequest(context=4096, max_num_batched_tokens=t, vllm_version="0.27"))
        for t in (4096, 8192)
    )
    # 128 KiB a token beside the graphs themselves, which are as many
    assert b.cuda_graph_bytes - a.cuda_graph_bytes == 4096 * 128 * 1024
    assert not rules_for("0.27", (9, 0), False).graph_token_bytes
    assert rules_for("0.27", (9, 0), False, recurrent=True).graph_token_bytes == 128 * 1024
    assert not rules_for("0.29", (9, 0), True, recurrent=True).graph_token_bytes


def test_the_verdict_is_tight_where_the_stated_error_decides_and_what_it_offers_is_sure() -> None:
    gpu = named_gpu("RTX 4090")
    longest = plan(LLAMA8, [gpu], None, EngineRequest(context=4096)).max_context
    edge = plan(LLAMA8, [gpu], None, EngineRequest(context=longest))
    beyond = plan(LLAMA8, [gpu], None, EngineRequest(context=longest + 16))
    assert edge.fits and not beyond.fits and {edge.verdict, beyond.verdict} == {"tight"} and not edge.sure
    sure = int(edge.tight.split("--context ")[1].split()[0])
    assert plan(LLAMA8, [gpu], None, EngineRequest(context=sure)).verdict == "fits"
    assert plan(LLAMA8, [gpu], None, EngineRequest(context=2 * longest)).verdict == "does not fit"


def test_experts_are_whole_on_a_rank_or_cut_and_take_the_same_memory() -> None:
    mixture = find_model("Qwen/Qwen3-30B-A3B")
    cut, whole = (
        plan(
            mixture,
            [H100] * 4,
            None,
            EngineRequest(context=4096, tensor_parallel=4, enable_expert_parallel=e),
        )
        for e in (False, True)
    )
    assert cut.weights_bytes == whole.weights_bytes


def test_a_tower_that_is_not_loaded_or_not_shared_changes_the_weights() -> None:
    spec = find_model("nvidia/Qwen3.6-27B-NVFP4")
    tower = 2 * spec.by_role["tower"]
    shared, data, none = (
        plan(spec, [H100] * 2, None, EngineRequest(context=4096, tensor_parallel=2, **asked)).weights_bytes  # type: ignore[arg-type]
        for asked in ({}, {"mm_encoder_tp_mode": "data"}, {"language_model_only": True})
    )
    assert data - none == tower and none < shared < data


def test_sizes_of_captured_graphs() -> None:
    assert graph_sizes(1024, 8192, rules_for("0.32", (9, 0))) == 3 + 31 + 17
    assert graph_sizes(8, 8192, rules_for("0.32", (9, 0))) == 5  # 1, 2, 4, 8, 16
    assert graph_sizes(1024, 8192, rules_for("0.32", (10, 0))) == 3 + 31 + 49


def test_v0_read_the_whole_prompt_at_once_below_32k() -> None:
    spec = find_model("Qwen/Qwen2.5-7B-Instruct")
    v100 = named_gpu("V100-32GB")
    whole = plan(spec, [v100], None, EngineRequest(context=32768, vllm_version="0.8.5"))
    assert whole.max_num_batched_tokens == 32768
    assert whole.activation_bytes / GIB == pytest.approx(4.35, abs=0.02)  # printed on a V100 by vLLM 0.8.5


def test_a_pipeline_is_as_good_as_its_fullest_stage() -> None:
    spec = find_model("deepseek-ai/DeepSeek-V3")
    p = plan(
        spec,
        [replace(H100, total_bytes=2**42, free_bytes=2**42)] * 8,
        None,
        EngineRequest(context=4096, pipeline_parallel=4, tensor_parallel=2),
    )
    assert len(p.weights_by_stage) == 4
    assert p.weights_bytes == max(p.weights_by_stage)
    assert min(p.weights_by_stage) == p.weights_by_stage[0]  # the three dense blocks are in the first


@pytest.mark.parametrize(("layers", "stages"), [(80, 4), (61, 4), (61, 8), (5, 5), (7, 3)])
@pytest.mark.parametrize("version", ["0.6.6", "0.32"])
def test_every_layer_is_in_exactly_one_stage(layers: int, stages: int, version: str) -> None:
    parts = stage_layers(layers, stages, rules_for(version))
    assert [i for r in parts for i in r] == list(range(layers))


def test_tensor_parallel_weights_are_the_parts_of_the_whole() -> None:
    one = plan(
        LLAMA70, [replace(H100, total_bytes=2**42, free_bytes=2**42)], None, EngineRequest(context=4096)
    ).weights_bytes
    four = plan(LLAMA70, [H100] * 4, None, EngineRequest(context=4096, tensor_parallel=4)).weights_bytes
    norms = (2 * 80 + 1) * 8192 * 2 + LLAMA70.rotary_bytes
    assert 4 * (four - norms) == one - norms


# -- refusals ------------------------------------------------------------------------------------------------


def refused(
    request: EngineRequest, gpu: Gpu = L40S, count: int = 1, scheme: Scheme | None = None
) -> tuple[str, str]:
    p = plan(LLAMA70 if count > 1 or scheme else LLAMA8, [gpu] * count, scheme, request)
    assert not p.fits
    return p.why, p.remedy


def test_no_room_names_every_part() -> None:
    why, _ = refused(EngineRequest(context=4096), named_gpu("RTX 3090"), scheme=PRESETS["w4a16"])
    assert all(word in why for word in ("weights", "activations", "CUDA graphs", "requested"))


def test_too_long_a_context_names_the_longest_that_fits_and_that_one_does() -> None:
    request = EngineRequest(context=131072)
    gpu = named_gpu("RTX 4090")
    p = plan(LLAMA8, [gpu], None, request)
    assert not p.fits and str(p.max_context) in p.remedy
    assert plan(LLAMA8, [gpu], None, replace(request, context=p.max_context)).fits
    assert not plan(LLAMA8, [gpu], None, replace(request, context=p.max_context + 16)).fits


def test_memory_held_by_others_stops_the_start_until_less_is_asked() -> None:
    busy = replace(L40S, free_bytes=L40S.total_bytes - 10 * GIB)
    why, remedy = refused(EngineRequest(context=4096), busy)
    assert "held by others" in why
    share = float(remedy.split()[1].rstrip(","))
    assert plan(LLAMA8, [busy], None, EngineRequest(context=4096, gpu_memory_utilization=share)).fits


def test_recurrent_states_need_a_block_a_sequence_for_graphs() -> None:
    spec = find_model("Qwen/Qwen3.5-35B-A3B-FP8")
    gpu = replace(L40S, total_bytes=int(44.4 * GIB), free_bytes=int(44 * GIB))
    request = EngineRequest(context=1024, vllm_version="0.18.0")
    p = plan(spec, [gpu], None, request)
    assert not p.fits and "recurrent states" in p.why
    assert plan(spec, [gpu], None, replace(request, enforce_eager=True)).fits
    fewer = int(p.remedy.split()[1].rstrip(","))
    assert plan(spec, [gpu], None, replace(request, max_num_seqs=fewer)).fits


def test_graphs_that_do_not_fit_beside_the_requested_memory() -> None:
    gpu = replace(L40S, free_bytes=L40S.total_bytes)
    why, remedy = refused(EngineRequest(context=4096, vllm_version="0.19", gpu_memory_utilization=0.995), gpu)
    assert "capturing CUDA graphs" in why and "--enforce-eager" in remedy


def test_groups_that_ranks_would_cut_are_refused_and_smaller_ones_not() -> None:
    config = {**TINY["gqa"], "intermediate_size": 11008, "num_attention_heads": 8, "num_key_value_heads": 8}
    spec = model_from_config(config)
    gpus = [L40S] * 8
    request = EngineRequest(context=1024, tensor_parallel=4)
    scheme = PRESETS["w4a16"]
    why = plan(spec, gpus, scheme, request).why
    assert "down_proj: 11008 inputs over --tensor-parallel 4 do not divide into groups of 128" in why
    assert plan(spec, gpus, scheme.with_group_size(64), request).fits


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensor_parallel": 3}, "32 attention heads"),
        ({"tensor_parallel": 0}, "--tensor-parallel is 0"),
        ({"pipeline_parallel": 64}, "32 layers"),
        ({"concurrency": -1}, "--concurrency is -1"),
        ({"context": 10**30}, "--context"),
        ({"context": 200000}, "positions for 131072"),
        ({"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization"),
        ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization"),
        ({"kv_cache_dtype": "int8"}, "--kv-cache-dtype"),
        ({"max_num_seqs": 512, "max_num_batched_tokens": 256}, "is below --max-num-seqs"),
        ({"max_num_seqs": 4, "concurrency": 8}, "--concurrency 8"),
    ],
)
def test_impossible_requests_are_refused_by_name(changes: dict[str, object], words: str) -> None:
    with pytest.raises(Problems, match=words) as caught:
        plan(LLAMA8, [L40S] * 64, None, replace(EngineRequest(), **changes))  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


def test_all_problems_are_listed_together() -> None:
    with pytest.raises(Problems) as caught:
        plan(LLAMA8, [L40S], None, EngineRequest(concurrency=0, tensor_parallel=5, gpu_memory_utilization=2))
    assert len(caught.value.problems) >= 4


@pytest.mark.parametrize("text", ["", "latest", "2.0", "-1", "0.1.0"])
def test_releases_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--vllm-version"):
        parse_version(text)


def test_development_builds_count_as_their_release() -> None:
    assert parse_version("v0.7.3.dev233+gad5a35c2") == (0, 7, 3)


def test_old_gpus_kept_the_old_engine_until_0_10() -> None:
    assert (
        rules_for("0.8.5", (7, 5)).engine == "v0"
        and rules_for("0.8.5", (8, 0)).engine == "v1"
        and rules_for("0.11", (7, 5)).engine == "v1"
    )


def test_the_cpu_needs_no_graphs_and_no_profile() -> None:
    p = plan(LLAMA8, [cpu_device(64 * GIB)], None, EngineRequest(context=4096))
    assert p.cuda_graph_bytes == p.activation_bytes == 0 and p.block_tokens == 128
    assert p.kv_cache_bytes == p.requested_bytes - p.weights_bytes - p.other_bytes


@pytest.mark.parametrize(("instructions", "tokens"), [({"avx512_bf16"}, 256), (set(), 128)])
def test_a_cpu_with_bf16_instructions_keeps_recurrent_states_in_32_bits(
    instructions: set[str], tokens: int
) -> None:
    wide = {"avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl"}
    cpu = replace(cpu_device(64 * GIB), instructions=frozenset(wide | instructions))
    # 16,384 values of state and 1,536 of the convolution in 16 bits, over 512 bytes a token
    spec = model_from_config(TINY["recurrent"], "recurrent")
    assert plan(spec, [cpu], None, EngineRequest(context=2048)).block_tokens == tokens


def test_a_long_context_makes_the_profile_run_a_long_video_unless_none_is_allowed() -> None:
    spec = find_model("Qwen/Qwen2.5-VL-7B-Instruct")
    request = EngineRequest(context=8192, vllm_version="0.19", max_num_seqs=16)
    short, long, still, blind = (
        plan(spec, [H100], None, replace(request, **changes)).activation_bytes  # type: ignore[arg-type]
        for changes in (
            {},
            {"context": 120000},
            {"context": 120000, "limit_mm_per_prompt": {"video": 0}},
            {"context": 120000, "limit_mm_per_prompt": {"image": 0, "video": 0}},
        )
    )
    # 14 frames, two to an image's 16384 tokens
    assert long == 7 * short and still == short and blind < short
