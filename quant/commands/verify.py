"""``quant verify``."""

from __future__ import annotations

from pathlib import Path

import click

from quant.commands import options
from quant.commands.terminal import Output, common_options
from quant.errors import VerificationFailed
from quant.progress import Event


@click.command()
@options.one_checkpoint
@options.tensor_parallel(1)
@options.source("every tensor and side file of it is accounted for")
@options.against("every dequantized tensor (takes torch)")
@options.vllm("load it there, compare log-probabilities")
@options.target
@options.made_for
@common_options
def verify(
    out: Output,
    checkpoint: Path,
    tensor_parallel: int,
    source: Path | None,
    against: Path | None,
    vllm_python: Path | None,
    target: str,
    vllm_version: str | None,
) -> None:
    """Check that vLLM will load a checkpoint, without vLLM. Exit status 4 when it will not.

    \b
    quant verify out/Llama-3.1-8B-W4A16 --tensor-parallel 2
    quant verify Llama-3.1-8B-Q4_0.gguf --source models/Llama-3.1-8B
    """
    from quant.commands.render import results
    from quant.evaluation.verify import verify as check

    with out.progress("files and tensors") as progress:
        result = check(
            checkpoint,
            tensor_parallel=tensor_parallel,
            source=source or against,
            target=target,
            vllm_version=vllm_version,
        )
        value = result.to_dict()
        if against is not None and result.passed:
            progress(Event("against the source"))
            from quant.evaluation.compare import compare

            value["tensors"] = compare(checkpoint, against).to_dict()
        if vllm_python is not None and result.passed:
            progress(Event("in vLLM"))
            from quant.serving.reference import check_in_vllm

            value["vllm"] = check_in_vllm(checkpoint, vllm_python)
            value["passed"] = value["passed"] and value["vllm"]["passed"]
    out.result(value, lambda console: results.verification(console, value))
    if not value["passed"]:
        failed = result.failed or [value["vllm"]["detail"]]
        raise VerificationFailed(f"{checkpoint}: {failed[0]}")
