"""A checkpoint directory, read lazily: headers at once, tensors one at a time into buffers we own.

Nothing is memory-mapped: a mapped page counts as memory in use, and the depth of the model would show in the
peak.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.checkpoint.folders import FOREIGN_WEIGHTS, described, no_model, not_itself
from quant.checkpoint.gguf_path import gguf_file
from quant.checkpoint.header import TensorInfo, read_header
from quant.documents import LARGEST, read_document
from quant.errors import CheckpointError, clipped
from quant.hub import GGUF_MARK
from quant.remote import open_weights

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
#: Endings of files that hold weights in another container. They are never copied: beside ours they would be a
#: second, unquantized model.
_OTHER_WEIGHTS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".gguf",
    ".safetensors",
    ".tflite",
    ".npz",
)
#: Files that describe an earlier quantization: their content is wrong for a new checkpoint, and they are not
#: copied.
STALE = {
    "quant_report.json": "describes the source; the output has its own",
    "quant_report.html": "describes the source; the output has its own",
    "quant_evaluation.json": "was measured of the source",
    "quant_recipe.yaml": "describes the source; the output has its own",
    "vllm_config.json": "describes the source; the output has its own",
    "quantize_config.json": "describes an earlier quantization",
    "quant_config.json": "describes an earlier quantization",
    "recipe.yaml": "describes an earlier quantization",
    "hf_quant_config.json": "describes an earlier quantization",
    "quanto_qmap.json": "describes an earlier quantization",
}
#: Where ModelOpt up to 0.29 says what it did, and where engines look if config.json says nothing.
MODELOPT_CONFIG = "hf_quant_config.json"
#: Files that every output has of its own, and that hold what the source's say: never copied, never missing.
REWRITTEN = frozenset({"README.md"})
_SKIPPED_FOLDERS = {".git", ".cache", "__pycache__", ".huggingface"}
#: Bytes copied at a time: a piece stays in the processor's cache between reading and writing, and its buffer
#: is never given back to the system.
CHUNK = 1 << 20


@dataclass(frozen=True)
class SideFile:
    """A file of the source that is not a tensor of it: copied byte for byte, or left out for the ``dropped``
    reason."""

    relative: str
    path: Path
    dropped: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A model directory: ``config`` and where every tensor lies.

    Open one with :func:`open_checkpoint`. ``read`` gives a tensor in the stored dtype, ``read_bytes`` its raw
    bytes in pieces. ``computed`` holds functions for tensors that no file stores as such: the weights of a
    quantized checkpoint, seen dequantized; ``computed_parts`` likewise, for one part of the first dimension,
    ``computed_rows`` for those from one number to another.
    ``origin`` is then the checkpoint as it is stored. ``quantization_file``: the side file that the
    ``quantization_config`` in ``config`` is from; empty: config.json's own.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    computed: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    computed_parts: Mapping[str, Callable[[int], torch.Tensor]] = field(default_factory=dict)
    origin: Checkpoint | None = None
    quantization_file: str = ""
    computed_rows: Mapping[str, Callable[[int, int], torch.Tensor]] = field(default_factory=dict)

    def info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}") from None

    def read_bytes(self, name: str, chunk: int = CHUNK) -> Iterator[bytes]:
        """The tensor's bytes in pieces of at most ``chunk``.

        Raises:
            CheckpointError: no file holds them.
        """
        info = self.info(name)
        if name in self.computed:
            raise CheckpointError(f"{self.path}: {name} is computed from quantized tensors, it has no bytes")
        try:
            with open_weights(info.file) as stream:
                stream.seek(info.start)
                left = info.nbytes
                while left:
                    piece = stream.read(min(chunk, left))
                    if not piece:
                        raise CheckpointError(
                            f"{info.file}: ends inside tensor {name!r}: the file was truncated while it was "
                            "read"
                        )
                    left -= len(piece)
                    yield piece
        except OSError as error:
            raise CheckpointError(
                f"{info.file}: cannot be read at tensor {name!r}: {error.strerror or error}"
            ) from error

    def buffer(self, name: str) -> bytearray:
        """The tensor's bytes in one owned buffer."""
        info = self.info(name)
        data = bytearray(info.nbytes)
        try:
            with open_weights(info.file) as stream:
                stream.seek(info.start)
                self._fill(stream, memoryview(data), info)
        except OSError as error:
            raise CheckpointError(
                f"{info.file}: cannot be read at tensor {name!r}: {error.strerror or error}"
            ) from error
        return data

    def is_zero(self, name: str) -> bool:
        """Whether a tensor of floats holds nothing but zeros, negative ones among them."""
        if name in self.computed:
            return not bool(self.computed[name]().any())
        # the highest bit of a number's last byte is its sign
        return not set(self.buffer(name)) - {0, 0x80}

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in its stored dtype and shape, in memory of its own."""
        import torch

        from quant.checkpoint.dtypes import TORCH

        if name in self.computed:
            return self.computed[name]()
        info = self.info(name)
        if info.numel == 0:
            return torch.empty(info.shape, dtype=TORCH[info.dtype])
        return torch.frombuffer(self.buffer(name), dtype=TORCH[info.dtype]).view(info.shape)

    def read_index(self, name: str, index: int) -> torch.Tensor:
        """Part ``index`` of the tensor's first dimension, as :meth:`read` gives it; nothing else is read."""
        import torch

        from quant.checkpoint.dtypes import TORCH

        if name in self.computed_parts:
            return self.computed_parts[name](index)
        if name in self.computed:
            return self.computed[name]()[index].clone()
        info = self.info(name)
        size = info.nbytes // info.shape[0]
        data = bytearray(size)
        try:
            with open_weights(info.file) as stream:
                stream.seek(info.start + index * size)
                self._fill(stream, memoryview(data), info)
        except OSError as error:
            raise CheckpointError(
                f"{info.file}: cannot be read at tensor {name!r}: {error.strerror or error}"
            ) from error
        return torch.frombuffer(data, dtype=TORCH[info.dtype]).view(info.shape[1:])

    def read_rows(self, name: str, rows: int) -> Iterator[torch.Tensor]:
        """The tensor [N, …] in pieces of at most ``rows`` of its first dimension, as :meth:`read` gives them.

        All pieces share one buffer: each is overwritten when the next one is asked for.
        """
        import torch

        from quant.checkpoint.dtypes import TORCH

        if name in self.computed_parts:
            for index in range(self.info(name).shape[0]):
                yield self.computed_parts[name](index).unsqueeze(0)
            return
        info = self.info(name)
        if name in self.computed_rows and info.shape:
            for first in range(0, info.shape[0], rows):
                yield self.computed_rows[name](first, min(first + rows, info.shape[0]))
            return
        if name in self.computed:
            yield from self.computed[name]().split(rows)
            return
        if info.numel == 0:
            yield torch.empty(info.shape, dtype=TORCH[info.dtype])
            return
        count, row = info.shape[0], info.nbytes // info.shape[0]
        data = bytearray(min(rows, count) * row)
        buffer = torch.frombuffer(data, dtype=TORCH[info.dtype]).view(-1, *info.shape[1:])
        try:
            with open_weights(info.file) as stream:
                stream.seek(info.start)
                for first in range(0, count, rows):
                    wanted = min(rows, count - first)
                    self._fill(stream, memoryview(data)[: wanted * row], info)
                    yield buffer[:wanted]
        except OSError as error:
            raise CheckpointError(
                f"{info.file}: cannot be read at tensor {name!r}: {error.strerror or error}"
            ) from error

    @staticmethod
    def _fill(stream: Any, view: memoryview, info: TensorInfo) -> None:
        """Reads until ``view`` is full."""
        while view:
            count = stream.readinto(view)
            if not count:
                raise CheckpointError(
                    f"{info.file}: ends inside tensor {info.name!r}: the file was truncated while it was read"
                )
            view = view[count:]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as they are stored."""
        return sum(t.nbytes for t in (self.origin or self).tensors.values())

    @cached_property
    def dtype(self) -> str:
        """The dtype that most floating-point elements are stored in, as the header names it; computed ones
        do not count where there are others."""
        from quant.checkpoint.header import FLOATS

        counts: dict[str, int] = {}
        stored = [t for t in self.tensors.values() if t.name not in self.computed]
        for t in stored or self.tensors.values():
            if t.dtype in FLOATS:
                counts[t.dtype] = counts.get(t.dtype, 0) + t.numel
        return max(counts, key=lambda d: counts[d]) if counts else "F32"

    @property
    def weight_files(self) -> list[Path]:
        return sorted({t.file for t in self.tensors.values()})

    def side_files(self) -> list[SideFile]:
        """Every other file of the directory, sorted: tokenizer, templates, custom code. ``config.json`` and
        the index are not among them."""
        used = {f.name for f in self.weight_files} | {INDEX, "config.json", GGUF_MARK}
        beside = []
        for folder, folders, files in os.walk(self.path, followlinks=False):
            folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS)
            for name in sorted([*files, *(f for f in folders if (Path(folder) / f).is_symlink())]):
                path = Path(folder) / name
                relative = path.relative_to(self.path).as_posix()
                if relative in used:
                    continue
                if name.endswith(_OTHER_WEIGHTS):
                    dropped = "weights in another file or container: not part of this model's index"
                elif name.endswith(".index.json"):
                    dropped = "index of weights in another container"
                elif not path.is_file():
                    dropped = "not a regular file"
                else:
                    dropped = ""
                beside.append(SideFile(relative, path, dropped))
        return beside


def _resolve_hub_cache(path: Path) -> Path:
    """``models--org--name`` of a hub cache means the snapshot that its ``refs/main`` names."""
    reference = path / "refs" / "main"
    if not (path / "config.json").exists() and reference.is_file():
        name = reference.read_text(errors="replace").strip()
        if _plain_name(name) and (path / "snapshots" / name / "config.json").exists():
            return path / "snapshots" / name
    return path


def read_json(file: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: unreadable, not JSON, or not an object.
    """
    try:
        value = read_document(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        with file.open("rb") as stream:
            other = not_itself(stream.read(64))
        raise CheckpointError(
            f"{file}: {other}" if other else f"{file}: {what} is not JSON: {str(error)[:120]}"
        ) from error
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{file}: {what} holds half of a surrogate pair, which is no character: repair it, or fetch it "
            "again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: {what} is not a JSON object")
    return value


