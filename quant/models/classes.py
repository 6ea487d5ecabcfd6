"""Which of transformers' classes runs a checkpoint's text decoder, built without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quant.checkpoint.reader import Checkpoint
from quant.errors import CheckpointError, first_line
from quant.offline import transformers


class CannotRun(CheckpointError):
    """A model whose blocks cannot be run one by one: ``reason`` says why. The message goes on with what
    quantizes it all the same; who wanted to run it for something else has another next step to offer.

    Args:
        row: whether a row of the family could help, which says where its blocks are and what shares an input.
    """

    def __init__(self, reason: str, row: bool = False):
        add = "add a row for it as docs/adapters.md shows, or " if row else ""
        super().__init__(
            f"{reason}: {add}use what needs no data (--method minmax --outlier-suppression none), which "
            "takes any architecture"
        )
        self.reason = reason


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module registers goes to the meta device; buffers are left real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def text_models(config: Any, checkpoint: Checkpoint, dtype: torch.dtype, kind: str) -> Iterator[nn.Module]:
    """The text decoder as a model of its own; for a wrapper whose decoder has no such class, or one with
    other names than the file's, the wrapper; the class that config.json names, where transformers does not
    list it as a causal language model. Parameters are on the meta device.

    Args:
        config: transformers' own of the checkpoint.
        kind: the model type, for the message.

    Raises:
        CannotRun: none can be built.
    """
    auto = transformers()
    text = config.get_text_config()
    tries = []
    if text is not config:
        tries.append((auto.AutoModelForCausalLM.from_config, text))
        head = any(name.endswith("lm_head.weight") for name in checkpoint.tensors)
        if getattr(config, "tie_word_embeddings", False) and not head:
            text.tie_word_embeddings = True  # as the wrapper says
    tries += [(auto.AutoModelForCausalLM.from_config, config)]
    if text is not config:
        tries += [(auto.AutoModelForImageTextToText.from_config, config)]
    names = checkpoint.config.get("architectures")
    named = getattr(auto, str(names[0]), None) if isinstance(names, list) and names else None
    own: Any = named
    known = isinstance(named, type) and issubclass(named, auto.PreTrainedModel)
    if known and type(config) is getattr(own, "config_class", None):
        tries += [(own._from_config, config)]
    reason, built = "", set()
    for make, part in tries:
        try:
            with _parameters_on_meta(), torch.no_grad():
                model = make(part, dtype=dtype)
        # an unknown class is a ValueError; a contradictory config fails inside a constructor in any way
        except Exception as error:
            reason = reason or first_line(error, 200)
            continue
        if type(model) not in built:
            built.add(type(model))
            yield model
    if not built:
        raise CannotRun(
            f"{checkpoint.path}: model type {kind!r} cannot be built as a causal language model ({reason})"
        )
