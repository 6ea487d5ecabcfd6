"""Is a GGUF file whole, and is it what its architecture and its source say? Judged from the file alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.errors import CheckpointError, QuantError, clipped
from quant.evaluation.agreement import file_problems
from quant.formats.reading import dequantized
from quant.gguf.blocks import WIDE, Rows, steps_of
from quant.gguf.config import config_of_file
from quant.gguf.families import rotary
from quant.gguf.header import Header, read_header
from quant.gguf.levels import BLOCK, code_bits, package
from quant.gguf.reading import Part, checkpoint_parts, open_gguf
from quant.gguf.vocabulary import tokenizer_files, tokenizer_problems
from quant.vllm.config import KEYS, head_size, heads_of, stated

if TYPE_CHECKING:
    import torch

    from quant.evaluation.verify import Verification

#: Numbers that are compared at a time.
_PIECE = 1 << 22
#: Root mean square error of a row, in steps of its type, that rounding may leave. Nearest rounding leaves
#: half a step at the most, 0.29 on average; GPTQ and YAQA move codes to make up for others' errors, searched
#: scales clip, and llama.cpp weighs errors by importance. A row of 4 bits that was zeroed or replaced is off
#: by three steps and more, one of 8 bits by fifty.
_STEPS = 2.0
#: Where a matrix was rounded more coarsely before (4 bits stored as Q8_0), all rows are off by more steps,
#: and much alike: one that is off by so many times the middle one is another row.
_TIMES_MEDIAN = 3.0
#: Of such a row's error, the largest share along the row itself: what rounding leaves stands across it, while
#: a row of zeros or one multiplied by a number is off along itself alone.
_ALONG = 0.6
#: Relative error of a row that no rounding leaves: two bits lose half, a row of zeros is off by 1, and a row
#: replaced by another of its size by 1.4.
_OTHER = 0.8
#: Error that fp16 scales leave in numbers too small for them: 2⁻²⁵ in the scale of a code of 10 bits.
_TINY = 2.0**-15
#: Facts that a file and its source must agree on.
_FACTS = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "rms_norm_eps", "active",
    "experts",
)  # fmt: skip
_CHUNK = 1 << 22


def verify_gguf(result: Verification, file: Path, source: str | Path | None = None) -> Verification:
    """Adds the checks of a GGUF file: header, keys, names and shapes by its architecture, types, tokenizer
    and numbers; with a source that every tensor of it is there, exactly where the type holds its numbers,
    else rounded.

    Raises:
        CheckpointError: the file cannot be read at all, or is of an architecture that is not read here.
    """
    header = read_header(file)
    config = config_of_file(header)
    total = f"{len(header.tensors)} tensors in {len(header.files)} file{'s' if len(header.files) > 1 else ''}"
    result.add("files", [], f"{total}, header valid")
    origin = None if source is None else dequantized(open_checkpoint(source))
    against = [] if origin is None else _differing_facts(config, origin.config)
    result.add("metadata", against, f"{config['model_type']}: {config['num_hidden_layers']} blocks")
    try:
        parts = checkpoint_parts(header, config)
    except CheckpointError as error:
        result.add("names and shapes", [str(error)], "")
        return result
    checkpoint = open_gguf(file)
    result.add(
        "names and shapes",
        file_problems(checkpoint),
        "embedding, head, blocks and experts are those that the keys imply",
    )
    wrong, kinds = _type_problems(header)
    result.add("types", wrong, ", ".join(f"{n} × {t}" for t, n in kinds.items()))
    result.add("tokenizer", tokenizer_problems(header, config["vocab_size"]), _tokenizer(header, config))
    if wrong:
        return result
    numbers: list[str] = []
    lost = list(_value_problems(checkpoint, parts, origin, numbers))
    result.add("values", numbers, "every number is finite")
    if origin is not None:
        missing = sorted(set(origin.tensors) - {p.name for p in parts})
        lost += [f"{n} of the source has no place in the file" for n in missing if not _elsewhere(n, config)]
        result.add("tensors of the source", lost, f"all {len(parts)} are there, exactly or rounded")
    result.content_hash = _hash(header)
    return result


def _elsewhere(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor of the source is left out of every such file: a tied head, towers, buffers."""
    head = name == "lm_head.weight" and config["tie_word_embeddings"]
    return head or "inv_freq" in name or not name.startswith(("model.", "lm_head"))


