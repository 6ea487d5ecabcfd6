"""Run by vLLM's own interpreter: starts each model of a JSON list with random weights and prints what its KV
cache became, a line each."""

import gc
import json
import os
import sys


def main() -> None:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over kv_cache_memory_bytes
    from vllm import LLM

    for job in json.load(open(sys.argv[1])):
        answer = {"name": job["name"]}
        try:
            llm = LLM(
                model=job["path"], load_format="dummy", dtype="bfloat16", enforce_eager=True,
                skip_tokenizer_init=True,
                max_model_len=job["context"], kv_cache_memory_bytes=job["kv_cache_bytes"],
                **job.get("arguments", {}),
            )  # fmt: skip
            config = llm.llm_engine.vllm_config
            cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
            answer.update(
                tokens=config.cache_config.kv_cache_size_tokens,
                concurrency=config.cache_config.kv_cache_max_concurrency,
                blocks=cache.num_blocks, groups=len(cache.kv_cache_groups),
                block_size=config.cache_config.block_size,
                block_sizes=[g.kv_cache_spec.block_size for g in cache.kv_cache_groups],
                bytes=max(t.size for t in cache.kv_cache_tensors),
                batched_tokens=config.scheduler_config.max_num_batched_tokens,
                seqs=config.scheduler_config.max_num_seqs, in_flight=config.max_in_flight_tokens,
                parameters=sum(p.numel() * p.element_size() for p in _parameters(llm)),
            )  # fmt: skip
            del llm
        except Exception as error:  # the test shows it
            answer["error"] = f"{type(error).__name__}: {error}"
        gc.collect()
        print("RESULT " + json.dumps(answer), flush=True)


def _parameters(llm):
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return list(worker.model_runner.model.parameters())


if __name__ == "__main__":
    main()
