"""DFlash drafts (block diffusion drafting): a few blocks that guess several tokens in one pass, computed as
vLLM computes them (``models/qwen3_dflash.py``, ``v1/spec_decode/dflash.py``).

The target's states of what it has read are projected to one, normed, and give keys and values to every block.
The queries are the token that follows and a mask for every guess, at the positions behind; they see the
context and one another, later ones too, and mask i says the i-th guess. So a pass of other length is another
guess: acceptance is that of the number of proposals it was measured with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quant.accelerator import synchronize
from quant.checkpoint.reader import open_checkpoint
from quant.errors import CheckpointError, clipped
from quant.speculation.heads import (
    Unmeasured,
    another,
    decoder,
    demand_shapes,
    demand_sizes,
    draft_head,
    fill,
    linear,
    read_places,
)
from quant.speculation.proposers import Model, Proposer
from quant.vllm.speculation import dflash_config

#: Tensors of a draft beside its blocks and last norm.
_BESIDE = ("fc.weight", "hidden_norm.weight", "lm_head.weight", "embed_tokens.weight", "d2t", "t2d")


@dataclass
class Parts:
    """A draft's network.

    Attributes:
        body: transformers' decoder of its blocks, with its last norm; its attention is computed here.
        fc, enter_norm: of the target's states at ``places``, side by side, to one state.
        embed, head: of the target's tokens, and what makes logits [rows, V'].
        mask: the token that stands for what is to be guessed.
        offsets: int64 [V'], what is added to a proposed id to get the target's; None: nothing.
    """

    body: Any
    fc: Any
    enter_norm: Any
    embed: Any
    head: Any
    places: tuple[int, ...]
    mask: int
    offsets: torch.Tensor | None


class DFlash(Proposer):
    """Proposes by a DFlash draft; always its likeliest tokens."""

    def __init__(self, target: Model, parts: Parts):
        self.target, self.parts = target, parts
        target.watch(parts.places)
        self._seconds: dict[int, list[float]] = {}
        self._read: list[int] = []
        #: Keys and values [heads, rows, D] of what was read, a pair a block.
        self._context: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def seconds(self) -> dict[int, list[float]]:
        return self._seconds

    @torch.no_grad()
    def propose(self, tokens: list[int], k: int) -> tuple[list[int], None]:
        """The target has read all tokens but the last."""
        net, read, begun = self.parts, tokens[:-1], time.perf_counter()
        shared = 0
        while shared < min(len(self._read), len(read)) and self._read[shared] == read[shared]:
            shared += 1
        if shared < len(read):
            given = torch.cat([self.target.states(p)[shared : len(read)] for p in net.places], -1)
            self._keep(net.enter_norm(net.fc(given)), shared)
        else:
            self._context = [(key[:, :shared], value[:, :shared]) for key, value in self._context]
        self._read = read
        ids = torch.tensor([tokens[-1], *[net.mask] * k], device=self.target.device)
        x, turn = net.embed(ids).to(self.target.model.dtype), self._turn(len(read), k + 1)
        for layer, (key, value) in zip(net.body.layers, self._context, strict=True):
            normed = layer.input_layernorm(x)
            attn = layer.self_attn
            q = _turned(attn.q_norm(_heads(attn.q_proj(normed), attn)).transpose(0, 1), turn)
            own_key, own_value = _keys(attn, normed, turn)
            seen = torch.nn.functional.scaled_dot_product_attention(
                q[None], torch.cat([key, own_key], 1)[None], torch.cat([value, own_value], 1)[None],
                scale=attn.head_dim**-0.5, enable_gqa=True,
            )[0]  # fmt: skip
            x = x + attn.o_proj(seen.transpose(0, 1).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        best = net.head(net.body.norm(x[1:])).argmax(-1).cpu()
        synchronize(self.target.device)
        self._seconds.setdefault(k + 1, []).append(time.perf_counter() - begun)
        return [int(b) for b in (best if net.offsets is None else best + net.offsets[best])], None

    def _keep(self, states: torch.Tensor, first: int) -> None:
        """Keys and values of states [rows, H] that were read behind the first so many."""
        turn = self._turn(first, len(states))
        new = [_keys(layer.self_attn, states, turn) for layer in self.parts.body.layers]
        if first:
            new = [
                (torch.cat([old_key[:, :first], key], 1), torch.cat([old_value[:, :first], value], 1))
                for (old_key, old_value), (key, value) in zip(self._context, new, strict=True)
            ]
        self._context = new

    def _turn(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [count, D] of positions from the first on."""
        positions = torch.arange(first, first + count, device=self.target.device)[None]
        like = torch.empty(0, dtype=self.target.model.dtype, device=self.target.device)
        cos, sin = self.parts.body.rotary_emb(like, positions)
        return cos[0], sin[0]


def _heads(x: torch.Tensor, attn: Any) -> torch.Tensor:
    """[rows, heads · D] as [rows, heads, D]."""
    return x.unflatten(-1, (-1, attn.head_dim))


def _keys(
    attn: Any, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [KV heads, rows, D] of states [rows, H]."""
    key = attn.k_norm(_heads(attn.k_proj(x), attn)).transpose(0, 1)
    return _turned(key, turn), _heads(attn.v_proj(x), attn).transpose(0, 1)


def _turned(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary positions of [heads, rows, D], halves turned against each other."""
    cos, sin = turn
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def dflash(target: Model, path: Path) -> DFlash:
    """A DFlash draft for a target.

    Raises:
        Unmeasured: a variant that is not computed here.
        CheckpointError: a draft that is not complete, or was made for another model.
    """
    checkpoint = open_checkpoint(path)
    config = dflash_config(checkpoint.config)
    if reason := _other_kind(config, path):
        raise Unmeasured(f"{reason}; full attention of Qwen3's blocks both ways is computed here")
    size, dtype = demand_sizes(config, path), target.model.dtype
    mask = config.get("mask_token_id")
    if type(mask) is not int or not 0 <= mask < target.vocabulary:
        raise CheckpointError(
            f"{path}: mask_token_id of its config.json is {clipped(mask)}: a token of the target's "
            f"{target.vocabulary} is needed: download the draft again, or leave --draft out"
        )
    if "eagle_aux_hidden_state_layer_ids" not in config:
        raise CheckpointError(
            f"{path}: its config.json has no target_layer_ids, which say what of the target it reads: "
            "download the draft again, or leave --draft out"
        )
    places = read_places(config, path, target)
    names = {n.removeprefix("model.").replace("midlayer.", "layers.0."): n for n in checkpoint.tensors}
    for needed in ("fc.weight", "hidden_norm.weight"):
        if needed not in names:
            raise CheckpointError(
                f"{path}: {needed} is missing, which a DFlash draft has: download the draft again, or leave "
                "--draft out"
            )
    shapes = {n: checkpoint.info(named).shape for n, named in names.items()}
    demand_shapes(shapes, config, len(places), path, target)
    if tuple(shapes["hidden_norm.weight"]) != (size,):
        raise another(path, target, f"hidden_norm.weight is {list(shapes['hidden_norm.weight'])} of {size}")
    tensors = {n: checkpoint.read(named) for n, named in names.items()}
    body = decoder(config, path, dtype)
    fill(body, {n: t for n, t in tensors.items() if n not in _BESIDE}, path)
    enter_norm = type(body.norm)(size, body.config.rms_norm_eps)
    enter_norm.weight = torch.nn.Parameter(tensors["hidden_norm.weight"])
    head, offsets = draft_head(tensors, path, target)
    embed = target.model.get_input_embeddings()
    if "embed_tokens.weight" in tensors:
        embed = torch.nn.Embedding.from_pretrained(tensors["embed_tokens.weight"].to(target.device, dtype))
    return DFlash(
        target,
        Parts(
            body.to(target.device, dtype).eval(), linear(tensors["fc.weight"], target),
            enter_norm.to(target.device, dtype), embed, head, places, mask, offsets,
        ),
    )  # fmt: skip


def _other_kind(config: Mapping[str, Any], path: Path) -> str:
    """What of a draft is not computed here; empty where all is."""
    names = config.get("architectures") or ["DFlashDraftModel"]
    if config["model_type"] != "qwen3" or names[0] not in ("DFlashDraftModel", "DFlashSpeculator"):
        return f"a draft of {names[0]}, {config['model_type']} blocks"
    kinds = set(config.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"} or config.get("use_swa"):
        return "a draft with windows"
    if (path / "mask_embedding.pt").exists():
        return "a draft with mask_embedding.pt"
    for key in ("causal", "is_causal", "sample_from_anchor", "attention_sink_bias"):
        if config.get(key):
            return f"a draft with {key}"
    for key, usual in (
        ("use_aux_hidden_state", True),
        ("is_neox_style", True),
        ("attention_value_scale", None),
    ):
        if config.get(key, usual) != usual:
            return f"a draft with {key} {config[key]}"
    return ""
