"""Engine arguments for a checkpoint: what ``vllm serve`` is told, and why. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quant.errors import UsageError
from quant.hardware import Gpu
from quant.units import meant_tokens
from quant.vllm.architectures import text_alone
from quant.vllm.config import config_dtype, model_types, quantization_config, source_method
from quant.vllm.context import context_length, context_problem
from quant.vllm.kernels import BF16_LAYOUTS, has_bfloat16
from quant.vllm.methods import DEPRECATED

#: The argument that keeps images out, and its value.
NO_IMAGES = ("limit-mm-per-prompt", '{"image": 0}')
NO_IMAGES_WHY = "vLLM runs transformers' class of this model, and stops where that may be given images"
#: How ranks hold a vision tower (``--mm-encoder-tp-mode``).
TOWER_MODES = ("weights", "data")
#: The argument under which an engine runs code that a checkpoint brings along.
TRUST = "trust-remote-code"


@dataclass(frozen=True)
class Argument:
    """One engine argument with the reason for its value."""

    name: str
    value: str | int | float
    reason: str

    @property
    def words(self) -> tuple[str, ...]:
        """As words of a command; a flag that is on is its name alone."""
        return (f"--{self.name}",) if self.value is True else (f"--{self.name}", str(self.value))


#: Layouts whose group scales are stored in the model's own dtype; the others have fp32, E4M3 or powers of
#: two.
_SCALES_IN_DTYPE = frozenset({"pack-quantized", "gptq", "awq"})


def layouts(config: Mapping[str, Any]) -> frozenset[str]:
    """How the linears of a config.json are stored: sub-formats of compressed-tensors, or another
    ``quant_method``; empty where nothing is quantized."""
    quantization = quantization_config(config)
    if not quantization:
        return frozenset()
    method = str(quantization.get("quant_method"))
    if method != "compressed-tensors":
        return frozenset({method})
    groups = quantization.get("config_groups")
    stated = (
        [g.get("format") for g in groups.values() if isinstance(g, Mapping)]
        if isinstance(groups, Mapping)
        else []
    )
    return frozenset(str(x) for x in (*stated, quantization.get("format")) if x)


#: Values of ``model_type`` that vLLM refuses to compute in fp16, which has no room for their activations
#: (``config/model.py::_FLOAT16_NOT_SUPPORTED_MODELS``).
BF16_MODELS = frozenset({"gemma2", "gemma3", "gemma3_text", "glm4"})


def model_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that vLLM will compute in: the checkpoint's own, with fp32 brought to bf16, and so fp16 where
    the kernels or the model want bf16."""
    stated = config_dtype(config) or "bfloat16"
    wants = layouts(config) & BF16_LAYOUTS or BF16_MODELS & set(model_types(config))
    return "float16" if stated == "float16" and not wants else "bfloat16"


#: Why such a model is not served quantized by a GPU without bf16.
IN_FP32_ALONE = (
    "it has no bfloat16, vLLM does not compute this family in float16, and its kernels of quantized weights "
    "do not take float32"
)


def instead_of_bfloat16(gpu: Gpu, kinds: Iterable[str]) -> str | None:
    """The dtype that vLLM computes models of these types in on a GPU without bf16: fp16, or fp32 where they
    have no room in that (``config/model.py::_resolve_auto_dtype``); None where the GPU has bf16."""
    if has_bfloat16(gpu):
        return None
    return "float16" if BF16_MODELS.isdisjoint(kinds) else "float32"


def _why_dtype(config: Mapping[str, Any], side_file: str) -> str:
    """The reason for :func:`model_dtype`, and where the quantization is read from."""
    stored, stated = layouts(config), config_dtype(config) or "bfloat16"
    if not stored:
        why = "the weights' own"
    elif stored & _SCALES_IN_DTYPE:
        why = "scales are stored in it"
    else:
        why = "the model's own"
    if stated != model_dtype(config):
        layout, models = sorted(stored & BF16_LAYOUTS), BF16_MODELS & set(model_types(config))
        if stated != "float16":
            why = f"instead of the model's {stated}"
        elif models:
            why = f"instead of float16, in which vLLM does not compute {', '.join(sorted(models))}"
        else:
            why = f"{', '.join(layout)} has kernels for it alone"
    method = (quantization_config(config) or {}).get("quant_method")
    if not method:
        return why
    read = f"follows from {side_file}, which vLLM reads" if side_file else "is read from config.json"
    return f"{why}; quant_method {method} {read}"


def engine_arguments(
    config: Mapping[str, Any],
    *,
    tensor_parallel: int = 1,
    max_model_len: int | None = None,
    side_file: str = "",
) -> list[Argument]:
    """Arguments for ``vllm serve`` that the checkpoint itself decides; vLLM finds the quantization by itself.
    Code that a checkpoint brings along is no matter of these: it takes a person's word.

    Args:
        side_file: in which the quantization stands where config.json says nothing of it.

    Raises:
        UsageError: a context beyond the model's positions.
    """
    arguments = [Argument("dtype", model_dtype(config), _why_dtype(config, side_file))]
    longest = context_length(config)
    if max_model_len is not None:
        max_model_len = meant_tokens(max_model_len, longest)
        if problem := context_problem("--max-model-len", max_model_len, longest, "the model"):
            raise UsageError(problem)
    length = max_model_len or longest
    if length:
        arguments.append(
            Argument(
                "max-model-len",
                length,
                "as asked"
                if max_model_len
                else "the longest context of config.json: lower it to fit more requests",
            )
        )
    if (method := source_method(quantization_config(config))) in DEPRECATED:
        arguments.append(
            Argument(
                "allow-deprecated-quantization",
                True,
                f"vLLM refuses quant_method {method} without it; quant export-vllm writes another",
            )
        )
    if text_alone(config):
        arguments.append(Argument(*NO_IMAGES, NO_IMAGES_WHY))
    if tensor_parallel > 1:
        arguments.append(
            Argument("tensor-parallel-size", tensor_parallel, "as asked; shapes were checked for it")
        )
    return arguments


def vllm_config(arguments: list[Argument]) -> dict[str, Any]:
    """The content of ``vllm_config.json``, which ``vllm serve MODEL --config vllm_config.json`` reads."""
    return {a.name: a.value for a in arguments}
