"""Run by vLLM's own interpreter: continues rows of tokens with each checkpoint and speculation of a JSON
list, and prints the tokens and what vLLM counted, a line each."""

import json
import os
import sys

from inside import build_models_in_this_process, each_in_a_child, rotate_by_torch, stand_in_for_torchvision


def speculate(job):
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        model=job["path"], dtype=job.get("dtype", "bfloat16"), enforce_eager=True, skip_tokenizer_init=True,
        enable_prefix_caching=False, max_model_len=512, max_num_seqs=job.get("sequences", 8),
        max_num_batched_tokens=2048,
        disable_log_stats=False, kv_cache_memory_bytes=256 * 2**20, speculative_config=job["config"],
    )  # fmt: skip
    rows = [TokensPrompt(prompt_token_ids=r) for r in job["rows"]]
    sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False)
    # counters only ever grow: one row at a time tells what each added
    groups = [[row] for row in rows] if job.get("each") else [rows]
    said, totals = [], [_counted(llm)]
    for group in groups:
        said += llm.generate(group, sampling, use_tqdm=False)
        totals.append(_counted(llm))
    each = [
        {
            k.rpartition("spec_decode_")[2]: v - before.get(k, 0)
            for k, v in after.items()
            if not isinstance(v, list)
        }
        for before, after in zip(totals, totals[1:], strict=False)
    ]
    return {"tokens": [list(a.outputs[0].token_ids) for a in said], "counted": totals[-1], "each": each}


def _counted(llm):
    """vLLM's counters of speculation so far."""
    return {
        m.name: getattr(m, "values", None) or m.value for m in llm.get_metrics() if "spec_decode" in m.name
    }


def main():
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_CPU_INT4_W4A8="0")
    os.environ.update(OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over kv_cache_memory_bytes
    stand_in_for_torchvision()
    import vllm.entrypoints.llm  # before the first fork: it takes most of the time  # noqa: F401

    build_models_in_this_process()
    rotate_by_torch()
    each_in_a_child(json.load(open(sys.argv[1])), speculate)


if __name__ == "__main__":
    main()
