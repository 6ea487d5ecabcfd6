"""A GGUF file as a checkpoint like any other: names, shapes and config.json as transformers has them.

What a file says in its keys stands in a folder in the cache, which looks like a checkpoint's: config.json,
tokenizer, chat template. Tensors stay where they are. Those of floats that transformers has in the same
order are read as they are; blocks of 32 whose codes a scheme holds are linears of the format ``gguf``
(:mod:`quant.formats.gguf`); all others are computed when they are read: dequantized, rows of q and k put back
in transformers' order, norms without Gemma's offset.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.checkpoint.gguf_path import gguf_file
from quant.checkpoint.header import TensorInfo
from quant.checkpoint.reader import Checkpoint, read_json
from quant.errors import CheckpointError, clipped
from quant.gguf.blocks import SCHEMES, WIDE, Rows, rows_of, zeros_of
from quant.gguf.config import config_of_file, family_of_file
from quant.gguf.header import Entry, Header, read_header
from quant.gguf.names import is_no_weight, original_name
from quant.gguf.vocabulary import tokenizer_files
from quant.hub import GGUF_MARK
from quant.vllm.config import heads_of
from quant.vllm.layers import built_layers

if TYPE_CHECKING:
    import numpy as np
    import torch

#: Last part of the name of a linear's blocks; see :mod:`quant.formats.gguf`.
BLOCKS = "blocks"
#: Raised where what is made of a file changes.
_VERSION = 1
#: Bytes that are looked at at a time.
_PIECE = 8 << 20


@dataclass(frozen=True, eq=False)
class Part:
    """A tensor of the checkpoint, and where the file has it.

    Attributes:
        name: as transformers has it.
        rows: of the file.
        coded: whether it is a linear of the format ``gguf``.
    """

    name: str
    rows: Rows
    coded: bool = False

    @property
    def computed(self) -> bool:
        """Whether its bytes are others than the file's."""
        rows = self.rows
        return not self.coded and (rows.order is not None or bool(rows.offset) or rows.entry.type not in WIDE)


def open_gguf(path: Path, zero_points: bool = False) -> Checkpoint:
    """A GGUF file as a checkpoint, whose ``path`` is a folder in the cache that holds all but its tensors.

    Args:
        zero_points: matrices of Q4_1 whose minima are whole steps are linears with zero points, which
            differ from the file's numbers by fp16's rounding of the minima; takes reading them.

    Raises:
        CheckpointError: not a file, damaged, or with tensors that its architecture has not.
        UsageError: of an architecture that is not read here.
    """
    file = gguf_file(path)
    if file is None or not file.is_file():
        raise CheckpointError(f"{file or path}: there is no such GGUF file")
    header = read_header(file)
    config = config_of_file(header)
    parts = checkpoint_parts(header, config, zero_points)
    coded = {p.name.removesuffix(".weight"): p.rows.entry.type for p in parts if p.coded}
    if coded:
        heads = heads_of(config)
        assert heads is not None
        turned = {"q_proj": heads.attention, "k_proj": heads.kv} if _interleaved(header) else {}
        config["quantization_config"] = {"quant_method": "gguf", "types": coded, "interleaved": turned}
    folder, notes = _stand_in(file, header, config)
    tensors: dict[str, TensorInfo] = {}
    computed: dict[str, Callable[[], torch.Tensor]] = {}
    pieces: dict[str, Callable[[int, int], torch.Tensor]] = {}
    for part in parts:
        rows, name = part.rows, part.name
        kind, shape = WIDE.get(rows.entry.type, "F32") if not rows.offset else "F32", rows.shape
        if part.coded:
            name, kind = f"{name.removesuffix('.weight')}.{BLOCKS}", "U8"
            shape = (rows.count, rows.row_bytes)
        tensors[name] = TensorInfo(name, kind, shape, rows.entry.file, rows.start, rows.start + rows.nbytes)
        if part.computed:
            computed[name], pieces[name] = rows.whole, rows.values
    metadata = {"format": "gguf", "file": str(file), **({"tokenizer": notes} if notes else {})}
    return Checkpoint(folder, config, tensors, metadata, computed, computed_rows=pieces)


def _interleaved(header: Header) -> bool:
    return family_of_file(header)[1].interleaved


def checkpoint_parts(header: Header, config: Mapping[str, Any], zero_points: bool = False) -> list[Part]:
    """The tensors of the checkpoint that a file stands for; ``zero_points``: as in :func:`open_gguf`.

    Raises:
        CheckpointError: the file has tensors that its architecture has not.
    """
    parts: list[Part] = []
    unknown: list[str] = []
    for entry in header.tensors.values():
        if is_no_weight(entry.name):
            continue
        name = original_name(entry.name, str(config["model_type"]))
        if name is None:
            unknown.append(entry.name)
        else:
            parts += _parts_of(entry, name, config, header)
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{header.files[0]}: holds {clipped(unknown[0])}{more}, which no {config['model_type']} has: it "
            "is of a variant that is not read here: start from the original"
        )
    return _carried(parts, config, zero_points)


