"""Arguments of the engine that are passed on as they are: what they set, and what they must not. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quant.errors import CheckpointError, UsageError, clipped
from quant.hardware import count_in
from quant.vllm.context import context_length, context_problem

if TYPE_CHECKING:
    from quant.serving.deployment import DeploymentRequest

#: vLLM's other names of what it is told here.
VLLM_ALIASES = {"tensor-parallel-size": ("tp",), "pipeline-parallel-size": ("pp",)}


def flag_of(word: str) -> str | None:
    """The name of the flag that a word is, without dashes before it and with dashes in it; None: it is none.

    >>> flag_of("--tp_size=2"), flag_of("-tp"), flag_of("-1"), flag_of("row")
    ('tp-size', 'tp', None, None)
    """
    if not re.match(r"--?[A-Za-z]", word):
        return None
    return word.split("=", 1)[0].lstrip("-").replace("_", "-")


def named(extra: Sequence[str]) -> dict[str, str]:
    """The flags by :func:`flag_of`, each with the value behind its ``=`` or the word that follows it."""
    values = {}
    for word, following in zip(extra, [*extra[1:], ""], strict=False):
        if (flag := flag_of(word)) is not None:
            _, equals, value = word.partition("=")
            values[flag] = value if equals else "" if following.startswith("-") else following
    return values


def check_extra(extra: Sequence[str], title: str, own: Mapping[str, str]) -> None:
    """
    Args:
        title: of the engine.
        own: flags that this tool must know to find, name and guard the server, without dashes before them,
            and what sets each.

    Raises:
        UsageError: no flags, or one of those.
    """
    if extra and not extra[0].startswith("-"):
        raise UsageError(
            f"unexpected argument {extra[0]!r}: the checkpoint is given with --model-path; arguments for "
            f"{title} follow --"
        )
    for word in extra:
        if (flag := flag_of(word)) in own:
            given = word.split("=", 1)[0]
            raise UsageError(f"{given} cannot be passed on to {title}: use {own[str(flag)]} instead")


def check_context(
    config: Mapping[str, Any],
    name: str,
    asked: int | None,
    stated: Mapping[str, Any],
    passed: Mapping[str, str],
    words: Sequence[str],
    may_exceed: bool = True,
) -> int | None:
    """The context that the engine is told: the one that is passed on, else asked, else of
    ``vllm_config.json``; None where that is left to the model, or said in words that only the engine reads.

    Args:
        config: config.json as the engine reads it.
        name: of the model.
        stated: of ``vllm_config.json``.
        passed: flags that are passed on, by name; ``words``: the engine's own of the context.
        may_exceed: whether vLLM's variable for longer contexts counts.

    Raises:
        UsageError: it is beyond the model's positions.
        CheckpointError: that of ``vllm_config.json`` is.
    """
    longest = context_length(config)
    given = next((w for w in words if w in passed), None)
    if given is not None:
        if not passed[given].isdecimal():
            return None
        tokens, option = int(passed[given]), f"-- --{given}"
    elif asked is not None:
        tokens, option = asked, "--max-model-len"
    elif "max-model-len" in stated:
        tokens, option = int(stated["max-model-len"]), "vllm_config.json: max-model-len"
    else:
        return None
    if problem := context_problem(option, tokens, longest, name, may_exceed):
        raise UsageError(problem) if given or asked is not None else CheckpointError(problem)
    return tokens


def with_ranks(
    request: DeploymentRequest, stated: Mapping[str, Any], names: Iterable[str]
) -> tuple[DeploymentRequest, int]:
    """The degree of tensor parallelism: the one that is passed on, else asked, else the number of GPUs that
    are named, else what stands in ``vllm_config.json``, else 1.

    Args:
        stated: of ``vllm_config.json``.
        names: the engine's own of it.

    Returns:
        the request, with the number of GPUs as asked where it decides; and the degree.

    Raises:
        UsageError: one that is no whole number from 1 up.
    """
    passed = named(request.extra)
    given = next((n for n in names if n in passed), None)
    if given is not None:
        return request, _degree(passed[given], f"-- --{given}")
    if request.tensor_parallel is None:
        request = replace(request, tensor_parallel=count_in(request.gpu))
    key = "tensor-parallel-size"
    return request, request.tensor_parallel or _degree(stated.get(key, 1), f"vllm_config.json: {key}")


def _degree(value: str | int | float, where: str) -> int:
    if not str(value).isdecimal() or not int(value):
        raise UsageError(f"{where} is {clipped(value)}: a whole number from 1 up is needed")
    return int(value)
