"""Is a GGUF file whole, and is it what its architecture and its source say? Judged from the file alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import isclose, prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.errors import CheckpointError, QuantError, clipped
from quant.evaluation.agreement import file_problems
from quant.formats.legacy import repaired
from quant.formats.reading import dequantized
from quant.gguf.blocks import STEP_FIRST, WIDE, Rows, steps_of
from quant.gguf.config import config_of_file, family_of_file
from quant.gguf.families import Family, config_problems, family_of
from quant.gguf.header import Header, read_header
from quant.gguf.levels import BLOCK, code_bits, package
from quant.gguf.metadata import graph_facts
from quant.gguf.reading import Part, checkpoint_parts, open_gguf
from quant.gguf.text import common_name, text_tensors
from quant.gguf.vocabulary import tokenizer_files, tokenizer_problems

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
#: How far the size of a whole matrix, ⟨own, source⟩ / ⟨source, source⟩, may be from 1, and how much farther
#: for each unit of its squared relative error across the source: rounding shrinks. GPTQ by 1.3 times that
#: error, nearest rounding and llama.cpp's own types by a tenth of it.
_SIZE, _SIZE_CODES, _SIZE_OWN = 0.03, 3.0, 1.0
#: Error that fp16 scales leave in numbers too small for them: 2⁻²⁵ in the scale of a code of 10 bits.
_TINY = 2.0**-15
#: Largest relative difference of two numbers that are one in fp32; of rotary factors, which are found again
#: in four numbers.
_SAME, _SAME_FACTOR = 1e-6, 2e-3
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
    origin = None if source is None else dequantized(repaired(open_checkpoint(source))[0])
    _, family = family_of_file(header)
    against = [] if origin is None else _differing_facts(config, origin.config, family)
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
    theirs = None if origin is None else _tensors_of(origin, family)
    lost = list(_value_problems(parts, theirs, numbers))
    result.add("values", numbers, "every number is finite")
    if theirs is not None:
        held = {common_name(p.name) for p in parts}
        lost += [f"{t.name} of the source is not in the file" for n, t in theirs.items() if n not in held]
        result.add("tensors of the source", lost, f"all {len(parts)} are there, exactly or rounded")
    result.content_hash = _hash(header)
    return result


@dataclass(frozen=True)
class _Theirs:
    """A tensor of the source: its own name and shape, and its rows, so many at a time."""

    name: str
    shape: tuple[int, ...]
    pieces: Callable[[int], Iterator[torch.Tensor]]


def _tensors_of(origin: Checkpoint, family: Family) -> dict[str, _Theirs]:
    """What a file must hold of its source, by the names that all families share."""
    text = text_tensors(origin, family)
    found = {
        common_name(own): _Theirs(name, tuple(origin.info(name).shape), partial(origin.read_rows, name))
        for name, own in text.named.items()
    }
    for own, ref in text.experts.items():
        found[f"{own}.weight"] = _Theirs(f"{ref.name}.weight", (ref.n, ref.k), partial(ref.pieces, origin))
    return found


def _differing_facts(config: dict[str, Any], source: dict[str, Any], family: Family) -> list[str]:
    """What llama.cpp's graph of a file computes otherwise than its source's config.json says."""
    try:
        other = family_of(source)
        if other.architecture != family.architecture:
            return [f"general.architecture is {family.architecture}, of the source {other.architecture}"]
        own, theirs = graph_facts(config, family), graph_facts(source, other)
        wrong = config_problems(source, other)
    except QuantError as error:
        return [f"the source: {error}"]
    for key in {**own, **theirs}:
        if not _same(mine := own.get(key), said := theirs.get(key)):
            shown = ("not stated" if v is None else clipped(v) for v in (mine, said))
            wrong.append(f"{key} is {', of the source '.join(shown)}")
    return wrong


def _same(own: Any, other: Any) -> bool:
    if isinstance(own, list) and isinstance(other, list):
        pairs = zip(own, other, strict=False)
        return len(own) == len(other) and all(isclose(a, b, rel_tol=_SAME_FACTOR) for a, b in pairs)
    if isinstance(own, float) and isinstance(other, (int, float)):
        return isclose(own, other, rel_tol=_SAME)
    return bool(own == other)


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
    parts: list[Part], source: Mapping[str, _Theirs] | None, numbers: list[str]
) -> Iterator[str]:
    """Tensors that differ from the source's by more than their type rounds; what is not finite goes into
    ``numbers``."""
    for part in parts:
        rows, theirs = part.rows, None
        if source is not None:
            theirs = source.get(common_name(part.name))
            if theirs is None:
                yield f"{part.name} is not in the source"
            elif theirs.shape != tuple(rows.shape):
                yield f"{part.name} is {list(rows.shape)}, in the source {list(theirs.shape)}"
                theirs = None
        try:
            yield from _row_problems(part, theirs)
        except QuantError as problem:
            numbers.append(str(problem))


def _row_problems(part: Part, source: _Theirs | None) -> Iterator[str]:
    """What is wrong with the rows of a tensor, the source's being of its shape; nothing where there is none.

    Raises:
        CheckpointError: a number is not finite.
    """
    import torch

    name, rows = part.name, part.rows
    step = max(1, _PIECE // max(1, prod(rows.shape[1:])))
    theirs = None if source is None else source.pieces(step)
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
    whole = float(norm.double().square().mean()) or 1.0
    total = sqrt(float(error.double().square().mean()) / whole)
    if rows.entry.type in WIDE:
        yield f"{name} is {rows.entry.type}, and not the source's numbers (relative error {total:.2g})"
        return
    if (said := _resized(along, total, norm, rows.entry.type)) is not None:
        yield f"{name} {said}"
        return
    most = _most(error, norm, along.abs(), steps)
    wrong = torch.nonzero(error > most)[:, 0].tolist()
    if wrong:
        yield (
            f"{name} has a relative error of {total:.2f}, and {len(wrong)} of {len(error)} rows are not the "
            f"source's: the first is row {wrong[0]}, off by {float(error[wrong[0]]):.2g} where its numbers "
            f"are {float(norm[wrong[0]]):.2g} and rounding to {rows.entry.type} leaves "
            f"{float(most[wrong[0]]):.2g} at the most"
        )


def _resized(along: torch.Tensor, total: float, norm: torch.Tensor, type_: str) -> str | None:
    """What is to be said of a matrix that is its source multiplied by a number, or None: a row's codes may
    hide that, all rows together do not.

    Args:
        along: of :func:`_row_errors`, with its sign; ``total``: the relative error of the whole matrix.
    """
    squares = float(norm.double().square().sum())
    if not squares:
        return None
    size = float((along * norm).double().sum()) / squares
    across = max(0.0, total**2 - size**2)
    most = _SIZE + (_SIZE_CODES if type_ in STEP_FIRST else _SIZE_OWN) * across
    if abs(size) <= most + _TINY / sqrt(squares / len(norm)):
        return None
    return (
        f"is {1 + size:.3f} times the source's, where rounding to {type_} leaves {most:.3f} of difference at "
        "the most"
    )


def _most(error: torch.Tensor, norm: torch.Tensor, along: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The largest error of each row that rounding leaves, fp32 [N], of what :func:`_row_errors` measures."""
    import torch

    usual = _TIMES_MEDIAN * float((error / norm.clamp_min(_TINY)).median()) * norm
    usual = torch.where(along <= _ALONG * error, usual, 0.0)
    return torch.minimum(torch.maximum(_STEPS * steps, usual), _OTHER * norm).clamp_min(_TINY)


def _row_errors(own: torch.Tensor, other: torch.Tensor, rows: Rows, start: int) -> torch.Tensor:
    """Root mean squares of rows: of the error, of the source's numbers, of the part of the error along them
    (with its sign), and of the steps of the type; fp32 [4, N]."""
    import torch

    own, other = own.float().reshape(len(own), -1), other.float().reshape(len(own), -1)
    difference = own - other
    error, norm = (x.square().mean(1).sqrt() for x in (difference, other))
    along = (difference * other).mean(1) / norm.clamp_min(torch.finfo().tiny)
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
