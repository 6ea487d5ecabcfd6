"""What a checkpoint is made for: the settings of a job that names no method, and whether a named GPU and
release will load its result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant import defaults
from quant.checkpoint.reader import read_json
from quant.errors import UsageError
from quant.hardware import count_in, detect, named_gpu
from quant.models.support import GRADIENTS, makeable_methods, passed_over, scheme_problem
from quant.planning.recommendation import Recommendation, recommend
from quant.planning.request import EngineRequest
from quant.recipe import Recipe
from quant.schemes import DEFAULT_SCHEME, SOLVED, Scheme, row_of
from quant.vllm.kernels import kernel_problem
from quant.vllm.releases import loading_problem


def method_for(
    scheme: Scheme,
    model: str | Path,
    needs: Mapping[str, str] | None = None,
    effort: str = defaults.EFFORT,
) -> tuple[str, str]:
    """The method that makes a scheme of a checkpoint where none is named, and a sentence on why it is not the
    scheme's preferred one (empty where it is).

    Args:
        model: the checkpoint's directory.
        needs: recipe keys that the job has beside the scheme; None: those that the scheme needs to be good.
        effort: one of :data:`quant.defaults.EFFORTS`.

    Raises:
        UsageError: a scheme that this build does not make of the model has no such method.
    """
    # one that vLLM does not load is made for other engines by those that make its like
    every = row_of(scheme).methods or SOLVED
    file, preferred = Path(model) / "config.json", _of_effort(every, effort)[0]
    if not file.is_file():
        # refused by the job, together with all else that is wrong
        return preferred, ""
    config = read_json(file, "the config")
    methods = _of_effort(makeable_methods(config, scheme, needs, every), effort)
    if not methods:
        raise UsageError(f"missing --method: {scheme_problem(config, scheme, needs)}")
    if methods[0] == preferred:
        return methods[0], ""
    reason = passed_over(config, scheme, preferred, needs)
    return methods[0], f"--method {methods[0]} instead of {preferred}: {reason}"


def _of_effort(methods: tuple[str, ...], effort: str) -> tuple[str, ...]:
    if effort == "fast":
        return tuple(m for m in methods if m not in GRADIENTS)
    return tuple(sorted(methods, key=lambda m: m not in GRADIENTS)) if effort == "best" else methods


def best_options(recipe: Recipe) -> dict[str, Any]:
    """The options of yaqa that the effort ``best`` makes of a recipe's: its own win."""
    searched = recipe.options.get("clip_search", recipe.clip_search)
    brought = {k: v for k, v in defaults.BEST.items() if k != "signed" or searched is not False}
    return {**brought, **recipe.options}


def best_inputs(recipe: Recipe, scheme: Scheme) -> dict[str, Any]:
    """Keys that the effort ``best`` makes of a recipe's for the inputs of its scheme: integers that each
    token has a scale of its own for get zero points, where the recipe does not decide. What comes from an
    activation function lies unevenly about zero, and a symmetric scale spends codes on numbers beyond its
    shorter side."""
    inputs = scheme.activations
    uneven = inputs is not None and inputs.type == "int" and inputs.dynamic and inputs.symmetric
    return {"symmetric_activations": False} if uneven and recipe.symmetric_activations is None else {}


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
            f"(--gpu L40S-48GB), or give --scheme {DEFAULT_SCHEME}, whose method follows"
        )
    request = EngineRequest(tensor_parallel=tensor_parallel, vllm_version=vllm_version)
    count = tensor_parallel if gpu is not None and count_in(gpu) is None else None
    recommendation = recommend(
        str(model),
        gpu,
        request,
        makeable_only=True,
        output_path=str(output_path),
        gpu_count=count,
    )
    return recommendation.check()


def settings(recommendation: Recommendation) -> dict[str, Any]:
    """Recipe keys of a recommended scheme; what it needs to be good, the job takes along
    (:func:`quant.jobs.complete`)."""
    chosen: dict[str, Any] = {"method": recommendation.method, "scheme": recommendation.recommended}
    return (
        chosen if recommendation.group_size is None else {**chosen, "group_size": recommendation.group_size}
    )


def target_problems(scheme: Scheme, form: str, gpu: str | None, vllm_version: str) -> list[str]:
    """Why a GPU or a vLLM release will not load a scheme in a format.

    Raises:
        UsageError: unknown GPU, not a version.
    """
    release = loading_problem(form, vllm_version)
    kernel = kernel_problem(scheme, named_gpu(gpu)) if gpu is not None and form != "plain" else None
    return [p for p in (release, kernel) if p is not None]
