"""What a checkpoint is made for: the settings of a job that names no method, and whether a named GPU and
release will load its result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.errors import UsageError
from quant.hardware import FORMAT_CAPABILITIES, detect, named_gpu
from quant.planning.memory import EngineRequest
from quant.planning.recommendation import MAKEABLE, NEEDED, Recommendation, recommend
from quant.planning.versions import parse_version
from quant.schemes import PRESETS, Scheme

#: First release that loads a format, as far as the formats' contract is known: before it compressed-tensors
#: had no per-group format key.
_FIRST_RELEASE = {"awq": (0, 2, 0), "compressed-tensors": (0, 6, 2), "gptq": (0, 2, 6)}


def method_for(scheme: str) -> str:
    """The method that makes a scheme when none is named: the first of its row.

    Raises:
        UsageError: a scheme that vLLM does not load has no such row.
    """
    if scheme not in MAKEABLE:
        raise UsageError(f"missing --method: scheme {scheme!r} has no default one; give gptq or minmax")
    return MAKEABLE[scheme][0]


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
        str(model), gpu, request, schemes=["none", *MAKEABLE], output_path=str(output_path), gpu_count=count
    )
    return found.check()


def settings(found: Recommendation) -> dict[str, Any]:
    """Recipe keys of a recommended scheme."""
    chosen: dict[str, Any] = {
        "method": found.method,
        "scheme": found.recommended,
        **NEEDED.get(str(found.recommended), {}),
    }
    return chosen if found.group_size is None else {**chosen, "group_size": found.group_size}


def target_problems(scheme: Scheme, form: str, gpu: str | None, vllm_version: str) -> list[str]:
    """Why a GPU or a vLLM release will not load a scheme in a format.

    Raises:
        UsageError: unknown GPU, not a version.
    """
    problems = []
    release = parse_version(vllm_version)
    first = _FIRST_RELEASE.get(form)
    if first is not None and release < first:
        problems.append(
            f"--vllm-version is {vllm_version}: format {form} is loaded from {'.'.join(map(str, first))} on"
        )
    if gpu is not None and form != "plain":
        part = named_gpu(gpu)
        formats: Mapping[str, str] = part.formats
        if formats.get(scheme.kernel, "no") == "no":
            level = (
                ".".join(map(str, part.capability)) if part.capability else part.architecture or part.platform
            )
            lowest = min(level for level in FORMAT_CAPABILITIES[scheme.kernel][:2] if level is not None) / 10
            end = FORMAT_CAPABILITIES[scheme.kernel][2]
            until = f" and below {end / 10}" if end is not None else ""
            loaded = ", ".join(n for n, s in PRESETS.items() if formats.get(s.kernel, "no") != "no")
            problems.append(
                f"--gpu is {part.name} ({level}): vLLM has no kernel for {scheme} there; compute capability "
                f"{lowest}{until} is needed. "
                f"It loads {loaded or 'unquantized weights only'}"
            )
    return problems
