"""A recipe to begin with: what would be chosen for a model and a GPU, every other key with its default, and
what each means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quant import defaults
from quant.checkpoint.reader import open_checkpoint
from quant.hub import model_name
from quant.jobs import ResolvedJob, complete, resolve
from quant.planning.target import method_for
from quant.recipe import Recipe, Rule, make_recipe
from quant.schemes import DEFAULT_SCHEME, PRESETS
from quant.vllm.context import context_length

#: Keys in the order of a reader's questions, each with what it means.
_KEYS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "what is made",
        (
            ("method", "rounding method: quant list methods"),
            ("effort", "instead of a method: fast, balanced or best"),
            ("scheme", "numbers that weights and inputs become: quant list schemes"),
            ("bits", "instead of a scheme: 2, 3, 4 or 8 bits of weights"),
            ("group_size", "inputs per scale; smaller costs bits and gains quality"),
            ("symmetric", "true: no zero points"),
            ("activations", "scales of 8-bit inputs: dynamic, by token as they come; static, calibrated"),
            ("symmetric_activations", "false: 8-bit integer inputs have zero points"),
            ("target_bits", "instead of a scheme: one for every layer, so many bits per weight in all"),
            ("target_size", "the same for so many bytes of tensors: 20GiB"),
            ("fit", "true: the same for the memory of the GPU"),
            ("context", "fit: tokens of the longest request"),
            ("concurrency", "fit: requests of that length at the same time"),
            ("kv_cache_scheme", "fp8: scales of an FP8 KV cache are calibrated and written"),
            ("format", "how it is stored: quant list formats"),
            ("target", "who must load it: other allows what vLLM refuses"),
        ),
    ),
    (
        "which layers",
        (
            ("layers", 'only these: "0,1,2" · "0-3,7" · "first:2" · "last:2" · globs over module names'),
            ("ignore", 'left as they are: globs, or "re:" and a regular expression'),
            ("rules", 'other settings for some layers: - {layers: "last:2", scheme: w8a16}'),
        ),
    ),
    (
        "how it is calibrated",
        (
            ("calibration_dataset", "files or directories; none: the bundled text"),
            ("samples", "rows of text"),
            ("gradient_samples", "yaqa: rows that gradients are taken through"),
            ("sequence_length", "tokens a row"),
            ("shuffle", "draw rows from the whole text instead of taking the first"),
            ("seed", "of shuffle, and of yaqa's draws at the logits"),
            ("chat_template", "true: plain text goes through the chat template; false: messages are joined"),
            ("moe_calibration", "experts see the tokens routed to them, all, or a blend where those are few"),
        ),
    ),
    (
        "settings of methods",
        (
            ("outlier_suppression", "scales inputs before rounding: smooth_quant, awq or none"),
            ("alpha", "smooth_quant: share of the inputs' range that goes into the weights, or auto"),
            ("act_order", "gptq: order of columns, static or none"),
            ("damping", "gptq, yaqa: share of the Hessian's diagonal that is added to it"),
            ("clip_search", "search each group's range for the least error"),
            ("options", "any other setting of the method, by name"),
        ),
    ),
    (
        "where it is made, and served",
        (
            ("device", "where torch computes: cpu, cuda or cuda:N"),
            ("gpu", "the GPU that will serve it: quant list gpus"),
            ("tensor_parallel", "GPUs that share every layer"),
            ("vllm_version", "release of vLLM that will serve it"),
            ("push_to_hub", "org/name[@branch]: the verified output is uploaded there"),
            ("private", "push_to_hub: a new repository is private"),
            ("commit_message", "push_to_hub: of the commit"),
            ("replace_on_hub", "push_to_hub: replace a model that the repository holds already"),
        ),
    ),
)
#: Of keys that the recipe leaves to the method or the model: what then holds.
_FOLLOWS: dict[str, Any] = {
    "act_order": defaults.ACT_ORDER,
    "damping": defaults.DAMPING,
    "alpha": defaults.ALPHA,
}


def starter_recipe(
    model_path: str | Path,
    output_path: str | Path | None = None,
    *,
    gpu: str | None = None,
    method: str | None = None,
    scheme: str | None = None,
    tensor_parallel: int | None = None,
) -> str:
    """The text of a commented YAML recipe that ``quant quantize --config`` takes. Headers are read, no
    tensors.

    Args:
        output_path: None: one beside the recipe, named after the model and scheme.
        gpu, tensor_parallel: what will serve it; None: the GPUs here.
        method, scheme: asked for; what is not follows from the other, or from the recommendation.

    Raises:
        UsageError: names that are not known; or neither method nor scheme, and no GPU to choose them for.
        NothingFits: no scheme fits the GPU.
    """
    asked = {
        "model_path": str(model_path), "gpu": gpu, "method": method, "scheme": scheme,
        "tensor_parallel": tensor_parallel,
    }  # fmt: skip
    values = {k: v for k, v in asked.items() if v is not None}
    resolved = resolve({**values, "output_path": str(output_path or "out")})
    head: list[str]
    if isinstance(resolved, ResolvedJob):
        recipe, head = resolved.recipe, list(resolved.notes)
    else:
        chosen, _ = method_for(PRESETS[DEFAULT_SCHEME], model_path)
        made = {**values, "output_path": "out", "method": chosen, "scheme": DEFAULT_SCHEME}
        recipe, notes = complete(make_recipe(made))
        head = [f"Not needed to fit: {resolved.reason}", "This recipe makes it smaller all the same.", *notes]
    name = recipe.resolved_scheme(recipe.method).name
    output = str(output_path or f"{model_name(Path(model_path))}-{name}")
    given = recipe.model_copy(update={"output_path": Path(output)})
    return _text(given, set(recipe.model_fields_set) - {"effort"} | {"method", "scheme"}, head)


def _text(recipe: Recipe, chosen: set[str], head: Sequence[str]) -> str:
    """The recipe as YAML: chosen keys, and the others as comments with the value that holds."""
    scheme = recipe.resolved_scheme(recipe.method)
    own = {
        "group_size": scheme.weights.group_size,
        "symmetric": scheme.weights.symmetric,
        "clip_search": defaults.CLIP_SEARCH.get(recipe.method, False),
        "scheme": scheme.name,
        "sequence_length": _length(recipe.model_path),
    }
    if (inputs := scheme.activations) is not None:
        own |= {
            "activations": "dynamic" if inputs.dynamic else "static",
            "symmetric_activations": inputs.symmetric,
        }
    lines = ["# quant quantize --config THIS_FILE", "#"]
    lines += [f"# {line}" for text in head for line in _wrapped(text)]
    lines += [
        "# Keys behind a # have the value that holds without them, or none. Options on the command line win.",
        "",
        f"model_path: {_yaml(str(recipe.model_path))}",
        f"output_path: {_yaml(str(recipe.output_path))}",
    ]
    for title, keys in _KEYS:
        lines += ["", f"# -- {title}"]
        for key, meaning in keys:
            value = getattr(recipe, key)
            if value is None or (key not in chosen and key in own):
                value = own.get(key, _FOLLOWS.get(key))
            shown = _yaml(value)
            entry = (
                f"{key}: {shown}" if key in chosen and shown else f"# {key}:{f' {shown}' if shown else ''}"
            )
            lines.append(f"{entry:<36} # {meaning}")
    return "\n".join(lines) + "\n"


def _length(model_path: Path) -> int:
    """Tokens of a calibration row where none are asked for."""
    context = context_length(open_checkpoint(model_path).config)
    return min(defaults.SEQUENCE_LENGTH, context or defaults.SEQUENCE_LENGTH)


def _yaml(value: Any) -> str:
    """A value in YAML's flow style, which JSON's is part of; words that need no quotes have none."""
    if value is None or value == [] or value == {}:
        return ""
    if isinstance(value, list):
        value = [v.model_dump(exclude_unset=True) if isinstance(v, Rule) else v for v in value]
    if isinstance(value, str) and value.replace("-", "").replace("_", "").isalnum():
        if not value[0].isdigit() and value not in ("null", "true", "false", "yes", "no", "on", "off"):
            return value
    return json.dumps(value, default=str, ensure_ascii=False)


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 96, break_long_words=False) or [""]
