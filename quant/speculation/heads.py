"""Proposers that read the target's hidden states: the prediction heads that a checkpoint has itself (MTP,
DeepSeek-V3, arXiv 2412.19437) and EAGLE-3 drafts (arXiv 2503.01840), computed as vLLM computes them.

Row i of such a network reads the target's state after token i and the embedding of token i + 1, and says
token i + 2; its own state then stands in for the target's, for as many more tokens as are wanted. Rows of
tokens that the target has judged are computed from the target's states, as in vLLM
(``vllm/v1/spec_decode/llm_base_proposer.py``).
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quant.accelerator import synchronize
from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.errors import CheckpointError, clipped, first_line
from quant.offline import transformers
from quant.speculation.proposers import Model, Proposer
from quant.vllm.config import block_count, drafting_blocks, model_types, whole_number, without_quantization
from quant.vllm.speculation import HEADS, HeadLayout, eagle3_config, eagle3_places


class Unmeasured(Exception):
    """What is not computed here, and why; vLLM may well run it."""


@dataclass
class Network:
    """What proposes: one or a few blocks over pairs of embedding and state.

    Attributes:
        body: transformers' decoder of those blocks, its last norm taken out; it takes pairs as embeddings.
        norm, head: what makes logits [rows, V'] of its states.
        embed: embedding of the target's tokens.
        enter: the target's states at ``places``, [rows, H] each, to what the first pass takes.
        join: embeddings and states to what the body takes.
        normed: whether its normed state is what the next token is proposed from.
        masked: whether the embedding of the first row is zero.
        offsets: int64 [V'], what is added to a proposed id to get the target's; None: nothing.
    """

    body: Any
    norm: Any
    head: Any
    embed: Any
    places: tuple[int, ...]
    enter: Any
    join: Any
    normed: bool
    masked: bool
    offsets: torch.Tensor | None = None


class Head(Proposer):
    """Proposes by a network over a target's hidden states; always its likeliest token."""

    def __init__(self, target: Model, network: Network):
        self.target, self.network = target, network
        target.watch(network.places)
        self._seconds: dict[int, list[float]] = {}
        self._cache = transformers().DynamicCache()
        self._known: list[int] = []  # tokens whose rows are in the cache, and one more
        self._rows = 0

    @property
    def seconds(self) -> dict[int, list[float]]:
        return self._seconds

    @torch.no_grad()
    def propose(self, tokens: list[int], k: int) -> tuple[list[int], None]:
        """The target has read all tokens but the last."""
        last = len(tokens) - 1
        shared = 0
        while shared < min(len(self._known), last) and self._known[shared] == tokens[shared]:
            shared += 1
        first = max(shared - 1, 0)
        if self._rows > first:
            self._cache.crop(first - self._rows)
            self._rows = first
        states = self.network.enter([self.target.states(place)[first:last] for place in self.network.places])
        logits, state = self._pass(tokens[first + 1 :], states)
        self._known = list(tokens)
        proposed = [self._token(logits)]
        while len(proposed) < k:
            logits, state = self._pass(proposed[-1:], state)
            proposed.append(self._token(logits))
        return proposed, None

    def _pass(self, tokens: Sequence[int], states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [V'] and state [1, H] of the last of some new rows."""
        net, begun = self.network, time.perf_counter()
        embeds = net.embed(torch.tensor(list(tokens), device=states.device))
        if net.masked and self._rows == 0:
            embeds[0] = 0
        given = net.join(embeds.to(states.dtype), states)[None]
        out = net.body(inputs_embeds=given, past_key_values=self._cache, use_cache=True)
        state = out.last_hidden_state[0, -1:]
        normed = net.norm(state)
        logits = net.head(normed)[0].float()
        synchronize(states.device)
        self._rows += len(tokens)
        self._seconds.setdefault(len(tokens), []).append(time.perf_counter() - begun)
        return logits, normed if net.normed else state

    def _token(self, logits: torch.Tensor) -> int:
        best = int(logits.argmax())
        return best if self.network.offsets is None else best + int(self.network.offsets[best])


# -- heads of the checkpoint itself --------------------------------------------------------------------------


def native_head(target: Model, scratch: Path) -> Head:
    """The checkpoint's own prediction head.

    Args:
        scratch: folder for its block as a model of one block.

    Raises:
        Unmeasured: of a family or a kind that is not computed here.
        CheckpointError: tensors of it are missing.
    """
    checkpoint = open_checkpoint(target.folder)
    layout = next((HEADS[t] for t in model_types(checkpoint.config) if t in HEADS), None)
    if layout is None:
        raise Unmeasured(
            f"the heads of {', '.join(sorted(HEADS))} are computed here, not those of "
            f"{next(iter(model_types(checkpoint.config)), 'this family')}"
        )
    if (count := drafting_blocks(checkpoint.config) or 1) != 1:
        raise Unmeasured(f"it has {count} heads; one is computed here")
    blocks = block_count(checkpoint.config)
    assert blocks is not None
    prefix = layout.start.format(blocks=blocks)
    body = _one_block(checkpoint, blocks, layout, scratch / "head", target)
    size, dtype, device = body.config.hidden_size, target.model.dtype, target.device

    def weight(name: str) -> torch.Tensor:
        if prefix + name not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: its prediction head has no {prefix}{name}")
        return checkpoint.read(prefix + name).to(device, dtype)

    before, state, last = (
        _filled_norm(body.norm, weight(n)) for n in (layout.embedding, layout.state, layout.last)
    )
    projection = torch.nn.Linear(2 * size, size, bias=False, device=device, dtype=dtype)
    projection.weight = torch.nn.Parameter(weight(layout.projection))
    body.norm = torch.nn.Identity()

    def join(embeds: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return projection(torch.cat([before(embeds), state(states)], -1))

    model = target.model
    return Head(
        target,
        Network(
            body.eval(), last, model.get_output_embeddings(), model.get_input_embeddings(),
            (target.blocks + 1,), lambda states: states[0], join, layout.normed, layout.masked,
        ),
    )  # fmt: skip


def _one_block(checkpoint: Checkpoint, blocks: int, layout: HeadLayout, folder: Path, target: Model) -> Any:
    """transformers' decoder of a checkpoint's drafting block alone, so that its masks, positions and cache
    are the family's own."""
    from safetensors.torch import save_file

    prefix = layout.block.format(blocks=blocks)
    beside = (*layout.shared, layout.embedding, layout.state, layout.last, layout.projection)
    tensors = {
        f"model.layers.0.{name.removeprefix(prefix)}": checkpoint.read(name)
        for name in checkpoint.tensors
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(beside)
    }
    config = dict(without_quantization(checkpoint.config))
    size = config["hidden_size"]
    tensors["model.embed_tokens.weight"] = torch.zeros(1, size, dtype=target.model.dtype)
    tensors["model.norm.weight"] = torch.ones(size, dtype=target.model.dtype)
    for key, value in list(config.items()):
        if isinstance(value, list) and len(value) >= blocks and key.endswith(("_types", "_layers")):
            config[key] = [value[blocks] if len(value) > blocks else value[-1]]
    if layout.kind:
        config["layer_types"] = [layout.kind]
    config |= {
        "num_hidden_layers": 1, "num_nextn_predict_layers": 0, "vocab_size": 1, "tie_word_embeddings": True,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if "first_k_dense_replace" in config:
        config["first_k_dense_replace"] = int(blocks < config["first_k_dense_replace"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    try:
        model, told = transformers().AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=target.model.dtype, output_loading_info=True
        )
    except Exception as error:  # transformers raises many kinds
        raise Unmeasured(f"transformers does not build its block alone ({first_line(error)})") from error
    if wrong := sorted([*told["missing_keys"], *told["mismatched_keys"], *told["unexpected_keys"]], key=str):
        raise Unmeasured(f"transformers does not find its block complete: {str(wrong[0])} and others")
    return model.get_decoder().to(target.device)


def _filled_norm(like: torch.nn.Module, weight: torch.Tensor) -> torch.nn.Module:
    """A norm of the same kind with other gains."""
    norm = copy.deepcopy(like)
    norm.weight = torch.nn.Parameter(weight)
    return norm


# -- EAGLE-3 -------------------------------------------------------------------------------------------------


class _First(torch.nn.Module):
    """EAGLE-3's first block: attention over the normed embedding beside the normed state."""

    def __init__(self, layer: Any, width: int, before: bool):
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.hidden_norm = copy.deepcopy(layer.input_layernorm)
        self.before = before
        for name in ("q_proj", "k_proj", "v_proj"):
            old = getattr(self.self_attn, name)
            bias = old.bias is not None
            setattr(
                self.self_attn,
                name,
                torch.nn.Linear(2 * width, old.out_features, bias, dtype=old.weight.dtype),
            )

    def forward(self, hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
        embeds, state = hidden_states.chunk(2, -1)
        normed = self.hidden_norm(state)
        rest = normed if self.before else state
        out, _ = self.self_attn(hidden_states=torch.cat([self.input_layernorm(embeds), normed], -1), **named)
        out = rest + out
        return out + self.mlp(self.post_attention_layernorm(out))


def eagle3(target: Model, path: Path) -> Head:
    """A draft of EAGLE-3 for a target.

    Raises:
        Unmeasured: a variant that is not computed here.
        CheckpointError: a draft that is not complete, or was made for another model.
    """
    checkpoint = open_checkpoint(path)
    config = eagle3_config(checkpoint.config)
    if reason := _other_kind(config):
        raise Unmeasured(f"{reason}; llama's blocks behind one fc are computed here")
    size, dtype = demand_sizes(config, path), target.model.dtype
    places = read_places(config, path, target)
    names = {n.removeprefix("model.").replace("midlayer.", "layers.0."): n for n in checkpoint.tensors}
    _demand_tensors({n: checkpoint.info(named).shape for n, named in names.items()}, path)
    shapes = {n: checkpoint.info(named).shape for n, named in names.items()}
    demand_shapes(shapes, config, len(places), path, target)
    tensors = {n: checkpoint.read(named) for n, named in names.items()}
    body = decoder(config, path, dtype)
    body.layers[0] = _First(body.layers[0], size, bool(config.get("norm_before_residual")))
    fill(body, {n: t for n, t in tensors.items() if n.startswith(_BLOCKS)}, path)
    norm, body.norm = body.norm, torch.nn.Identity()
    body.to(target.device, dtype).eval()
    norm.to(target.device, dtype)
    fc = linear(tensors["fc.weight"], target)
    head, offsets = draft_head(tensors, path, target)
    embed = target.model.get_input_embeddings()
    if "embed_tokens.weight" in tensors:
        own = tensors["embed_tokens.weight"]
        embed = torch.nn.Embedding.from_pretrained(own.to(target.device, dtype))

    def join(embeds: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return torch.cat([embeds, states], -1)

    def enter(states: Sequence[torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = fc(torch.cat(list(states), -1))
        return out

    return Head(
        target,
        Network(
            body, norm, head, embed, places, enter, join, bool(config.get("norm_output")), False, offsets
        ),
    )


def _other_kind(config: Mapping[str, Any]) -> str:
    """What of a draft is not computed here; empty where all is."""
    if config.get("model_type", "llama") != "llama":
        return f"a draft of {config['model_type']} blocks"
    own = config.get("eagle_config") or {}
    for key in ("norm_before_fc", "fc_norm", "parallel_drafting"):
        if config.get(key) or own.get(key):
            return f"a draft with {key}"
    return "a draft that reads one state" if own.get("use_aux_hidden_state") is False else ""


#: How the names of an EAGLE-3 draft's tensors begin that its blocks and last norm have, and the others.
_BLOCKS = ("layers.", "norm.")
_BESIDE = ("fc.weight", "lm_head.weight", "embed_tokens.weight", "d2t", "t2d", "mask_hidden")


def demand_sizes(config: Mapping[str, Any], path: Path) -> int:
    """
    Returns:
        the width of the draft's states.

    Raises:
        CheckpointError: its config.json does not state how large it is.
    """
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if whole_number(config.get(key)) is None:
            said = f"is {clipped(config[key])}" if key in config else "is missing"
            raise CheckpointError(
                f"{path}: {key} of its config.json {said}, a draft has a whole number of at least 1 there: "
                "download the draft again, or leave --draft out"
            )
    return int(config["hidden_size"])


def read_places(config: Mapping[str, Any], path: Path, target: Model) -> tuple[int, ...]:
    """Before which of the target's blocks its states are read, in order; ``blocks``: before its last norm.

    Raises:
        CheckpointError: there is no such block.
    """
    key, blocks = "eagle_aux_hidden_state_layer_ids", target.blocks
    stated = config.get(key)
    places = stated or eagle3_places(blocks)
    whole = isinstance(places, (list, tuple)) and all(type(place) is int for place in places)
    if not whole:
        raise CheckpointError(
            f"{path}: {key} of its config.json is {clipped(stated)}: a list of whole numbers from 0 to "
            f"the target's {blocks} blocks is needed: download the draft again, or leave --draft out"
        )
    if beyond := [place for place in places if not 0 <= place <= blocks]:
        says = (
            f"{key} has {beyond[0]}" if stated else f"its config.json has no {key}, which makes {beyond[0]}"
        )
        raise another(path, target, f"{says}: it reads the state before block {beyond[0]} of {blocks}")
    return tuple(sorted(set(places)))


def _demand_tensors(names: Iterable[str], path: Path) -> None:
    """
    Raises:
        CheckpointError: one that would be left out, or is missing.
    """
    names = set(names)
    if others := sorted(n for n in names if not n.startswith(_BLOCKS) and n not in _BESIDE):
        raise CheckpointError(
            f"{path}: {others[0]} has no place in an EAGLE-3 draft, which has layers, norm, "
            f"{', '.join(_BESIDE)}: leave --draft out, or export the draft without it"
        )
    if "fc.weight" not in names:
        raise CheckpointError(
            f"{path}: fc.weight is missing, which an EAGLE-3 draft has: download the draft again, or leave "
            "--draft out"
        )


def demand_shapes(
    shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], count: int, path: Path, target: Model
) -> None:
    """What stands between the target and the draft's blocks: each side of it must fit.

    Args:
        count: of the target's states that ``fc`` reads.

    Raises:
        CheckpointError: one does not.
    """
    size, width = int(config["hidden_size"]), int(target.model.config.get_text_config().hidden_size)
    rows = config.get("draft_vocab_size") or config["vocab_size"]
    for name in ("lm_head.weight", "embed_tokens.weight"):
        if name not in shapes and size != width:
            raise another(
                path, target,
                f"it has no {name} and takes the target's, of {width} numbers a token, but its hidden_size "
                f"is {size}",
            )  # fmt: skip
    wanted = {
        "fc.weight": ((size, count * width), f"{count} states of {width} numbers to one of {size}"),
        "lm_head.weight": ((rows, size), f"a state of {size} numbers to {rows} tokens"),
    }
    if len(own := shapes.get("embed_tokens.weight", ())) == 2 and own[0] >= target.vocabulary:
        wanted["embed_tokens.weight"] = ((own[0], size), f"{size} numbers for each token")
    else:
        said = f"{size} numbers for each of the target's {target.vocabulary} tokens"
        wanted["embed_tokens.weight"] = ((target.vocabulary, size), said)
    for name, (shape, what) in wanted.items():
        if name in shapes and tuple(shapes[name]) != shape:
            raise another(
                path, target, f"{name} is {list(shapes[name])}, and {what} makes {list(shape)}"
            )  # fmt: skip


def decoder(config: Mapping[str, Any], path: Path, dtype: torch.dtype) -> Any:
    """transformers' decoder of a draft's blocks, without an embedding.

    Raises:
        CheckpointError: there is none of that config.json.
    """
    package = transformers()
    try:
        return package.AutoModel.from_config(
            package.AutoConfig.for_model(**{**config, "vocab_size": 1, "pad_token_id": None}), dtype=dtype
        )
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(
            f"{path}: transformers builds no blocks of its config.json ({first_line(error)}): "
            "download the draft again, or leave --draft out"
        ) from error


def another(path: Path, target: Model, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {reason}: it was made for another model than {target.path}: name the draft that was "
        "trained for it, or leave --draft out"
    )


def fill(body: Any, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    try:
        told = body.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        said = str(error).splitlines()
        raise CheckpointError(f"{path}: not as its config.json says: {said[-1].strip()}") from error
    missing = [n for n in told.missing_keys if not n.startswith("embed_tokens")]
    if wrong := [*missing, *told.unexpected_keys]:
        kind = "lacks" if missing else "has no place for"
        raise CheckpointError(f"{path}: a draft of its config.json {kind} {wrong[0]}")


def linear(weight: torch.Tensor, target: Model) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.to(target.device, target.model.dtype))
    return linear


def draft_head(
    tensors: Mapping[str, torch.Tensor], path: Path, target: Model
) -> tuple[Any, torch.Tensor | None]:
    """What makes logits, and what is added to the ids of a smaller vocabulary."""
    if "lm_head.weight" not in tensors:
        return target.model.get_output_embeddings(), None
    head = linear(tensors["lm_head.weight"], target)
    rows = head.out_features
    offsets = tensors.get("d2t", torch.zeros(rows, dtype=torch.int64))
    if offsets.shape != (rows,) or offsets.is_floating_point():
        raise CheckpointError(
            f"{path}: d2t is {list(offsets.shape)} of {offsets.dtype}, and its lm_head.weight of {rows} "
            f"tokens needs {rows} whole numbers: download the draft again, or leave --draft out"
        )
    ids = torch.arange(rows) + offsets
    if int(ids.min()) < 0 or int(ids.max()) >= target.vocabulary:
        raise another(path, target, f"d2t names tokens beyond the {target.vocabulary} of the target")
    return head, offsets