def _differing_facts(config: dict[str, Any], source: dict[str, Any]) -> list[str]:
    """What the file's keys say otherwise than its source's config.json."""
    wrong = []
    facts = [(f, stated(config, f), stated(source, f)) for f in _FACTS if f in KEYS or stated(source, f)]
    mine, theirs = heads_of(config), heads_of(source)
    if mine is not None and theirs is not None:
        facts += [("heads", mine.attention, theirs.attention), ("KV heads", mine.kv, theirs.kv)]
    facts.append(("head_dim", head_size(config), head_size(source)))
    for key in ("rope_theta", "factor", "original_max_position_embeddings"):
        facts.append((key, rotary(config).get(key), rotary(source).get(key)))
    for name, own, other in facts:
        if own is None or other is None or own == other:
            continue
        if (
            isinstance(own, float)
            and isinstance(other, (int, float))
            and abs(own - other) <= 1e-6 * abs(other)
        ):
            continue  # fp32 in the file
        wrong.append(f"{name} is {clipped(own)}, of the source {clipped(other)}")
    return wrong


def _type_problems(header: Header) -> tuple[list[str], dict[str, int]]:
    """Types that cannot be read or that llama.cpp does not compute with; and how many tensors have which."""
    gguf, problems, kinds = package(), [], dict[str, int]()
    known = {t.name for t in gguf.quants._type_traits} | set(WIDE)
    for entry in header.tensors.values():
        kinds[entry.type] = kinds.get(entry.type, 0) + 1
        if entry.type not in known:
            problems.append(f"{entry.name} is {entry.type}, which the gguf package cannot dequantize")
        elif len(entry.shape) == 1 and entry.type not in ("F32", "F16", "BF16"):
            problems.append(f"{entry.name} is a vector of {entry.type}: llama.cpp adds and scales by F32")
    return problems, kinds


def _tokenizer(header: Header, config: dict[str, Any]) -> str:
    fields = header.fields
    kind = f"{fields.get('tokenizer.ggml.model')} ({fields.get('tokenizer.ggml.pre', 'default')})"
    template = "a chat template" if fields.get("tokenizer.chat_template") else "no chat template"
    said = f"{kind}, {len(fields.get('tokenizer.ggml.tokens') or [])} tokens, {template}"
    try:
        tokenizer_files(header, config["vocab_size"])
    except CheckpointError as error:
        return f"{said}; cannot be read here: {str(error).partition(': ')[2]}"
    return said


def _value_problems(
    checkpoint: Checkpoint, parts: list[Part], origin: Checkpoint | None, numbers: list[str]
) -> Iterator[str]:
    """Tensors that differ from the source's by more than their type rounds; what is not finite goes into
    ``numbers``."""
    for part in parts:
        rows, theirs = part.rows, None
        if origin is not None:
            info = origin.tensors.get(part.name)
            if info is None:
                yield f"{part.name} is not in the source"
            elif tuple(info.shape) != tuple(rows.shape):
                yield f"{part.name} is {list(rows.shape)}, in the source {list(info.shape)}"
            else:
                theirs = origin
        try:
            yield from _row_problems(part, theirs)
        except QuantError as problem:
            numbers.append(str(problem))