def _plain_name(name: Any) -> bool:
    """Whether an index's file name stays in its folder, judged from the text alone: shards of a hub cache are
    symbolic links out of it."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and "/" not in name
        and "\\" not in name
        and "\0" not in name
    )


def _weight_map(path: Path) -> dict[str, str]:
    index = path / INDEX
    weight_map = read_json(index, "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map of tensor names to files")
    for tensor, name in weight_map.items():
        if not _plain_name(name):
            raise CheckpointError(
                f"{index}: tensor {clipped(tensor)} is said to be in {clipped(name)}: a file name inside the "
                "model's folder is needed"
            )
    for name in sorted(set(weight_map.values())):
        if not (path / name).exists():
            raise CheckpointError(
                f"{index}: names {clipped(name)}, which is not in {path}: the download is incomplete, fetch "
                "that file"
            )
    return weight_map


_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


def _demand_all_shards(path: Path, names: Sequence[str]) -> None:
    """Of shards without an index, whether all are there that their own names count.

    Raises:
        CheckpointError: one is missing.
    """
    sets: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if shard := _SHARD.fullmatch(name):
            sets.setdefault((shard[1], int(shard[3])), set()).add(int(shard[2]))
    for (stem, total), numbers in sets.items():
        if missing := next((i for i in range(1, total + 1) if i not in numbers), None):
            raise CheckpointError(
                f"{path}: {stem}-{missing:05d}-of-{total:05d}.safetensors is missing: {len(numbers)} of "
                f"{total} shards are there, and no {INDEX}: the download is incomplete, fetch that file and "
                "the index"
            )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Reads config and headers of a model directory (single file, sharded, or a hub cache with symbolic
    links).

    Raises:
        CheckpointError: no directory, no config.json, no safetensors, an invalid header, an index that names
            a missing or outside file.
    """
    path = Path(path)
    if (opened := _container(path)) is not None:
        return opened
    if not path.exists():
        raise CheckpointError(
            f"{path}: there is no such directory: give the folder with config.json and the safetensors files"
        )
    if not path.is_dir():
        raise CheckpointError(f"{path}: {described(path)}")
    path = _resolve_hub_cache(path)
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path}: {described(path)}")
    _demand_no_traps(path)
    config = read_json(path / "config.json", "the config")
    stated = _side_quantization(path) if config.get("quantization_config") is None else None
    if stated is not None:
        config = {**config, "quantization_config": stated}
    weight_map: dict[str, str] = {}
    if (path / INDEX).exists():
        weight_map = _weight_map(path)
        names = sorted(set(weight_map.values()))
    elif (path / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        names = sorted(f.name for f in path.glob("*.safetensors") if not FOREIGN_WEIGHTS.match(f.name))
        _demand_all_shards(path, names)
    if not names:
        raise CheckpointError(f"{path}: {described(path)}")
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for name in names:
        header, meta = read_header(path / name)
        metadata.update(meta)
        for tensor, info in header.items():
            if weight_map and weight_map.get(tensor) != name:
                if tensor in weight_map:
                    continue  # a copy in a second file: the index says which one counts
                raise CheckpointError(
                    f"{path / name}: holds tensor {clipped(tensor)}, which {INDEX} does not name: the index "
                    "belongs to other files"
                )
            if tensor in tensors:
                raise CheckpointError(
                    f"{path / name}: tensor {clipped(tensor)} is also in {tensors[tensor].file.name}: "
                    "an index must say which counts"
                )
            tensors[tensor] = info
    if what := no_model(tensors):
        raise CheckpointError(f"{path}: {what}")
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise CheckpointError(
            f"{path / INDEX}: says tensor {clipped(missing[0])} is in {weight_map[missing[0]]}, which does "
            "not hold it"
        )
    return Checkpoint(
        path, config, tensors, metadata, quantization_file="" if stated is None else MODELOPT_CONFIG
    )


#: What reads a checkpoint that is no folder of safetensors: a module of a layer above, by name, which knows
#: families too: it is imported when a path is one of its own. It has ``open_gguf``.
_GGUF = "quant.gguf.reading"


def _container(path: Path) -> Checkpoint | None:
    """A checkpoint in a container of its own; None of a folder of safetensors.

    Raises:
        CheckpointError: the container cannot be read.
    """
    if gguf_file(path) is None:
        return None
    opened: Checkpoint = importlib.import_module(_GGUF).open_gguf(path)
    return opened


def _demand_no_traps(path: Path) -> None:
    """Libraries that read a tokenizer or code open what has its name: they would wait for a pipe, and read a
    file whole that no memory holds."""
    for entry in path.iterdir():
        try:
            found = entry.stat()
        except OSError:  # a link to nowhere is missed where it is needed
            continue
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise CheckpointError(f"{entry}: a pipe or a device, no file of a model: remove it")
        if entry.suffix == ".json" and found.st_size > LARGEST:
            raise CheckpointError(
                f"{entry}: is {found.st_size >> 20} MiB, {LARGEST >> 20} at the most are JSON: fetch it again"
            )


def _side_quantization(path: Path) -> dict[str, Any] | None:
    """The ``quantization_config`` that ModelOpt's side file stands for, in the words of config.json; None
    where there is no such file, or where it says that weights are as they were.

    Source: vLLM's `transformers_utils/config.py::get_config`, `quantization/modelopt.py::from_config`.
    """
    file = path / MODELOPT_CONFIG
    if not file.is_file():
        return None
    value = read_json(file, "ModelOpt's quantization config")
    stated = value.get("quantization", value)
    if not isinstance(stated, dict):
        raise CheckpointError(
            f"{file}: quantization is not an object but {str(stated)[:60]!r}: fetch it again, or remove it "
            "where the weights are not quantized"
        )
    if not stated.get("quant_algo"):
        return None
    rest = {k: v for k, v in stated.items() if k != "exclude_modules"}
    return {**rest, "quant_method": "modelopt", "ignore": stated.get("exclude_modules") or []}
