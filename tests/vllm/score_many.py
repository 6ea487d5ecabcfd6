"""Run by vLLM's own interpreter: loads each checkpoint of a JSON list, scores rows of tokens and continues
them greedily, and prints what came out, a line each."""

import json
import os
import sys

from inside import build_models_in_this_process, each_in_a_child, stand_in_for_torchvision


def _engine(job):
    """With ``flags``, what a server is started with, as its own parser reads them."""
    from vllm import LLM

    if "flags" not in job:
        return LLM(
            model=job["path"], dtype="bfloat16", enforce_eager=True, skip_tokenizer_init=True,
            enable_prefix_caching=False, max_model_len=256, max_num_seqs=16, max_num_batched_tokens=2048,
            disable_log_stats=True, kv_cache_memory_bytes=256 * 2**20,
            model_loader_extra_config={"enable_weights_track": True}, **job.get("arguments", {}),
        )  # fmt: skip
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    os.environ.update(job["environment"])
    told = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", job["path"], *job["flags"]])
    return LLM.from_engine_args(EngineArgs.from_cli_args(told))


def score(job):
    from vllm import SamplingParams, TokensPrompt

    llm = _engine(job)
    sampling = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, prompt_logprobs=0, logprobs=0,
        detokenize=False,
    )  # fmt: skip
    tokens, logs = [], []
    for answer in llm.generate(
        [TokensPrompt(prompt_token_ids=r) for r in job["rows"]], sampling, use_tqdm=False
    ):
        (said,) = answer.outputs
        tokens.append([*answer.prompt_token_ids, *said.token_ids])
        scored = zip(tokens[-1][1:], [*answer.prompt_logprobs[1:], *said.logprobs], strict=True)
        logs.append([table[token].logprob for token, table in scored])
    return {"tokens": tokens, "logs": logs}


def main():
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_CPU_INT4_W4A8="0")
    # threads that spin for each other's sake stand still for minutes where others use the cores too
    os.environ.update(OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over kv_cache_memory_bytes
    stand_in_for_torchvision()
    build_models_in_this_process()
    import vllm.entrypoints.llm  # before the first fork: it takes most of the time  # noqa: F401

    each_in_a_child(json.load(open(sys.argv[1])), score)


if __name__ == "__main__":
    main()
