"""What a checkpoint is made for: the settings of a job that names no method, and whether a named GPU and
release will load its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quant.errors import UsageError
from quant.hardware import detect, named_gpu
from quant.planning.memory import EngineRequest
from quant.planning.recommendation import Recommendation, recommend
from quant.schemes import Scheme, SchemeRegistry
from quant.vllm.kernels import kernel_problem
from quant.vllm.releases import loading_problem


def method_for(scheme: str) -> str:
    """The method that makes a scheme when none is named: the first of its row.

    Raises:
        UsageError: a scheme that vLLM does not load has no such row.
    """
    methods = SchemeRegistry.get(scheme).methods if scheme in SchemeRegistry else ()
    if not methods:
        raise UsageError(f"missing --method: scheme {scheme!r} has no default one; give gptq or minmax")
    return methods[0]


def choose(
    model: str | Path,
    output_path: str | Path,
    *,
    gpu: str | None,
    tensor_parallel: int | None,
    vllm_version: str,
) -> Recommendation:
    """The recommendation for a job that names neither method nor scheme, among ``none`` and the schemes that
    this build makes.

    Raises:
        UsageError: no GPU is here and none is named.
        NothingFits: nothing does; the message says what would.
    """
    if gpu is None and not detect().gpus:
        raise UsageError(
            "no --method is given and no GPU is here to choose one for: name the GPU that will serve it "
            "(--gpu L40S-48GB), or give --method gptq"
        )
    request = EngineRequest(tensor_parallel=tensor_parallel, vllm_version=vllm_version)
    count = tensor_parallel if gpu is not None else None
    found = recommend(
        str(model),
        gpu,
        request,
        schemes=["none", *(row.name for row in SchemeRegistry if row.methods)],
        output_path=str(output_path),
        gpu_count=count,
    )
    return found.check()


def settings(found: Recommendation) -> dict[str, Any]:
    """Recipe keys of a recommended scheme; what it needs to be good, the job takes along
    (:func:`quant.jobs.complete`)."""
    chosen: dict[str, Any] = {"method": found.method, "scheme": found.recommended}
    return chosen if found.group_size is None else {**chosen, "group_size": found.group_size}


def target_problems(scheme: Scheme, form: str, gpu: str | None, vllm_version: str) -> list[str]:
    """Why a GPU or a vLLM release will not load a scheme in a format.

    Raises:
        UsageError: unknown GPU, not a version.
    """
    release = loading_problem(form, vllm_version)
    kernel = kernel_problem(scheme, named_gpu(gpu)) if gpu is not None and form != "plain" else None
    return [p for p in (release, kernel) if p is not None]
