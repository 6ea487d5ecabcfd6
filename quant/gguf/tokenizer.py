"""A Hugging Face tokenizer as llama.cpp has it: tokens with kinds and scores, merges, and which of its rules
splits text into words. No torch.

llama.cpp knows two kinds that the families here have (`src/llama-vocab.cpp`): ``gpt2``, byte-level BPE, whose
rule for words is compiled in and chosen by the name in ``tokenizer.ggml.pre``; ``llama``, SentencePiece's
BPE, which joins the pair of the best score.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.errors import CheckpointError, clipped

if TYPE_CHECKING:
    from gguf import GGUFWriter

#: What a token is (``enum llama_token_type``).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
#: Score of a token that no merge makes, and of those that are found before any merging.
_NEVER, _ADDED = -1e9, -1000.0
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+@|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*@|"
)
_LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: How ``tokenizer.json`` splits text, a step each, and whether whole words are looked up before merging →
#: llama.cpp's name of the same rule. None: of no matter.
PRE_TOKENIZERS: tuple[tuple[tuple[str, ...], bool | None, str], ...] = (
    (("bytes",), None, "gpt-2"),
    (("digit", "bytes"), None, "smollm"),
    ((_WORD + r"\p{N}{1,3}" + _REST,), True, "llama-bpe"),
    ((_WORD + r"\p{N}{1,3}" + _REST,), False, "smaug-bpe"),
    ((_WORD + r"\p{N}" + _REST,), None, "qwen2"),
    ((_CASES.replace("@", "") + r"\p{N}" + _LINES,), None, "tekken"),
    ((_CASES.replace("@", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"\p{N}{1,3}" + _LINES,), None, "gpt-4o"),
)
#: Texts of tokens that end a turn, of the families that are written.
_ENDS_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in GGUF's terms.

    Attributes:
        model: ``gpt2`` or ``llama``.
        pre: llama.cpp's rule for words.
        tokens: by id, as many as the embedding has rows.
        kinds: of each token.
        scores: of each token; empty for ``gpt2``.
        merges: ``left right`` in the order they are tried; empty for others than ``gpt2``.
        special: ids by role: ``bos``, ``eos``, ``unk``, ``pad``, ``eot``.
        add_bos, add_eos: whether a text is encoded with them around it.
        space_prefix: whether a text is encoded as if a space stood before it; None for ``gpt2``.
        template: of chats; None: it has none.
        notes: what llama.cpp does otherwise.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    special: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    space_prefix: bool | None = None
    template: str | None = None
    notes: tuple[str, ...] = ()

    def add_to(self, writer: GGUFWriter) -> None:
        """Its keys."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        if self.scores:
            writer.add_token_scores(list(self.scores))
        writer.add_token_types(list(self.kinds))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        for role, add in (
            ("bos", writer.add_bos_token_id),
            ("eos", writer.add_eos_token_id),
            ("unk", writer.add_unk_token_id),
            ("pad", writer.add_pad_token_id),
            ("eot", writer.add_eot_token_id),
        ):
            if role in self.special:
                add(self.special[role])
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        if self.template:
            writer.add_chat_template(self.template)


