"""Drafts of the bundled model, trained on its text in seconds, and the same network written out without a
cache: what the product computes with transformers' modules is compared with it.

    python -m tests.speculation.drafts FOLDER [STEPS]     writes FOLDER/eagle3, and FOLDER/mtp: the bundled
                                                          model as a GLM-4-MoE with a prediction head
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quant.calibration.files import bundled
from quant.calibration.text import evaluation_rows
from quant.offline import load_tokenizer, transformers

TINY = Path(__file__).resolve().parents[2] / "examples" / "tinylm-4m"
WIDTH, HEADS, KV_HEADS, SIZE, INNER, VOCABULARY = 256, 4, 2, 64, 768, 4096
#: Steps of training after which proposals are right often enough to tell one computation from another.
STEPS = 40
#: Tokens that the EAGLE-3 draft can propose: every second one and the first few.
KEPT = torch.tensor(sorted({*range(512), *range(512, VOCABULARY, 2)}))
#: Before which blocks it reads the target's states.
PLACES = (1, 2, 4)


def _normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * gain


def _turned(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions of [B, heads, T, SIZE], halves turned against each other."""
    angles = torch.arange(x.shape[2])[:, None] * 10000.0 ** (-torch.arange(0, SIZE, 2) / SIZE)
    cos, sin = (torch.cat([a, a], -1).to(x.dtype) for a in (angles.cos(), angles.sin()))
    half = SIZE // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Draft(nn.Module):
    """One block over embeddings and states, [B, T, WIDTH] each.

    Args:
        kind: ``eagle3``: attention over both, a head and fc of its own; ``mtp``: both projected to one.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        taken = 2 * WIDTH if kind == "eagle3" else WIDTH
        shapes = {
            "q": (HEADS * SIZE, taken), "k": (KV_HEADS * SIZE, taken), "v": (KV_HEADS * SIZE, taken),
            "o": (WIDTH, HEADS * SIZE), "gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER),
            "join": (WIDTH, len(PLACES) * WIDTH if kind == "eagle3" else 2 * WIDTH),
        }  # fmt: skip
        if kind == "eagle3":
            shapes["head"] = (len(KEPT), WIDTH)
        self.weights = nn.ParameterDict({n: nn.Parameter(0.02 * torch.randn(s)) for n, s in shapes.items()})
        self.gains = nn.ParameterDict(
            {n: nn.Parameter(torch.ones(WIDTH)) for n in ("embedding", "state", "inner", "between", "last")}
        )

    def entered(self, states: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(states, -1) @ self.weights["join"].T if self.kind == "eagle3" else states[0]

    def forward(self, embeds: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The state of every row, and the same normed."""
        w, g = self.weights, self.gains
        pair = torch.cat([_normed(embeds, g["embedding"]), _normed(state, g["state"])], -1)
        rest, given = state, pair
        if self.kind == "mtp":
            rest = pair @ w["join"].T
            given = _normed(rest, g["inner"])
        rows = given.shape[:2]
        q, k, v = ((given @ w[n].T).view(*rows, -1, SIZE).transpose(1, 2) for n in ("q", "k", "v"))
        q, k = _turned(q), _turned(k)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        rest = rest + out.transpose(1, 2).reshape(*rows, -1) @ w["o"].T
        x = _normed(rest, g["between"])
        rest = rest + (nn.functional.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"].T
        return rest, _normed(rest, g["last"])


def _target(path: Path) -> Any:
    return transformers().AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).float().eval()


@torch.no_grad()
def _read(model: Any, rows: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The target's states at PLACES, its last normed state, and its logits."""
    entering = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, given: entering.append(given[0]))
    out = model(rows, output_hidden_states=True)
    handle.remove()
    states = [*out.hidden_states[:-1], entering[0]]
    return [states[p] for p in PLACES], out.hidden_states[-1], out.logits


