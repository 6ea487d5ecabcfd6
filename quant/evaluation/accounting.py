"""What became of a source in the checkpoint that was made from it: every tensor quantized, copied or changed
for a stated reason, every side file there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.checkpoint.reader import REWRITTEN, STALE, Checkpoint, SideFile
from quant.documents import read_document
from quant.formats import QuantizedLayers
from quant.formats.reading import dequantized
from quant.models.cutting import without_blocks
from quant.models.linears import LinearRef, fused_tensors
from quant.models.narrowing import again_narrowed
from quant.models.stacking import stacked
from quant.report.value import Pruning, Report, TensorsAccount
from quant.vllm.config import block_count
from quant.vllm.layers import Linear

if TYPE_CHECKING:
    import torch


def copied_tensors(
    checkpoint: Checkpoint, source: Checkpoint, layers: QuantizedLayers | None, noted: Noted
) -> set[str]:
    """Tensors that must have the source's bytes. Of a checkpoint that is not quantized, only its report tells
    them."""
    if layers is None and not noted.told:
        return set()
    source = dequantized(source)
    linears = {*(layers.linears if layers is not None else ()), *noted.rounded}
    changed = noted.changed
    return {
        name
        for name, info in source.tensors.items()
        if name not in changed
        and name not in source.computed
        and not {name, name.removesuffix(".weight")} & linears
        and (copy := checkpoint.tensors.get(name)) is not None
        and (copy.dtype, copy.shape) == (info.dtype, info.shape)
    }


def counterpart(path: str | Path, source: Checkpoint) -> Checkpoint:
    """The source as a checkpoint has it to compare with: without the decoder blocks, and what else of each
    block, that its report says were left out."""
    report = Report.load(path)
    cut = None if report is None else report.pruning
    if cut is None or cut.blocks != block_count(source.config) or not cut.kept:
        return source
    if cut.dropped:
        source = without_blocks(source, cut.kept)
    for width in cut.widths:
        source = again_narrowed(source, width)
    return source


@dataclass(frozen=True)
class Noted:
    """What a report says of tensors that are not the source's to the byte.

    Attributes:
        told: whether there is a report.
        rounded: linears that were quantized, or pruned of single weights, though the output may hold them as
            plain values.
        folded: those with scaling folded in.
        added: those that calibration made.
        fitted: those that were fitted to what pruning took.
        taught: those that were trained by a teacher.
        cut: what pruning took, a line each.
    """

    told: bool = False
    rounded: Sequence[str] = ()
    folded: Sequence[str] = ()
    added: Sequence[str] = ()
    fitted: Sequence[str] = ()
    taught: Sequence[str] = ()
    cut: Sequence[str] = ()

    @property
    def changed(self) -> set[str]:
        """Tensors that hold other numbers than the source, without being quantized."""
        return {*self.folded, *self.fitted, *self.taught}

    @property
    def own_values(self) -> list[str]:
        """What holds values that nothing in the source tells, by how it came to them."""
        counted = {
            "were fitted when it was pruned": self.fitted,
            "were trained by a teacher": self.taught,
            "have scaling folded in": self.folded,
        }
        return [f"{len(names)} {how}" for how, names in counted.items() if names]

    def exceptions(self) -> str:
        """What is not as it was in the source, for a reader."""
        parts = [f"{len(self.folded)} with scaling folded in"] if self.folded else []
        parts += [f"{len(self.fitted)} fitted to what was pruned"] if self.fitted else []
        parts += [f"{len(self.taught)} taught"] if self.taught else []
        parts += [f"after pruning ({'; '.join(self.cut)})"] if self.cut else []
        return "".join(f", {part}" for part in parts)


def noted_tensors(path: Path) -> Noted:
    """What the report in an output directory, if there is one, says of tensors."""
    report = Report.load(path)
    if report is None:
        return Noted()
    tensors = TensorsAccount() if report.quantization is None else report.quantization.tensors
    pruning = report.pruning or Pruning()
    return Noted(
        told=True,
        rounded=[*tensors.quantized, *tensors.kept],
        folded=tensors.folded,
        added=tensors.added,
        fitted=pruning.fitted,
        taught=() if report.teaching is None else report.teaching.changed,
        cut=[f"{what} {how}" for what, how in pruning.summary],
    )


def differing_cuts(
    checkpoint: Checkpoint, source: Checkpoint, layers: QuantizedLayers | None, noted: Noted
) -> set[str]:
    """Tensors that are not, to the bit, in the same dtype and shape, what pruning left of the source's
    (:func:`counterpart`), but those that are quantized and those that are noted as changed."""
    import torch

    linears = {*(layers.linears if layers is not None else ()), *noted.rounded}
    changed = noted.changed
    differing = set()
    for name in source.computed if noted.cut else ():
        copy, info = checkpoint.tensors.get(name), source.tensors.get(name)
        if copy is None or info is None or name in changed:
            continue
        if {name, name.removesuffix(".weight")} & linears:
            continue
        if (copy.dtype, copy.shape) != (info.dtype, info.shape):
            differing.add(name)
            continue
        here, there = (x.read(name).contiguous().view(torch.uint8) for x in (checkpoint, source))
        if not torch.equal(here, there):
            differing.add(name)
    return differing


def source_problems(
    checkpoint: Checkpoint,
    source: Checkpoint,
    layers: QuantizedLayers | None,
    differing: Collection[str],
    made: Sequence[str],
) -> list[str]:
    """Tensors of the source that are neither quantized nor the same here, and tensors that came from nowhere.

    Args:
        differing: copies whose bytes differ, or that are not what pruning left.
        made: tensors that calibration added.
    """
    problems = []
    linears = layers.linears if layers else {}
    source = stacked(dequantized(source), checkpoint.tensors)
    fused = fused_tensors(source.tensors, source.config)
    apart = {name: refs for name, refs in fused.items() if name not in checkpoint.tensors}
    own = {s.name for x in linears.values() for s in layers.form.specs(x, "BF16")} if layers else set()
    own |= {n for stack in layers.stacks.values() for n in stack.tensors} if layers else set()
    for name, info in source.tensors.items():
        module = name.removesuffix(".weight")
        if module in linears and name.endswith(".weight"):
            if info.shape != linears[module].stored_shape:
                problems.append(f"{name} is {info.shape} in the source, {linears[module].stored_shape} here")
            continue
        copy = checkpoint.tensors.get(name)
        if layers is not None and (stack := layers.stacks.get(name)) is not None:
            if info.shape != stack.shape:
                problems.append(f"{name} is {info.shape} in the source, {stack.shape} here")
        elif name in apart:
            problems += _apart_problems(checkpoint, source, linears, name, apart[name])
        elif copy is None:
            problems.append(f"{name} of the source is lost")
        elif name in source.computed and name not in differing:
            if copy.shape != info.shape:
                problems.append(f"{name} was {info.shape}, is {copy.shape}")
        elif (copy.dtype, copy.shape) != (info.dtype, info.shape):
            problems.append(f"{name} was {info.dtype} {info.shape}, is {copy.dtype} {copy.shape}")
        elif name in differing:
            problems.append(f"{name} differs from the source although it is not quantized")
    made = [
        *made,
        *(f"{ref.name}.{last}" for refs in apart.values() for ref in refs for last in ("weight", "bias")),
    ]
    problems += [
        f"{n} is not in the source"
        for n in checkpoint.tensors
        if n not in source.tensors and n not in own and n not in made
    ]
    return problems


def _apart_problems(
    checkpoint: Checkpoint,
    source: Checkpoint,
    linears: Mapping[str, Linear],
    name: str,
    refs: Sequence[LinearRef],
) -> list[str]:
    """What is missing of a fused tensor of experts that was taken apart: each must be quantized, or be there
    as it was."""
    problems = []
    for ref in refs:
        bias = ref.bias is not None and ref.bias.tensor == name
        part, last = (ref.bias, "bias") if ref.bias is not None and bias else (ref.weight, "weight")
        held = linears.get(ref.name)
        if held is not None and not bias:
            if (held.n, held.k) != (ref.n, ref.k):
                problems.append(
                    f"{ref.name} is {(ref.n, ref.k)} in the source's {name}, {(held.n, held.k)} here"
                )
        elif f"{ref.name}.{last}" not in checkpoint.tensors:
            problems.append(f"{ref.name}, a part of the source's {name}, is lost")
        elif not _same_values(checkpoint.read(f"{ref.name}.{last}"), part.read(source)):
            problems.append(f"{ref.name}.{last} differs from the source although it is not quantized")
    return problems


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())


def side_file_problems(checkpoint: Checkpoint, source: Checkpoint, own: bool = True) -> list[str]:
    """Side files of the source that are not here as they are there; those that are left out for a reason may
    be missing.

    Args:
        own: made here, so that they must be there byte for byte. Other programs load a tokenizer and a
            generation config and save them anew: theirs must say the same.
    """
    problems = []
    for file in source.side_files():
        if file.dropped or file.relative in STALE or file.relative in REWRITTEN:
            continue
        copy = checkpoint.path / file.relative
        same = copy.is_file() and copy.read_bytes() == file.path.read_bytes()
        if same or (not own and _says_the_same(file, checkpoint.path, source)):
            continue
        problems.append(f"{file.relative} {'differs' if copy.is_file() else 'is missing'}")
    return problems


#: Ends of the names of files that no engine reads.
_FOR_PEOPLE = (".md", ".txt", ".png", ".jpg", ".jpeg", ".pdf", ".gitattributes", "LICENSE", "NOTICE")
#: Files that repeat what tokenizer.json holds, which programs of today save alone.
_IN_TOKENIZER = frozenset(
    {
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
    }
)
#: Keys of a generation config that say nothing of generating, and values that hold where nothing is stated
#: (transformers' `GenerationConfig`), which are not saved.
_BOOKKEEPING = frozenset({"transformers_version", "_from_model_config"})
_UNSTATED: dict[str, Any] = {
    "do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0,
    "max_length": 20, "num_beams": 1, "num_return_sequences": 1, "length_penalty": 1.0, "use_cache": True,
    "output_attentions": False, "output_hidden_states": False, "output_scores": False,
}  # fmt: skip


def _says_the_same(file: SideFile, path: Path, source: Checkpoint) -> bool:
    """Whether an engine reads from a directory that another program saved what it reads from a side file of
    the source."""
    name = file.relative
    if name in _IN_TOKENIZER and (path / "tokenizer.json").is_file():
        return name != "tokenizer_config.json" or _template(source.path) in (None, _template(path))
    if name.endswith(_FOR_PEOPLE):
        return True
    if name == "chat_template.jinja":
        return _template(source.path) == _template(path)
    if not name.endswith(".json"):
        return False
    there, here = _json(file.path), _json(path / name)
    if name == "generation_config.json":
        stated = {k: v for k, v in there.items() if k not in _BOOKKEEPING and v is not None}
        known = {**_UNSTATED, **source.config, **here}
        return all(known.get(k) == v for k, v in stated.items())
    return (path / name).is_file() and all(here.get(k) == v for k, v in there.items())


def _template(path: Path) -> str | None:
    """The chat template of a directory, wherever it stands; None where there is none."""
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8", errors="replace").strip()
    stated = _json(path / "tokenizer_config.json").get("chat_template")
    return stated.strip() if isinstance(stated, str) else None


def _json(file: Path) -> dict[str, Any]:
    """An object of JSON; empty where there is none."""
    try:
        value = read_document(file)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