def _parts_of(entry: Entry, name: str, config: Mapping[str, Any], header: Header) -> Iterator[Part]:
    """The tensors that one of the file is: of experts, one each."""
    if "{}" in name:
        if len(entry.shape) != 3:
            raise CheckpointError(f"{entry.file}: {entry.name} has {len(entry.shape)} sides: 3 are needed")
        experts, rows, columns = entry.shape
        for e in range(experts):
            yield Part(name.format(e), Rows(entry, e * rows, rows, (rows, columns)))
        return
    _, family = family_of_file(header)
    shape = entry.shape
    if name.endswith("shared_expert_gate.weight") and len(shape) == 1:
        shape = (1, *shape)
    order = _order(entry, name, config) if family.interleaved else None
    offset = family.norm_offset if name.endswith("norm.weight") and len(shape) == 1 else 0.0
    if order is not None and len(shape) == 1:  # a bias: its numbers are rows of one
        entry = Entry(entry.name, entry.type, (*shape, 1), entry.file, entry.start, entry.nbytes)
    yield Part(name, Rows(entry, 0, rows_of(entry), shape, order, offset))


def _order(entry: Entry, name: str, config: Mapping[str, Any]) -> np.ndarray | None:
    """int64 [rows]: where the file has each row of q or k, whose halves of a head it interleaves; None of
    others.

    Raises:
        CheckpointError: the rows are no whole heads.
    """

    kind = re.search(r"\.self_attn\.([qk])_proj\.(weight|bias)$", name)
    if kind is None:
        return None
    heads = config["num_attention_heads" if kind[1] == "q" else "num_key_value_heads"]
    rows = entry.shape[0]
    if rows % (2 * heads):
        raise CheckpointError(f"{entry.file}: {entry.name} has {rows} rows, which are no {heads} heads")
    return interleaved_places(rows, heads)


def interleaved_places(rows: int, heads: int) -> np.ndarray:
    """int64 [rows]: row ``i`` of a head's first half stands at ``2 i``, of its second at ``2 i + 1``.

    >>> interleaved_places(8, 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    import numpy as np

    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _whole_steps(rows: Rows) -> bool:
    piece = max(1, _PIECE // rows.row_bytes)
    starts = range(0, rows.count, piece)
    return all(zeros_of(rows.raw(s, min(s + piece, rows.count))) is not None for s in starts)


def _carried(parts: list[Part], config: Mapping[str, Any], zero_points: bool) -> list[Part]:
    """The parts, those marked whose codes a scheme holds: not tables of tokens, and of layers that vLLM
    builds as one only where all are of one type."""
    able = {
        p.name.removesuffix(".weight"): p.rows.entry.type
        for p in parts
        if p.rows.entry.type in SCHEMES
        and len(p.rows.shape) == 2
        and p.name.startswith("model.layers.")
        and (p.rows.entry.type != "Q4_1" or (zero_points and _whole_steps(p.rows)))
    }
    matrices = [p.name.removesuffix(".weight") for p in parts if p.name.endswith(".weight")]
    for built in built_layers([m for m in matrices if ".layers." in m and "norm" not in m], config).values():
        if len({str(SCHEMES.get(able.get(n, ""))) for n in built.linears}) > 1:
            for name in built.linears:
                able.pop(name, None)
    return [Part(p.name, p.rows, p.name.removesuffix(".weight") in able) for p in parts]


def _stand_in(file: Path, header: Header, config: Mapping[str, Any]) -> tuple[Path, str]:
    """The folder with everything but the tensors, made where it is not there yet; and what is wrong with the
    tokenizer, which is then missing.

    Raises:
        CheckpointError: the cache cannot be written to.
    """
    stamp = [[str(f.resolve()), (found := f.stat()).st_size, found.st_mtime_ns] for f in header.files]
    key = hashlib.sha256(json.dumps([_VERSION, stamp]).encode()).hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quant" / "gguf"
    folder = base / key / file.name
    try:
        if (folder / GGUF_MARK).is_file():
            return folder, str(read_json(folder / GGUF_MARK, "the mark").get("tokenizer") or "")
        notes, files = "", dict[str, Any]()
        try:
            files = tokenizer_files(header, config["vocab_size"])
        except CheckpointError as error:
            notes = str(error)
        files["config.json"] = {k: v for k, v in config.items() if k != "quantization_config"}
        files[GGUF_MARK] = {"file": str(file.absolute()), "tokenizer": notes}
        part = folder.with_name(f".{file.name}.{os.getpid()}")
        part.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)
            (part / name).write_text(text, encoding="utf-8")
        try:
            part.replace(folder)
        except OSError:  # another process was faster
            shutil.rmtree(part, ignore_errors=True)
            if not (folder / GGUF_MARK).is_file():
                raise
        return folder, notes
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be written: {error.strerror or error}: name another folder for caches in "
            "XDG_CACHE_HOME"
        ) from error


def dequantized_note(checkpoint: Checkpoint) -> str | None:
    """What to say of matrices whose numbers are written in 16 bits because no scheme holds their codes."""
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    matrices = [n for n, i in checkpoint.tensors.items() if n in checkpoint.computed and len(i.shape) > 1]
    header = read_header(Path(checkpoint.metadata["file"]))
    blocks = sorted({e.type for e in header.tensors.values() if e.type not in WIDE})
    names = [n for n in matrices if checkpoint.tensors[n].dtype == "F32"]
    if not names or not blocks:
        return None
    rest = len([n for n in names if n not in tables])
    which = [n for n in names if n in tables] + ([f"{rest} matrices of the blocks"] if rest else [])
    return (
        f"{', '.join(which)} dequantized to {checkpoint.config['dtype']} (the file's types: "
        f"{', '.join(blocks)}): vLLM has no scheme with their codes, or takes none there"
    )


def types_of(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of each of ggml's types in the file of a checkpoint that :func:`open_gguf` made."""
    sizes: dict[str, int] = {}
    for entry in read_header(Path(checkpoint.metadata["file"])).tensors.values():
        sizes[entry.type] = sizes.get(entry.type, 0) + entry.nbytes
    return sizes
