"""What a tensor is for, told from its name: one table for the planner, `inspect`, `verify` and the pipeline.

Names are those of published files, whatever the family. What is a block of the text decoder is told by where
its list of blocks is (:func:`quant.models.place.decoder_list`), and of config.json only their number is
asked, beyond which a block belongs to a head that predicts further tokens (MTP). No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

from quant.checkpoint.header import FLOATS, TensorInfo
from quant.vllm.layers import HEADS, OWN_HEADS

#: ``tower``: of another modality, and what projects it into the decoder; ``mtp``: a head that predicts
#: further tokens; ``router``: chooses experts or gates them; ``attention``: recurrent layers' mixers too.
Role = Literal[
    "tower", "mtp", "head", "embedding", "norm", "router", "shared_experts", "experts", "attention", "mlp",
    "other",
]  # fmt: skip

#: Matrices with a side shorter than this multiply no vector of features: kernels of convolutions, decay
#: rates, coefficients that mix a few streams.
SMALLEST_SIDE = 16
#: Roles of what is no part of the decoder's blocks.
OUTSIDE: frozenset[Role] = frozenset({"tower", "mtp", "head", "embedding"})
#: Role → the parts of a name (between two points) that say so. The first row of which any part is in a name
#: holds.
_PARTS: tuple[tuple[Role, str], ...] = (
    (
        "tower",
        r"visual\w*|vision\w*|audio\w*|image\w*|speech\w*|multi_modal_projector|mm_projector|projector|connector"
        r"|resampler|sam_model|vpm|apm|tts|vte|mlp1|embed_vision|embed_audio",
    ),
    ("tower", r"(?<!transformer\.)encoder"),  # ChatGLM calls its decoder so
    ("mtp", r"mtp\w*|nextn\w*|eh_proj"),
    ("head", "|".join(HEADS)),
    ("norm", r"(\w*norm\w*|ln_\w+)$"),  # the last part alone
    ("embedding", r"embed(?!\w*projection)\w*|wte|wpe|\w*_embeddings?"),
    ("router", r"gate|(\w+_)?router|shared_expert_gate|wg|e_score_correction_bias|expert_bias"),
    ("shared_experts", r"shared_experts?|shared_mlp"),
    ("experts", r"experts|block_sparse_moe\.(input|output)_linear"),
    ("attention", r"\w*attn\w*|\w*attention\w*|mamba|conv"),
    ("mlp", r"mlp|\w*feed_forward|ffn|block_sparse_moe|(gate|up|gate_up|down)_proj|fc1|fc2"),
    ("attention", r"mixer|temporal_block"),
)
_ROLES: tuple[tuple[Role, re.Pattern[str]], ...] = tuple(
    (role, re.compile(rf"(?:^|\.)({pattern})(?:\.|$)")) for role, pattern in _PARTS
)
#: Matrices of adapters that a model brings along (Phi-4 multimodal).
ADAPTER = re.compile(r"(^|\.)lora_[AB](\.|$)")
#: Last parts of the names of tensors that are no matrices of the family but numbers beside the codes of one,
#: in formats that may not be read here.
NUMBERS = re.compile(r"scale|zero|bias|packed|blocks|absmax|quant|shape|idx|codebook|lut|SCB|input_")
#: An expert that has tensors of its own, and its number.
EXPERT = re.compile(r"\.experts\.(\d{1,9})\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|decoder)\.(\d{1,9})\.")


def block_of(name: str) -> int | None:
    """Index of the block that a tensor belongs to, or None: of the decoder, or of a tower.

    >>> block_of("model.layers.12.mlp.up_proj.weight"), block_of("lm_head.weight")
    (12, None)
    """
    match = _BLOCK.search(name)
    return int(match[1]) if match else None


def block_list(name: str) -> str | None:
    """What stands before the block's number in a tensor's name, or None where it belongs to no block.

    >>> block_list("model.layers.12.mlp.up_proj.weight")
    'model.layers.'
    """
    match = _BLOCK.search(name)
    return name[: match.start(1)] if match else None


def kind_of(name: str) -> str:
    """A name with 0 for each of its numbers: what tensors of several blocks, or of several experts, share.

    >>> kind_of("model.layers.12.mlp.experts.3.w1.weight")
    'model.layers.0.mlp.experts.0.w1.weight'
    """
    return _NUMBER.sub("0", name)


def role_of(name: str, blocks: int | None = None, decoder: str | None = None) -> Role:
    """What a tensor is for, by its name, with or without ``.weight``.

    Args:
        blocks: the number of decoder blocks; a later one is ``mtp``. None: not known.
        decoder: what stands before their numbers; blocks of other lists are of a tower, whatever they are
            called. None: not known, and names alone are asked.

    >>> role_of("model.layers.0.mlp.shared_experts.up_proj.weight"), role_of("model.layers.0.mlp.gate.weight")
    ('shared_experts', 'router')
    >>> role_of("ear.layers.0.mlp.up_proj.weight", 2, "mouth.layers.")
    'tower'
    """
    role = _placed(name, decoder)[0]
    index = block_of(name) if blocks is not None and role != "tower" else None
    return "mtp" if index is not None and blocks is not None and index >= blocks else role


def _placed(name: str, decoder: str | None) -> tuple[Role, str]:
    """The role of a name, and the part of it that says so: inside the decoder's list by what follows the
    list, inside others by the list itself."""
    if decoder is None or (listed := block_list(name)) is None:
        return _role(kind_of(name))
    if listed == decoder:
        return _role(kind_of(f"layers.{name.removeprefix(decoder)}"))
    role, part = _role(kind_of(name))
    return (role, part) if role in ("tower", "mtp") else ("tower", listed.removesuffix("."))


@lru_cache(maxsize=4096)
def _role(kind: str) -> tuple[Role, str]:
    """The role of a name whose numbers do not count, and the part of it that says so."""
    module = kind.removesuffix(".weight").removesuffix(".bias")
    for role, pattern in _ROLES:
        if match := pattern.search(module):
            return role, match[1]
    last = module.rpartition(".")[2]
    if (last == "output" and block_of(kind) is None) or module in OWN_HEADS:
        return "head", last
    return "other", ""


#: What older saves hold beside the weights, and no parameter of a model takes: rotary tables and masks.
_LEFTOVERS = re.compile(
    r"\.(inv_freq|masked_bias|attn\.bias|attention\.bias|cos_cached|sin_cached|rotary_emb\.\w+)$"
)


def leftover(info: TensorInfo) -> bool:
    """Whether a tensor is no parameter of any model but a buffer that was saved with the weights: vLLM passes
    over it. A mask has more dimensions than a bias."""
    if not _LEFTOVERS.search(info.name):
        return False
    return not info.name.endswith("n.bias") or len(info.shape) > 1


def leftovers_note(tensors: Iterable[TensorInfo]) -> str | None:
    """What to say of such tensors in a checkpoint; None where there are none."""
    names = [t.name for t in tensors if leftover(t)]
    if not names:
        return None
    kinds = sorted({n.rpartition(".")[2] for n in names})
    return (
        f"{len(names)} leftover {'buffer' if len(names) == 1 else 'buffers'} ({', '.join(kinds)}, such as "
        f"{names[0]}): no parameter of the model, ignored"
    )


def not_quantizable(info: TensorInfo, blocks: int | None, decoder: str | None = None) -> str | None:
    """Why a tensor is no linear of a text decoder block, or None when it is one.

    Judged by name, shape and dtype alone, so that data-free methods take any architecture.

    Args:
        blocks: number of decoder blocks that config.json states: tensors of a later index belong to
            prediction heads (MTP).
        decoder: what stands before their numbers, as :func:`role_of` takes it.
    """
    if not info.name.endswith(".weight"):
        return "not a linear's weight"
    if len(info.shape) != 2:
        return f"{len(info.shape)}-dimensional"
    if info.dtype not in FLOATS:
        return f"stored as {info.dtype}"
    if not all(info.shape):
        return "empty"
    if info.shape[1] < SMALLEST_SIDE:
        return f"of {info.shape[1]} inputs, which are no vector of features"
    return no_linear(info.name, blocks, decoder)


def no_linear(name: str, blocks: int | None, decoder: str | None = None) -> str | None:
    """Why a matrix of that name is no linear of a text decoder block, or None when it is one."""
    role, part = _placed(name, decoder)
    if ADAPTER.search(name):
        return "a matrix of an adapter that is part of the model"
    if role in OUTSIDE:
        return f"part of {part}"
    index = block_of(name)
    if index is None:
        return "outside the decoder blocks"
    if blocks is not None and index >= blocks:
        return f"in block {index}, beyond the {blocks} decoder blocks: a prediction head"
    return {"router": "a router", "norm": "a norm"}.get(role)