def _row_problems(part: Part, origin: Checkpoint | None) -> Iterator[str]:
    """What is wrong with the rows of a tensor, none of it being of another shape; nothing where there is no
    source.

    Raises:
        CheckpointError: a number is not finite.
    """
    import torch

    name, rows = part.name, part.rows
    step = max(1, _PIECE // max(1, prod(rows.shape[1:])))
    theirs = None if origin is None else origin.read_rows(name, step)
    exact, pieces = True, []
    for start in range(0, rows.shape[0], step):
        end = min(start + step, rows.shape[0])
        own = rows.values(start, end)
        _demand_finite(own, name)
        if theirs is not None:
            other = next(theirs)
            exact = exact and _equal(own, other, rows)
            pieces.append(_row_errors(own, other, rows, start))
    if not pieces or (exact and rows.entry.type in WIDE):
        return
    error, norm, along, steps = torch.cat(pieces, 1)
    total = sqrt(float(error.square().mean()) / (float(norm.square().mean()) or 1.0))
    if rows.entry.type in WIDE:
        yield f"{name} is {rows.entry.type}, and not the source's numbers (relative error {total:.2g})"
        return
    most = _most(error, norm, along, steps)
    wrong = torch.nonzero(error > most)[:, 0].tolist()
    if wrong:
        yield (
            f"{name} has a relative error of {total:.2f}, and {len(wrong)} of {len(error)} rows are not the "
            f"source's: the first is row {wrong[0]}, off by {float(error[wrong[0]]):.2g} where its numbers "
            f"are {float(norm[wrong[0]]):.2g} and rounding to {rows.entry.type} leaves "
            f"{float(most[wrong[0]]):.2g} at the most"
        )


def _most(error: torch.Tensor, norm: torch.Tensor, along: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The largest error of each row that rounding leaves, fp32 [N], of what :func:`_row_errors` measures."""
    import torch

    usual = _TIMES_MEDIAN * float((error / norm.clamp_min(_TINY)).median()) * norm
    usual = torch.where(along <= _ALONG * error, usual, 0.0)
    return torch.minimum(torch.maximum(_STEPS * steps, usual), _OTHER * norm).clamp_min(_TINY)


def _row_errors(own: torch.Tensor, other: torch.Tensor, rows: Rows, start: int) -> torch.Tensor:
    """Root mean squares of rows: of the error, of the source's numbers, of the part of the error along them,
    and of the steps of the type; fp32 [4, N]."""
    import torch

    own, other = own.float().reshape(len(own), -1), other.float().reshape(len(own), -1)
    difference = own - other
    error, norm = (x.square().mean(1).sqrt() for x in (difference, other))
    along = (difference * other).mean(1).abs() / norm.clamp_min(torch.finfo().tiny)
    steps = torch.zeros_like(norm)
    if rows.entry.type not in WIDE:
        known = steps_of(rows.raw(start, start + len(own)), rows.entry.type)
        if known is not None:  # as stored: codes carried over in larger groups have larger steps
            steps = torch.from_numpy(known)
        else:
            largest = other.reshape(len(own), -1, BLOCK).abs().amax(2)
            steps = (largest * 2 / (2 ** code_bits(rows.entry.type) - 1)).square().mean(1).sqrt()
    return torch.stack([error, norm, along, steps])


def _equal(own: torch.Tensor, other: torch.Tensor, rows: Rows) -> bool:
    """Whether the source's numbers, rounded once to the file's type, are the file's."""
    if rows.offset:  # of a sum in fp32
        return bool(((other.float() + rows.offset) - rows.offset == own).all())
    return bool((other.to(own.dtype) == own).all())


def _demand_finite(values: torch.Tensor, name: str) -> None:
    from quant.tensors import all_finite

    if not all_finite(values):
        raise CheckpointError(f"{name} holds NaN or infinite values")


def _hash(header: Header) -> str:
    digests = []
    for file in header.files:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while piece := stream.read(_CHUNK):
                digest.update(piece)
        digests.append(f"{file.name} {digest.hexdigest()}")
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