def read_vocabulary(folder: Path, config: Mapping[str, Any], rows: int) -> Vocabulary:
    """The tokenizer of a checkpoint.

    Args:
        config: config.json's text part, which may name special tokens.
        rows: of the embedding; ids beyond the tokenizer's are filled, tokens beyond the rows left out.

    Raises:
        CheckpointError: there is none, or llama.cpp has no tokenizer of its kind.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        other = (
            "tokenizer.model is there alone" if (folder / "tokenizer.model").is_file() else "it is missing"
        )
        raise CheckpointError(
            f"{file}: {other}: a GGUF file holds its tokenizer: make the file with "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…) of transformers, or copy it from the "
            "model's repository"
        )
    said = _json(file, "the tokenizer")
    settings = _json(folder / "tokenizer_config.json", "the tokenizer's config")
    generation = _json(folder / "generation_config.json", "the generation config")
    tokens, kinds = _tokens(said, file, rows)
    ids = {token: i for i, token in enumerate(tokens)}
    first, last = _around(said)
    add_bos, add_eos = settings.get("add_bos_token"), settings.get("add_eos_token")
    special = _special(settings, config, generation, ids)
    notes = []
    if special.get("eos") is None:
        notes.append("no end-of-text token is stated: llama.cpp guesses one by its text")
    fields = _bpe(said, file, tokens, kinds)
    notes += fields.pop("notes", ())
    return Vocabulary(
        tokens=tuple(tokens),
        kinds=tuple(kinds),
        special=special,
        add_bos=first if add_bos is None else bool(add_bos),
        add_eos=last if add_eos is None else bool(add_eos),
        template=chat_template(folder),
        notes=tuple(notes),
        **fields,
    )


def chat_template(folder: Path) -> str | None:
    """The template of a checkpoint's chats, wherever it stands; the one called ``default`` of several."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    said = _json(folder / "tokenizer_config.json", "the tokenizer's config").get("chat_template")
    if isinstance(said, list):
        named = {x.get("name"): x.get("template") for x in said if isinstance(x, Mapping)}
        said = named.get("default", next(iter(named.values()), None))
    return said if isinstance(said, str) and said else None


def _json(file: Path, what: str) -> dict[str, Any]:
    """An object of JSON; empty where the file is missing."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {what} cannot be read: {str(error)[:120]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: {what} is not a JSON object")
    return value


def _tokens(said: Mapping[str, Any], file: Path, rows: int) -> tuple[list[str], list[int]]:
    """Tokens by id and what each is."""
    model = said.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if not vocabulary:
        raise CheckpointError(f"{file}: has no model.vocab: fetch the tokenizer again")
    assert isinstance(model, Mapping)
    if model.get("type") != "BPE" or not isinstance(vocabulary, Mapping):
        raise CheckpointError(
            f"{file}: its model is {clipped(model.get('type'))}: BPE alone, of bytes or of SentencePiece's "
            "pieces, can be written as GGUF here; a file with another one would read text otherwise than the "
            "model was trained: serve the checkpoint with vLLM (quant-deploy plan)"
        )
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [UNUSED] * rows
    bytes_ = bool(model.get("byte_fallback"))
    for token, i in vocabulary.items():
        if i < rows:
            tokens[i] = token
            kinds[i] = BYTE if bytes_ and re.fullmatch(r"<0x[0-9A-F]{2}>", token) else NORMAL
    for added in said.get("added_tokens") or ():
        if (i := added["id"]) < rows:
            tokens[i] = added["content"]
            kinds[i] = CONTROL if added.get("special") else USER_DEFINED
    if (unknown := model.get("unk_token")) in tokens:
        kinds[tokens.index(unknown)] = UNKNOWN
    return tokens, kinds


def _around(said: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a text is encoded with a special token before it, and behind it."""
    steps = _steps(said.get("post_processor"), "processors")
    template = next((s for s in steps if s.get("type") == "TemplateProcessing"), None)
    single = (template or {}).get("single") or [{}]
    return "SpecialToken" in single[0], "SpecialToken" in single[-1]


def _steps(step: Any, inside: str) -> list[Mapping[str, Any]]:
    """The parts of a sequence, however deep, or the one that there is."""
    if not isinstance(step, Mapping):
        return []
    if step.get("type") != "Sequence":
        return [step]
    return [x for part in step.get(inside) or () for x in _steps(part, inside)]


def _special(
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    ids: Mapping[str, int],
) -> dict[str, int]:
    """Ids of special tokens: those that the tokenizer's config names, else config.json's."""
    special: dict[str, int] = {}
    ends: list[int] = []
    for role in ("bos", "eos", "unk", "pad"):
        named = settings.get(f"{role}_token")
        named = named.get("content") if isinstance(named, Mapping) else named
        stated = generation.get(f"{role}_token_id", config.get(f"{role}_token_id"))
        several = [x for x in (stated if isinstance(stated, list) else [stated]) if isinstance(x, int)]
        if role == "eos":
            ends = several
        if isinstance(named, str) and named in ids:
            special[role] = ids[named]
        elif several:
            special[role] = several[0]
    turn = next((ids[t] for t in _ENDS_TURN if ids.get(t) in ends), None)
    if turn is not None and turn != special.get("eos"):
        special["eot"] = turn
    return special


