"""Who guesses: n-grams of the text so far, or a smaller model of the same tokenizer."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quant.accelerator import synchronize
from quant.checkpoint.reader import open_checkpoint
from quant.errors import CheckpointError, UsageError, first_line
from quant.formats import find_format
from quant.offline import transformers
from quant.pipeline.export import export


class Model:
    """A whole causal model with a cache of what it has read, for one sequence; in the dtype of the
    checkpoint, on a CPU fp32 for fp16.

    Args:
        scratch: folder for the dequantized values of a quantized checkpoint.

    Raises:
        CheckpointError: one that transformers does not build.
    """

    def __init__(self, path: Path, device: torch.device, scratch: Path):
        checkpoint = open_checkpoint(path)
        folder = path
        if find_format(checkpoint.config, checkpoint.tensors) is not None:
            folder = scratch / f"{path.name}-values"
            export(path, folder, "plain", target="other")
        package = transformers()
        try:
            self.model = package.AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto").eval()
        except Exception as error:  # transformers raises many kinds
            raise CheckpointError(
                f"{path}: the whole model cannot be built here ({first_line(error)}): measure it in vLLM "
                "instead (--prove)"
            ) from error
        if self.model.dtype == torch.float16 and device.type == "cpu":
            self.model = self.model.float()
        self.model.to(device)
        self.device = device
        self.vocabulary = int(self.model.get_output_embeddings().weight.shape[0])
        self.path, self.folder = path, folder
        self.seconds: dict[int, list[float]] = {}
        self._seen: dict[int, torch.Tensor] = {}
        self._states: dict[int, torch.Tensor] = {}
        self.reset()

    def _places(self) -> list[torch.nn.Module]:
        """The decoder's blocks, and its last norm.

        Raises:
            CheckpointError: a model that has them elsewhere than most.
        """
        decoder = self.model.get_decoder()
        layers, norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
        if layers is None or norm is None:
            raise CheckpointError(
                f"{self.path}: its hidden states cannot be read here ({type(decoder).__name__} has no layers "
                "and norm): measure it in vLLM instead (--prove)"
            )
        return [*layers, norm]

    @property
    def blocks(self) -> int:
        """How many decoder blocks it has."""
        return len(self._places()) - 1

    def watch(self, places: Sequence[int]) -> None:
        """Keeps hidden states from now on: of place i what enters block i, and of place ``blocks + 1`` what
        leaves the last norm (``blocks``: what enters that norm)."""
        modules = self._places()

        def keep(place: int, value: torch.Tensor) -> None:
            self._seen[place] = value[0].detach()

        for place in places:
            if place == len(modules):
                modules[-1].register_forward_hook(lambda module, given, out, at=place: keep(at, out))
            else:
                modules[place].register_forward_pre_hook(
                    lambda module, given, named, at=place: keep(
                        at, given[0] if given else named["hidden_states"]
                    ),
                    with_kwargs=True,
                )

    def states(self, place: int) -> torch.Tensor:
        """Hidden states [tokens read, H] at a place that is watched."""
        return self._states[place]

    def reset(self) -> None:
        """Forgets the sequence."""
        self._cache = self._fresh()
        self._kept: tuple[list[int], Any] = ([], self._cache)
        self._read: list[int] = []
        self._states = {}

    def _fresh(self) -> Any:
        """A cache of nothing."""
        cache = transformers().DynamicCache(config=self.model.config)
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers) and not _recurrent(cache):
            # a window that has moved on cannot be cut back: keep everything, the mask forgets
            cache = transformers().DynamicCache()
        return cache

    @torch.no_grad()
    def logits(self, tokens: list[int], last: int) -> torch.Tensor:
        """fp32 logits [last, V] after each of the last tokens of a sequence; what it shares with the sequence
        before is not computed again."""
        end = len(tokens) - last
        if _recurrent(self._cache):
            shared = self._go_back(tokens, end)
        else:
            shared = _shared(self._read, tokens, end)
            if shared < len(self._read):
                try:
                    self._cache.crop(shared - len(self._read))  # negative: so many are removed
                except Exception as error:
                    raise CheckpointError(
                        f"{self.path}: its states cannot be cut back to an earlier token "
                        f"({first_line(error)}): measure it in vLLM instead (--prove)"
                    ) from error
        begun = time.perf_counter()
        result = self._pass(tokens, shared, last)
        synchronize(self.device)
        self.seconds.setdefault(len(tokens) - shared, []).append(time.perf_counter() - begun)
        return result.cpu()

    def _pass(self, tokens: list[int], known: int, last: int) -> torch.Tensor:
        """fp32 logits [last, V] of a pass over what follows the first ``known`` tokens."""
        out: Any = self.model(
            torch.tensor([tokens[known:]], device=self.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=last,
        )
        self._read = list(tokens)
        for place, new_states in self._seen.items():
            before = self._states.get(place)
            kept = new_states if before is None else torch.cat([before[:known], new_states])
            self._states[place] = kept
        return out.logits[0, -last:].float()

    def _go_back(self, tokens: list[int], end: int) -> int:
        """Brings recurrent states, which cannot be cut back, to after the first ``end`` tokens: those that
        were kept the last time, and a pass over what was accepted since.

        Returns:
            ``end``.
        """
        kept, cache = self._kept
        if _shared(kept, tokens, end) < len(kept):  # another text
            kept, cache = [], self._fresh()
        self._cache = cache
        if len(kept) < end:
            self._pass(tokens[:end], len(kept), 1)
        self._kept = tokens[:end], copy.deepcopy(self._cache)
        return end


def _recurrent(cache: Any) -> bool:
    """Whether a cache holds states of recurrent layers or convolutions, which forget what they were."""
    return any(hasattr(layer, "recurrent_states") for layer in cache.layers)


def _shared(read: Sequence[int], tokens: Sequence[int], most: int) -> int:
    """How many tokens two texts begin with alike, ``most`` at most."""
    shared = 0
    while shared < min(len(read), most) and read[shared] == tokens[shared]:
        shared += 1
    return shared


class Proposer(ABC):
    """Guesses what comes next."""

    @property
    def seconds(self) -> Mapping[int, Sequence[float]]:
        """What its passes through a network took, by tokens read; empty without a network."""
        return {}

    @abstractmethod
    def propose(self, tokens: list[int], k: int) -> tuple[list[int], torch.Tensor | None]:
        """At most k tokens, and the probabilities [k, V] that they were drawn with (None: without chance)."""

    def ended(self, tokens: list[int]) -> None:  # noqa: B027 - most learn nothing
        """Told of a text that is complete, for one that learns from it."""


@dataclass(frozen=True)
class NGram(Proposer):
    """Proposes what followed the longest n-gram of the end, where it stood first in the text
    (vLLM's ``ngram``: prompt lookup, Saxena 2023)."""

    longest: int = 5
    shortest: int = 2

    def propose(self, tokens: list[int], k: int) -> tuple[list[int], None]:
        for n in range(min(self.longest, len(tokens) - 1), self.shortest - 1, -1):
            end = tokens[-n:]
            for start in range(len(tokens) - n):
                if tokens[start : start + n] == end:
                    return tokens[start + n : start + n + k], None
        return [], None


@dataclass(frozen=True)
class Draft(Proposer):
    """A smaller model: its likeliest token each time, as vLLM's draft models propose by default."""

    model: Model
    #: tokens of the target's head; a draft's own may be padded to more
    vocabulary: int

    @property
    def seconds(self) -> dict[int, list[float]]:
        return self.model.seconds

    def propose(self, tokens: list[int], k: int) -> tuple[list[int], None]:
        proposed: list[int] = []
        for _ in range(k):
            logits = self.model.logits(tokens + proposed, 1)[0, : self.vocabulary]
            proposed.append(int(logits.argmax()))
        return proposed, None


def check_pair(target: Path, draft: Path) -> None:
    """
    Raises:
        UsageError: the two do not have one vocabulary: a draft's token would mean another to the target.
    """
    from quant.offline import load_tokenizer

    ours, theirs = load_tokenizer(target).get_vocab(), load_tokenizer(draft).get_vocab()
    if ours == theirs:
        return
    other = sorted(set(ours.items()) ^ set(theirs.items()), key=lambda x: x[1])[:3]
    raise UsageError(
        f"--draft is {draft}: its tokenizer has {len(theirs)} tokens, the target's {len(ours)}, and they "
        f"differ (such as {', '.join(repr(t) for t, _ in other)}): take a smaller model of the same family"
    )
