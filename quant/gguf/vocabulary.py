"""The tokenizer of a GGUF file as the files that transformers reads: the way back from
:mod:`quant.gguf.tokenizer`. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quant.errors import CheckpointError, clipped
from quant.gguf.header import Header
from quant.gguf.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNUSED,
    USER_DEFINED,
)

#: Other names that llama.cpp has for a rule of :data:`~quant.gguf.tokenizer.PRE_TOKENIZERS`, or for one that
#: splits alike.
_ALSO = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "pixtral": "llama-bpe",
    "deepseek-r1-qwen": "qwen2", "megrez": "qwen2", "phi-2": "gpt-2",
}  # fmt: skip
#: Rules of models whose tokenizers compose characters first, which llama.cpp leaves out.
_COMPOSED = ("qwen2",)
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def tokenizer_problems(header: Header, rows: int) -> list[str]:
    """What of the tokenizer's keys cannot be, a line each.

    Args:
        rows: of the embedding.
    """
    fields, problems = header.fields, []
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens) or not tokens:
        return ["tokenizer.ggml.tokens is missing: the file holds no tokenizer"]
    if len(tokens) != rows:
        problems.append(f"tokenizer.ggml.tokens has {len(tokens)} tokens, the embedding {rows} rows")
    for key, kinds in (("token_type", int), ("scores", (int, float))):
        values = fields.get(f"tokenizer.ggml.{key}")
        if values is not None and (
            not isinstance(values, list)
            or len(values) != len(tokens)
            or not all(isinstance(v, kinds) for v in values)
        ):
            problems.append(f"tokenizer.ggml.{key} is no number for each of the {len(tokens)} tokens")
    for key in (*_ROLES.values(), "eot"):
        value = fields.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None and (not isinstance(value, int) or not 0 <= value < len(tokens)):
            problems.append(f"tokenizer.ggml.{key}_token_id is {clipped(value)}, of {len(tokens)} tokens")
    model = fields.get("tokenizer.ggml.model")
    if model == "gpt2" and not isinstance(fields.get("tokenizer.ggml.merges"), list):
        problems.append("tokenizer.ggml.merges is missing")
    if model == "llama" and not fields.get("tokenizer.ggml.scores"):
        problems.append("tokenizer.ggml.scores is missing")
    return problems


def tokenizer_files(header: Header, rows: int) -> dict[str, Any]:
    """By name: ``tokenizer.json``, ``tokenizer_config.json`` and ``generation_config.json`` as objects,
    ``chat_template.jinja`` as text where there is one.

    Raises:
        CheckpointError: keys that cannot be, or a tokenizer that is not known here.
    """
    file, fields = header.files[0], header.fields
    if problems := tokenizer_problems(header, rows):
        raise CheckpointError(f"{file}: {'; '.join(problems)}")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    model = fields.get("tokenizer.ggml.model")
    if model == "gpt2":
        made = _bytes(header, tokens, kinds)
    elif model == "llama":
        made = _pieces(header, tokens, kinds)
    else:
        raise CheckpointError(
            f"{file}: tokenizer.ggml.model is {clipped(model)}: gpt2 and llama are read: give a checkpoint "
            "with its tokenizer as --source"
        )
    ids = {role: fields.get(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()}
    named = {role: tokens[i] for role, i in ids.items() if i is not None}
    add_bos = bool(fields.get("tokenizer.ggml.add_bos_token", model == "llama"))
    add_eos = bool(fields.get("tokenizer.ggml.add_eos_token", False))
    made["added_tokens"] = [
        {
            "id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind != USER_DEFINED,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED) or (i in ids.values() and kind not in (BYTE, UNUSED, NORMAL))
    ]  # fmt: skip
    made["post_processor"] = _around(
        named.get("bos") if add_bos else None, named.get("eos") if add_eos else None, ids, model == "gpt2"
    )
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": token for role, token in named.items()},
    }
    ends = [i for key in ("eos", "eot") if isinstance(i := fields.get(f"tokenizer.ggml.{key}_token_id"), int)]
    generation = {
        **({"bos_token_id": ids["bos"]} if ids["bos"] is not None else {}),
        **({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}),
        **({"pad_token_id": ids["pad"]} if ids["pad"] is not None else {}),
    }
    files: dict[str, Any] = {
        "tokenizer.json": made,
        "tokenizer_config.json": settings,
        "generation_config.json": generation,
    }
    if isinstance(template := fields.get("tokenizer.chat_template"), str) and template:
        files["chat_template.jinja"] = template
    return files


def _around(bos: str | None, eos: str | None, ids: Mapping[str, Any], bytes_: bool) -> dict[str, Any] | None:
    """What is put before and behind a text."""
    if bos is None and eos is None:
        return (
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
            if (bytes_)
            else None
        )

    def around(letter: str, number: int) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = [{"Sequence": {"id": letter, "type_id": number}}]
        if bos is not None:
            parts.insert(0, {"SpecialToken": {"id": bos, "type_id": number}})
        if eos is not None:
            parts.append({"SpecialToken": {"id": eos, "type_id": number}})
        return parts

    special = {
        token: {"id": token, "ids": [ids[role]], "tokens": [token]}
        for role, token in (("bos", bos), ("eos", eos))
        if token is not None
    }
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": special,
    }


def _file(
    normalizer: Any, pre_tokenizer: Any, decoder: Any, vocabulary: Mapping[str, int], **model: Any
) -> dict[str, Any]:
    """A tokenizer.json of BPE without its added tokens."""
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": dict(vocabulary),
        }
        | model,
    }  # fmt: skip


def _bytes(header: Header, tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    """Byte-level BPE by the rule that ``tokenizer.ggml.pre`` names."""
    named = header.fields.get("tokenizer.ggml.pre")
    rule = _ALSO.get(str(named), named)
    row = next((r for r in PRE_TOKENIZERS if r[2] == rule), None)
    if row is None:
        raise CheckpointError(
            f"{header.files[0]}: tokenizer.ggml.pre is {clipped(named)}: known are "
            f"{', '.join(sorted([*_ALSO, *(r[2] for r in PRE_TOKENIZERS)]))}: give a checkpoint with its "
            "tokenizer as --source"
        )
    steps: list[dict[str, Any]] = []
    for word in row[0]:
        if word == "digit":
            steps.append({"type": "Digits", "individual_digits": True})
        elif word != "bytes":
            split = {"type": "Split", "pattern": {"Regex": word}, "behavior": "Isolated", "invert": False}
            steps.append(split)
    own = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps.append(own | {"use_regex": "bytes" in row[0]})
    return _file(
        {"type": "NFC"} if rule in _COMPOSED else None,
        steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        own | {"use_regex": True},
        _kept(tokens, kinds, (UNUSED,)),
        merges=list(header.fields["tokenizer.ggml.merges"]),
        ignore_merges=bool(row[1]),
    )


def _kept(tokens: Sequence[str], kinds: Sequence[int], left: tuple[int, ...]) -> dict[str, int]:
    return {t: i for i, (t, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind not in left}


def _pieces(header: Header, tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    """SentencePiece's BPE. Its scores say in which order pieces are joined: every way to make a piece of two
    others is a merge, the best score first."""
    fields = header.fields
    vocabulary = _kept(tokens, kinds, (UNUSED,))
    scores: Sequence[float] = fields["tokenizer.ggml.scores"]
    joined = {t: i for t, i in vocabulary.items() if kinds[i] in (NORMAL, USER_DEFINED)}
    merges = sorted(_merges(joined), key=lambda m: (-scores[m[2]], m[0], m[1]))
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [*([{"type": "Prepend", "prepend": "▁"}] if prefix else []), spaces]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _file(
        {"type": "Sequence", "normalizers": steps},
        None,
        {"type": "Sequence", "decoders": decoders},
        vocabulary,
        merges=[f"{tokens[a]} {tokens[b]}" for a, b, _ in merges],
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=BYTE in kinds,
    )


def _merges(vocabulary: Mapping[str, int]) -> Iterator[tuple[int, int, int]]:
    """Every piece that two others make: their ids and its own."""
    for piece, own in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                yield left, right, own