def _bpe(said: Mapping[str, Any], file: Path, tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    """A BPE tokenizer: byte-level, or SentencePiece's."""
    model = said["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or ()]
    steps = _steps(said.get("pre_tokenizer"), "pretokenizers")
    if any(s.get("type") == "ByteLevel" for s in steps):
        return {
            "model": "gpt2",
            "pre": _pre_tokenizer(steps, bool(model.get("ignore_merges")), file),
            "merges": tuple(merges),
        }
    return _sentencepiece(said, file, tokens, kinds, merges)


def _pre_tokenizer(steps: list[Mapping[str, Any]], whole: bool, file: Path) -> str:
    """llama.cpp's name of the rule."""
    words: list[str] = []
    for step in steps:
        kind = step.get("type")
        if kind == "Split":
            pattern = step.get("pattern") or {}
            words.append(pattern.get("Regex") or pattern.get("String") or "")
        elif kind == "Digits":
            words.append("digit" if step.get("individual_digits") else "digits")
        elif kind == "ByteLevel" and step.get("use_regex", True):
            words.append("bytes")
        elif kind != "ByteLevel":
            words.append(str(kind))
        if kind == "ByteLevel" and step.get("add_prefix_space"):
            words.append("a space before the text")
    for pattern_, looked_up, name in PRE_TOKENIZERS:
        if pattern_ == tuple(words) and looked_up in (None, whole):
            return name
    names = ", ".join(name for _, _, name in PRE_TOKENIZERS)
    raise CheckpointError(
        f"{file}: splits text by a rule that is none of those known here by llama.cpp's names ({names}): "
        f"{clipped(words, 200)}"
    )


def _sentencepiece(
    said: Mapping[str, Any], file: Path, tokens: list[str], kinds: list[int], merges: list[str]
) -> dict[str, Any]:
    """SentencePiece's BPE, which tokenizer.json has as merges of pieces with ``▁`` for spaces.

    A piece's score is the rank, negated, of the first merge that makes it: pieces are joined in the order of
    scores, so that the order alone counts.
    """
    space, notes = _spaces(said), []
    if space is None:
        raise CheckpointError(
            f"{file}: is BPE neither of bytes (ByteLevel) nor of SentencePiece's pieces (▁ for spaces): "
            "llama.cpp has no tokenizer for it"
        )
    if BYTE not in kinds:
        notes.append("the tokenizer has no pieces for single bytes: llama.cpp ends at characters outside it")
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        ranks.setdefault(left + right, rank)
    scores = []
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (NORMAL,):
            scores.append(-float(ranks[token]) if token in ranks else (0.0 if len(token) == 1 else _NEVER))
        else:
            scores.append(0.0 if kind in (BYTE, UNKNOWN) else _ADDED)
    return {
        "model": "llama",
        "pre": "default",
        "scores": tuple(scores),
        "space_prefix": space,
        "notes": notes,
    }


def _spaces(said: Mapping[str, Any]) -> bool | None:
    """Whether text begins with a space of SentencePiece's; None where spaces are not ``▁`` at all."""
    steps = _steps(said.get("normalizer"), "normalizers") + _steps(said.get("pre_tokenizer"), "pretokenizers")
    for step in steps:
        if step.get("type") == "Metaspace":
            return (
                step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space") is not False
            )
    replaced = any(
        s.get("type") == "Replace"
        and s.get("content") == "▁"
        and (s.get("pattern") or {}).get("String") == " "
        for s in steps
    )
    return any(s.get("type") == "Prepend" and s.get("prepend") == "▁" for s in steps) if replaced else None