def trained(kind: str, steps: int) -> Draft:
    """A draft that guesses what the bundled model says of wikitext."""
    torch.manual_seed(0)
    model, draft = _target(TINY), Draft(kind)
    rows = evaluation_rows(load_tokenizer(TINY), bundled("wikitext-2-test"), 64, 256)
    seen = [_read(model, part) for part in rows.split(64)]
    states = [torch.cat([s[0][i] for s in seen]) for i in range(len(PLACES))]
    last, logits = torch.cat([s[1] for s in seen]), torch.cat([s[2] for s in seen])
    embedding, head = model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()
    optimizer = torch.optim.AdamW(draft.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        at = torch.randint(len(rows), (8,))
        entered = draft.entered([s[at, :-1] for s in states] if kind == "eagle3" else [last[at, :-1]])
        embeds = embedding[rows[at, 1:]]
        if kind == "mtp":
            embeds = embeds * (torch.arange(embeds.shape[1]) > 0)[:, None]
        loss = torch.zeros(())
        for further in range(2):  # from the target's states, then from its own
            own, normed = draft(embeds[:, further:], entered)
            wanted = logits[at, 1 + further :]
            if kind == "eagle3":
                said, wanted = normed @ draft.weights["head"].T, wanted[..., KEPT]
            else:
                said = normed @ head.T
            loss = loss + nn.functional.cross_entropy(said.flatten(0, 1), wanted.softmax(-1).flatten(0, 1))
            entered = own[:, :-1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return draft.requires_grad_(False)


_BLOCK = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


def _named(draft: Draft, prefix: str, names: dict[str, str]) -> dict[str, torch.Tensor]:
    held = {**draft.weights, **draft.gains}
    blocks = {f"{prefix}{name}.weight": held[n] for n, name in _BLOCK.items()}
    return {
        n: t.detach().to(torch.bfloat16).contiguous()
        for n, t in (blocks | {name: held[n] for n, name in names.items()}).items()
    }


def write_eagle3(folder: Path, draft: Draft) -> Path:
    """An EAGLE-3 draft of the bundled model, as its authors' own are."""
    folder.mkdir(parents=True)
    tensors = _named(
        draft,
        "midlayer.",
        {
            "join": "fc.weight", "head": "lm_head.weight", "last": "norm.weight",
            "embedding": "midlayer.input_layernorm.weight", "state": "midlayer.hidden_norm.weight",
            "between": "midlayer.post_attention_layernorm.weight",
        },
    )  # fmt: skip
    tensors["d2t"] = KEPT - torch.arange(len(KEPT))
    tensors["t2d"] = torch.isin(torch.arange(VOCABULARY), KEPT)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((TINY / "config.json").read_text())
    config |= {
        "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "tie_word_embeddings": False,
        "draft_vocab_size": len(KEPT), "eagle_aux_hidden_state_layer_ids": list(PLACES),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_mtp(folder: Path, draft: Draft) -> Path:
    """The bundled model as a GLM-4-MoE whose routed experts are zero, so that it computes the same, with a
    prediction head."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    tensors = load_file(TINY / "model.safetensors")
    at = "model.layers.4."
    tensors |= _named(
        draft,
        at,
        {
            "join": f"{at}eh_proj.weight", "embedding": f"{at}enorm.weight", "state": f"{at}hnorm.weight",
            "inner": f"{at}input_layernorm.weight", "between": f"{at}post_attention_layernorm.weight",
            "last": f"{at}shared_head.norm.weight",
        },
    )  # fmt: skip
    for block in (f"{at}mlp.", "model.layers.3.mlp."):  # vLLM builds the family with experts alone
        for name in ("gate_proj", "up_proj", "down_proj"):
            whole = tensors.pop(f"{block}{name}.weight")
            tensors[f"{block}shared_experts.{name}.weight"] = whole
            for expert in range(2):
                tensors[f"{block}experts.{expert}.{name}.weight"] = torch.zeros_like(whole)
        tensors[f"{block}gate.weight"] = torch.zeros(2, WIDTH, dtype=torch.bfloat16)
        tensors[f"{block}gate.e_score_correction_bias"] = torch.zeros(2)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    told = json.loads((TINY / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "hidden_act",
            "dtype", "bos_token_id", "eos_token_id", "attention_bias")  # fmt: skip
    config = {k: told[k] for k in kept} | {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 3, "n_routed_experts": 2, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "moe_intermediate_size": INNER, "tie_word_embeddings": False, "use_qk_norm": False,
        "partial_rotary_factor": 1.0, "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Parallel(nn.Module):
    """A DFlash draft of one block, written out: [B, T, WIDTH] of each of PLACES' states of what was read, and
    the tokens behind, a token and masks, to the states [B, n, WIDTH] of those."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {
            "q_proj": (HEADS * SIZE, WIDTH), "k_proj": (KV_HEADS * SIZE, WIDTH),
            "v_proj": (KV_HEADS * SIZE, WIDTH), "o_proj": (WIDTH, HEADS * SIZE), "gate_proj": (INNER, WIDTH),
            "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER), "fc": (WIDTH, len(PLACES) * WIDTH),
        }  # fmt: skip
        self.weights = nn.ParameterDict({n: nn.Parameter(0.02 * torch.randn(s)) for n, s in shapes.items()})
        gains = {"hidden_norm": WIDTH, "input_layernorm": WIDTH, "post_attention_layernorm": WIDTH,
                 "norm": WIDTH, "q_norm": SIZE, "k_norm": SIZE}  # fmt: skip
        self.gains = nn.ParameterDict({n: nn.Parameter(torch.ones(size)) for n, size in gains.items()})

    def forward(self, states: list[torch.Tensor], embeds: torch.Tensor) -> torch.Tensor:
        w, g = self.weights, self.gains
        context = _normed(torch.cat(states, -1) @ w["fc"].T, g["hidden_norm"])
        given = _normed(embeds, g["input_layernorm"])
        both, read = torch.cat([context, given], 1), context.shape[1]

        def heads(x: torch.Tensor, name: str) -> torch.Tensor:
            return (x @ w[name].T).unflatten(-1, (-1, SIZE)).transpose(1, 2)

        k = _turned(_normed(heads(both, "k_proj"), g["k_norm"]))
        padded = torch.cat([torch.zeros_like(context), given], 1)  # so that its rows have their positions
        q = _turned(_normed(heads(padded, "q_proj"), g["q_norm"]))[:, :, read:]
        out = nn.functional.scaled_dot_product_attention(q, k, heads(both, "v_proj"), enable_gqa=True)
        x = embeds + out.transpose(1, 2).flatten(2) @ w["o_proj"].T
        y = _normed(x, g["post_attention_layernorm"])
        x = x + (nn.functional.silu(y @ w["gate_proj"].T) * (y @ w["up_proj"].T)) @ w["down_proj"].T
        return _normed(x, g["norm"])


#: The token that stands for what a DFlash draft is to guess.
MASK = 5


def trained_parallel(steps: int, guesses: int) -> Parallel:
    """A DFlash draft that guesses what the bundled model says of wikitext."""
    torch.manual_seed(0)
    model, draft = _target(TINY), Parallel()
    rows = evaluation_rows(load_tokenizer(TINY), bundled("wikitext-2-test"), 64, 256)
    states, _, logits = _read(model, rows)
    embedding, head = model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()
    optimizer = torch.optim.AdamW(draft.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        at, end = torch.randint(len(rows), (64,)), int(torch.randint(8, 64 - guesses, ()))
        masks = torch.full((64, guesses), MASK)
        embeds = embedding[torch.cat([rows[at, end : end + 1], masks], 1)]
        said = draft([s[at, :end] for s in states], embeds)[:, 1:] @ head.T
        wanted = logits[at, end : end + guesses].softmax(-1)
        loss = nn.functional.cross_entropy(said.flatten(0, 1), wanted.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return draft.requires_grad_(False)


def write_dflash(folder: Path, draft: Parallel) -> Path:
    """A DFlash draft of the bundled model, as its authors' own are."""
    folder.mkdir(parents=True)

    def place(name: str) -> str:
        if name in ("fc", "hidden_norm", "norm"):
            return f"{name}.weight"
        inside = "self_attn." if name[0] in "qkvo" else "mlp." if name.endswith("_proj") else ""
        return f"layers.0.{inside}{name}.weight"

    held = {**draft.weights, **draft.gains}
    tensors = {place(n): t.detach().to(torch.bfloat16).contiguous() for n, t in held.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((TINY / "config.json").read_text())
    for key in ("layer_types", "mlp_bias", "pretraining_tp", "rope_parameters", "rope_scaling"):
        config.pop(key, None)
    config |= {
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "num_hidden_layers": 1,
        "head_dim": SIZE, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "dflash_config": {"mask_token_id": MASK, "target_layer_ids": [p - 1 for p in PLACES]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_cut(folder: Path, blocks: int) -> Path:
    """The bundled model's first blocks alone: a smaller model of the same tokenizer."""
    shutil.copytree(TINY, folder)
    kept = {
        name: tensor
        for name, tensor in load_file(TINY / "model.safetensors").items()
        if ".layers." not in name or int(name.split(".")[2]) < blocks
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((TINY / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    return folder


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else STEPS
    print(write_eagle3(folder / "eagle3", trained("eagle3", steps)))
    print(write_mtp(folder / "mtp", trained("mtp", steps)))


if __name__ == "__main__":
    main()
