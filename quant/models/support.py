"""Which methods this build can run for a model, told from its config alone. No torch: planning asks too.

Methods that need no data go through a checkpoint tensor by tensor and take any architecture whose weights
are stored as [outputs, inputs]. Everything that is calibrated (a method, a suppressor, a static scale, the
inputs of NVFP4) runs the text decoder block by block through transformers' own modules. That needs a row of
:data:`quant.models.ModelRegistry`, or blocks that :class:`quant.models.skeleton.Skeleton` can work out for
itself: :data:`RUN` names the families of which a test shows that it can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quant.models.adapter import ModelRegistry
from quant.models.spec import ModelSpec
from quant.models.values import Values
from quant.schemes import Scheme, row_of
from quant.vllm.config import stated
from quant.vllm.layers import family_problem, one_form_problem

#: Methods that need no calibration text, as ``--method`` has them.
DATA_FREE = frozenset({"minmax", "fp8", "hqq", "none", "magnitude"})
#: Methods that take gradients through the whole model.
GRADIENTS = frozenset({"yaqa"})
#: What an effort takes instead where none go through.
WITHOUT_GRADIENTS = "gptq"
#: Model types of text decoders without a row whose blocks are worked out by running one of each kind.
RUN = frozenset(
    {
        "apertus", "arcee", "bloom", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "falcon", "gemma",
        "gemma4_text", "glm", "glm4", "gpt_bigcode", "gpt_neox", "gptj", "granite", "granite_swa", "helium",
        "hunyuan_v1_dense", "hyperclovax", "jais2", "minicpm3", "ministral", "ministral3", "mpt", "nanochat",
        "nemotron", "olmo", "olmo2", "olmo3", "opt", "persimmon", "phi", "qwen2_5_vl_text", "qwen2_vl_text",
        "qwen3_vl_text", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma",
        # recurrent states, alone or in blocks of several kinds
        "falcon_h1", "lfm2", "mamba2", "olmo_hybrid", "qwen3_5_text",
        # transposed weights; embeddings of each token for each block
        "gpt2", "gemma3n_text",
        # mixtures of experts
        "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
        "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoehybrid",
        "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jamba", "kimi_linear", "laguna", "lfm2_moe",
        "llama4_text", "mimo_v2_flash", "minimax_m2", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe",
        "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_vl_moe_text", "solar_open",
    }
)  # fmt: skip


def calibration_problem(model: ModelSpec | Mapping[str, Any]) -> str | None:
    """Why a model's text decoder cannot be run block by block, as far as its config tells, or None."""
    model_type = _model_type(model)
    if model_type in RUN or _has_row(model_type):
        return None
    return (
        f"model type {model_type!r} has no row in docs/adapters.md, and is not among those that are known to "
        "be run without one"
    )


def method_problem(
    model: ModelSpec | Mapping[str, Any], scheme: Scheme, method: str, needs: Mapping[str, str] | None = None
) -> str | None:
    """Why this build cannot make a scheme of a model by a method, as far as is known, or None.

    Args:
        model: a spec, or config.json.
        needs: recipe keys that the job has beside the scheme; None: those that the scheme needs to be good.
    """
    model_type = _model_type(model)
    if reason := one_form_problem(model_type, scheme) or family_problem((model_type,), scheme):
        return reason
    suppressor = (row_of(scheme).needs if needs is None else needs).get("outlier_suppression", "none")
    activations = scheme.activations
    calibrated = {
        f"--method {method} takes calibration": method not in DATA_FREE,
        f"the activations of {scheme.name} take calibration": activations is not None
        and activations.calibrated,
        f"--outlier-suppression {suppressor}, which {scheme.name} needs to be good, takes calibration": (
            suppressor != "none"
        ),
    }
    for what, needed in calibrated.items():
        if needed and (reason := calibration_problem(model)):
            return f"{what}, and {reason}"
    return None


def passed_over(
    model: ModelSpec | Mapping[str, Any], scheme: Scheme, method: str, needs: Mapping[str, str] | None = None
) -> str:
    """Why a method that a scheme prefers is not the first that makes it of a model."""
    return method_problem(model, scheme, method, needs) or (
        f"{method} solves every expert of a mixture under two Hessians; --effort best takes it"
    )


def makeable_methods(
    model: ModelSpec | Mapping[str, Any],
    scheme: Scheme,
    needs: Mapping[str, str] | None = None,
    methods: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """The methods that make a scheme of a model, the preferred one first; see :func:`method_problem`. Of
    mixtures those of :data:`GRADIENTS` come behind the one that stands in for them, since they solve every
    expert under two Hessians.

    >>> from quant.schemes import PRESETS
    >>> makeable_methods({"model_type": "llama"}, PRESETS["w4a16"])
    ('yaqa', 'gptq', 'minmax')
    >>> makeable_methods({"model_type": "internlm2"}, PRESETS["w4a16"])
    ('minmax',)
    """
    own = row_of(scheme).methods if methods is None else methods
    made = [m for m in own if method_problem(model, scheme, m, needs) is None]
    if WITHOUT_GRADIENTS in made and _has_experts(model):
        costly = [m for m in made if m in GRADIENTS]
        made = [m for m in made if m not in GRADIENTS]
        behind = made.index(WITHOUT_GRADIENTS) + 1
        made[behind:behind] = costly
    return tuple(made)


def scheme_problem(
    model: ModelSpec | Mapping[str, Any], scheme: Scheme, needs: Mapping[str, str] | None = None
) -> str | None:
    """Why none of a scheme's methods makes it of a model, told of the one that asks for least; None where one
    does."""
    methods = row_of(scheme).methods
    if not methods:
        return f"vLLM has no kernel for {scheme.name}"
    if makeable_methods(model, scheme, needs):
        return None
    return method_problem(model, scheme, next((m for m in methods if m in DATA_FREE), methods[0]), needs)


def _model_type(model: ModelSpec | Mapping[str, Any]) -> str:
    """The model type of the text decoder."""
    return (
        model.model_type
        if isinstance(model, ModelSpec)
        else str(Values(model, "config.json").get("model_type", ""))
    )


def _has_experts(model: ModelSpec | Mapping[str, Any]) -> bool:
    return model.moe is not None if isinstance(model, ModelSpec) else bool(stated(model, "experts"))


def _has_row(model_type: str) -> bool:
    return any(model_type in adapter.model_types for adapter in ModelRegistry)
