"""What a job did, as one value: written beside the checkpoint that it made, and read back by whoever asks
later.

Nothing here decides a byte of a checkpoint: what varies between runs of one job (times, memory, date,
machine, command) is in the report alone, not in the hash of the output nor in the fingerprint of unfinished
work.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import quant
from quant import defaults
from quant.documents import read_document, whole_characters

#: The report that ``quant quantize`` and ``quant export-vllm`` leave in their output.
REPORT = "quant_report.json"
#: Why a layer has no relative output error.
NOT_CALIBRATED = "no calibration text went through it, so there is no input to measure it on"
NOT_HELD_OUT = "no calibration row was left to hold out"
NOT_ROUTED = "no token of the held-out row was sent to this expert"

#: Options whose value is a secret, and the part of a URL that may hold one.
_SECRET = re.compile(r"^--?[\w-]*(key|token|password|secret)$", re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_HIDDEN = "***"


def without_numbers(sentence: str) -> str:
    """What sentences have in common that differ in their numbers.

    >>> without_numbers("24 tokens, 1.5e-3 of them")
    '# tokens, # of them'
    """
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "#", sentence)


@dataclass(frozen=True)
class LayerResult:
    """What became of one linear.

    Attributes:
        name: without ``.weight``.
        method: the method's name in its registry.
        scheme: as :class:`quant.schemes.Scheme` prints itself.
        error: ‖y' - y‖² / ‖y‖² of its output on held-out calibration rows; None where that is not known.
        error_missing: why ``error`` is None, or None.
        snr_db: signal-to-noise ratio of the weight; None where nothing was rounded or weights cannot be
            compared.
        tokens: that its input's statistics are of.
        seconds: it took; None where they are not known one by one.
        fallback: what was done instead of what was asked, or None.
        notes: what else a reader must know.
        unit: the unit of work that it was written with; empty where another program made it.
    """

    name: str
    method: str = ""
    scheme: str = ""
    error: float | None = None
    error_missing: str | None = None
    snr_db: float | None = None
    tokens: int = 0
    seconds: float | None = None
    fallback: str | None = None
    notes: tuple[str, ...] = ()
    unit: str = ""

    def to_dict(self) -> dict[str, Any]:
        value = asdict(self) | {"notes": list(self.notes)}
        if not self.unit:
            del value["unit"]
        return value

    @classmethod
    def from_dict(cls, value: object) -> LayerResult:
        value = _mapping(value)
        return cls(
            name=_text(value.get("name")),
            method=_text(value.get("method")),
            scheme=_text(value.get("scheme")),
            error=_number(value.get("error")),
            error_missing=_text(value.get("error_missing")) or None,
            snr_db=_number(value.get("snr_db")),
            tokens=_integer(value.get("tokens")),
            seconds=_number(value.get("seconds")),
            fallback=_text(value.get("fallback")) or None,
            notes=_texts(value.get("notes")),
            unit=_text(value.get("unit")),
        )


@dataclass(frozen=True)
class FoldResult:
    """Scaling of an input that was moved into the weights around it.

    Attributes:
        suppressor: whose factors they are.
        kind: ``norm`` or ``linear``, what makes the input.
        source: that module's name.
        linears: those that read the input.
        norm_offset: what the norm adds to its gain (Gemma: 1).
        changed: tensors of the source that hold other values for it.
        factors: the smallest and the largest.
        notes: what the suppressor says of it.
    """

    suppressor: str
    kind: str
    source: str
    linears: tuple[str, ...]
    norm_offset: float
    changed: tuple[str, ...] = ()
    factors: tuple[float, float] = (1.0, 1.0)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: object) -> FoldResult | None:
        """None of what does not say where the scaling went."""
        value = _mapping(value)
        kind, source = _text(value.get("kind")), _text(value.get("source"))
        linears, offset = _texts(value.get("linears")), _number(value.get("norm_offset"))
        if kind not in ("norm", "linear") or not source or not linears or offset is None:
            return None
        given = value.get("factors")
        ends = [x for f in given if (x := _number(f)) is not None] if isinstance(given, list) else []
        return cls(
            suppressor=_text(value.get("suppressor")),
            kind=kind,
            source=source,
            linears=linears,
            norm_offset=offset,
            changed=_texts(value.get("changed")),
            factors=(ends[0], ends[1]) if len(ends) == 2 else (1.0, 1.0),
            notes=_texts(value.get("notes")),
        )


@dataclass(frozen=True)
class TensorsAccount:
    """What became of every tensor of the source: names of those that were quantized, copied byte for byte,
    had scaling folded into them, were carried over with the codes that they have in a quantized source, or
    were left out; and of those that were added."""

    quantized: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, list[str]]:
        return {k: list(v) for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: object) -> TensorsAccount:
        value = _mapping(value)
        return cls(**{f.name: _texts(value.get(f.name)) for f in fields(cls)})


@dataclass(frozen=True)
class Quantization:
    """What a report says of a job that quantized, or only scaled.

    Attributes:
        method: as asked; ``methods``: those that were used.
        scheme: of most linears, as :meth:`quant.schemes.Scheme.to_dict` has it.
        target: who must load the output: ``vllm`` or ``other``.
        settings: of the recipe, those that decide the output.
        bits_per_weight: stored, of all matrices of the decoder, those that stay as they are included.
        calibration: rows, length in tokens, digest and notes of the calibration text; None without.
        layers, tensors: what became of each.
        folds: by the linears that share the scaled input.
        experts: by mixture, how calibration tokens are spread over its experts, as
            :func:`quant.pipeline.experts.coverage` has it.
        unquantized_linears: of any part of the model.
        plain_in_vllm: those of the decoder's blocks that vLLM builds in 16 bits whatever a config says, each
            with the reason.
        left: those of the decoder's blocks that no group of the scheme fits, each with that reason.
        function: how far the output's logits are from the source's, of a job that only scales.
        source: what the source was, where it is quantized already (``quant_method``, ``format``,
            ``schemes``), and what became of its matrices (``rounded_anew``, ``kept``, ``dequantized``); and
            what else was found in it (``notes``); or None.
        allocation: how schemes were chosen layer by layer for a size: what each would lose in each
            (``layers``), what is predicted and was measured of the choice and of the best ``uniform`` scheme;
            None where they were not.
        backend: name, Python, versions and notes of the library that quantized; None of our own methods.
        scratch_bytes, peak_gpu_bytes: the largest size of scratch files, of all ranks, and the GPU's largest
            memory.
    """

    method: str = ""
    methods: tuple[str, ...] = ()
    scheme: Mapping[str, Any] = field(default_factory=dict)
    target: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    bits_per_weight: float | None = None
    calibration: Mapping[str, Any] | None = None
    layers: tuple[LayerResult, ...] = ()
    tensors: TensorsAccount = field(default_factory=TensorsAccount)
    folds: Mapping[str, FoldResult] = field(default_factory=dict)
    experts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unquantized_linears: tuple[str, ...] = ()
    plain_in_vllm: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    function: Mapping[str, Any] | None = None
    source: Mapping[str, Any] | None = None
    allocation: Mapping[str, Any] | None = None
    backend: Mapping[str, Any] | None = None
    scratch_bytes: int = 0
    peak_gpu_bytes: int = 0

    @property
    def prunes(self) -> bool:
        """Whether it set weights to zero and rounded none."""
        return bool(self.methods) and set(self.methods) <= defaults.UNROUNDED - {"none"}

    @property
    def fallbacks(self) -> dict[str, str]:
        """By layer, what was done instead of what was asked."""
        return {x.name: x.fallback for x in self.layers if x.fallback}

    @property
    def kinds_of_fallbacks(self) -> list[tuple[list[str], str]]:
        """Layers by what is said of them, which differs in its numbers alone; and what is said of the first:
        of a mixture's experts there are thousands."""
        found: dict[str, list[str]] = {}
        for name, said in self.fallbacks.items():
            found.setdefault(without_numbers(said), []).append(name)
        return [(names, self.fallbacks[names[0]]) for names in found.values()]

    def to_dict(self) -> dict[str, Any]:
        value = {
            "method": self.method,
            "methods": list(self.methods),
            "scheme": dict(self.scheme),
            "target": self.target,
            "settings": dict(self.settings),
            "bits_per_weight": self.bits_per_weight,
            "calibration": None if self.calibration is None else dict(self.calibration),
            "layers": [x.to_dict() for x in self.layers],
            "fallbacks": [{"name": n, "fallback": f} for n, f in self.fallbacks.items()],
            "tensors": self.tensors.to_dict(),
            "folds": {k: f.to_dict() for k, f in self.folds.items()},
            "experts": {k: dict(c) for k, c in self.experts.items()},
            "unquantized_linears": list(self.unquantized_linears),
            "plain_in_vllm": dict(self.plain_in_vllm),
            "left": dict(self.left),
            "function": None if self.function is None else dict(self.function),
            "source": None if self.source is None else dict(self.source),
            "scratch_bytes": self.scratch_bytes,
            "peak_gpu_bytes": self.peak_gpu_bytes,
        }
        if self.allocation is not None:
            value["allocation"] = dict(self.allocation)
        return value if self.backend is None else value | {"backend": dict(self.backend)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Quantization:
        folds = {k: FoldResult.from_dict(f) for k, f in _mapping(value.get("folds")).items()}
        return cls(
            method=_text(value.get("method")),
            methods=_texts(value.get("methods")),
            scheme=_mapping(value.get("scheme")),
            target=_text(value.get("target")),
            settings=_mapping(value.get("settings")),
            bits_per_weight=_number(value.get("bits_per_weight")),
            calibration=_mapping(value.get("calibration")) or None,
            layers=tuple(
                layer for x in _mappings(value.get("layers")) if (layer := LayerResult.from_dict(x)).name
            ),
            tensors=TensorsAccount.from_dict(value.get("tensors")),
            folds={k: f for k, f in folds.items() if f is not None},
            experts={k: _mapping(c) for k, c in _mapping(value.get("experts")).items()},
            unquantized_linears=_texts(value.get("unquantized_linears")),
            plain_in_vllm={k: _text(v) for k, v in _mapping(value.get("plain_in_vllm")).items()},
            left={n: _text(r) for n, r in _mapping(value.get("left")).items()},
            function=_mapping(value.get("function")) or None,
            source=_mapping(value.get("source")) or None,
            allocation=_mapping(value.get("allocation")) or None,
            backend=_mapping(value.get("backend")) or None,
            scratch_bytes=_integer(value.get("scratch_bytes")),
            peak_gpu_bytes=_integer(value.get("peak_gpu_bytes")),
        )


@dataclass(frozen=True)
class Conversion:
    """What a report says of a checkpoint that was turned from one format into another.

    Attributes:
        source_format: the checkpoint's own.
        linears: how many were carried over.
        scales_rounded: linears whose scales the model's dtype does not hold exactly.
        requantized: linear → signal-to-noise ratio of what was rounded anew, in dB.
        repairs: what was mended on the way.
        kv_cache_scales: how many were carried over.
        tensors_dropped: ``tensor`` and ``reason`` of what the format has no place for.
    """

    source_format: str = ""
    linears: int = 0
    scales_rounded: tuple[str, ...] = ()
    requantized: Mapping[str, float] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()
    kv_cache_scales: int = 0
    tensors_dropped: tuple[Mapping[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "source_format": self.source_format,
            "linears": self.linears,
            "scales_rounded": list(self.scales_rounded),
            "requantized": {n: {"snr_db": snr} for n, snr in self.requantized.items()},
            "repairs": list(self.repairs),
            "kv_cache_scales": self.kv_cache_scales,
            "tensors_dropped": [dict(d) for d in self.tensors_dropped],
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Conversion:
        ratios = {
            n: _number(_mapping(x).get("snr_db")) for n, x in _mapping(value.get("requantized")).items()
        }
        return cls(
            source_format=_text(value.get("source_format")),
            linears=_integer(value.get("linears")),
            scales_rounded=_texts(value.get("scales_rounded")),
            requantized={n: snr for n, snr in ratios.items() if snr is not None},
            repairs=_texts(value.get("repairs")),
            kv_cache_scales=_integer(value.get("kv_cache_scales")),
            tensors_dropped=_mappings(value.get("tensors_dropped")),
        )


@dataclass(frozen=True)
class Pruning:
    """What a report says of a checkpoint with fewer or narrower decoder blocks than its source.

    Attributes:
        blocks: that the source has.
        dropped: the numbers of those that are left out.
        measure: by what they were chosen, ``kl`` (nats per token) or ``angle`` (half turns); empty: they were
            named.
        steps: of each block in the order they went, ``dropped`` and the ``importance`` by number of all that
            were there then.
        widths: of each kind of unit in the order they went: its ``kind`` and what it is ``called``, how many
            each block had ``before`` and has ``after``, the ``kl`` to the source then, nats per token of text
            that nothing was measured on, by block the units that were ``kept`` and the ``scores`` of all, and
            the tensors that were ``fitted`` to their loss.
        calibration: the text that they were measured on; None without.
        costs: where the recipe prunes first, for each ``step`` the ``kl`` to the source behind it, nats per
            token of the same text, with its ``standard_error``.
    """

    blocks: int = 0
    dropped: tuple[int, ...] = ()
    measure: str = ""
    steps: tuple[Mapping[str, Any], ...] = ()
    widths: tuple[Mapping[str, Any], ...] = ()
    costs: tuple[Mapping[str, Any], ...] = ()
    calibration: Mapping[str, Any] | None = None

    @property
    def kept(self) -> tuple[int, ...]:
        """The numbers of the blocks that stay."""
        return tuple(i for i in range(self.blocks) if i not in self.dropped)

    @property
    def fitted(self) -> tuple[str, ...]:
        """Tensors whose values are not the source's, or some of them."""
        return tuple(str(name) for w in self.widths for name in w.get("fitted") or ())

    @property
    def summary(self) -> list[tuple[str, str]]:
        """What there is less of, and how much."""
        rows = []
        if self.dropped:
            gone = ", ".join(map(str, self.dropped))
            rows.append(("blocks", f"{self.blocks} → {len(self.kept)}, without {gone}"))
        rows += [(str(w.get("called")), f"{w.get('before')} → {w.get('after')}") for w in self.widths]
        return rows

    def to_dict(self) -> dict[str, Any]:
        return {
            "pruning": {
                "blocks": self.blocks,
                "dropped": list(self.dropped),
                "measure": self.measure,
                "steps": [dict(s) for s in self.steps],
                "widths": [dict(w) for w in self.widths],
                "costs": [dict(c) for c in self.costs],
                "calibration": None if self.calibration is None else dict(self.calibration),
            }
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Pruning:
        value = _mapping(value.get("pruning"))
        dropped = value.get("dropped")
        return cls(
            blocks=_integer(value.get("blocks")),
            dropped=tuple(_integer(x) for x in dropped) if isinstance(dropped, list) else (),
            measure=_text(value.get("measure")),
            steps=_mappings(value.get("steps")),
            widths=_mappings(value.get("widths")),
            costs=_mappings(value.get("costs")),
            calibration=_mapping(value.get("calibration")) or None,
        )


@dataclass(frozen=True)
class Teaching:
    """What a report says of a student that was trained by its teacher.

    Attributes:
        teacher: its checkpoint.
        trained: ``weights``, or ``numbers``: norms and scales alone.
        steps: of the optimizer; ``rows``: of text that it was trained with.
        losses: of each step; ``judged``: steps and the KL divergence to the teacher on held-out rows then,
            nats per token.
        settings: of the training.
        calibration: the text.
        changed: tensors that hold other values than the student's.
        target: who must load the output, as the student: ``vllm`` or ``other``.
    """

    teacher: str = ""
    trained: str = ""
    steps: int = 0
    rows: int = 0
    losses: tuple[float, ...] = ()
    judged: tuple[tuple[int, float], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    changed: tuple[str, ...] = ()
    target: str = "vllm"

    @property
    def before(self) -> float | None:
        """KL before the first step."""
        return self.judged[0][1] if self.judged else None

    @property
    def after(self) -> float | None:
        """KL of what was written: the least."""
        return min((kl for _, kl in self.judged), default=None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "distillation": asdict(self)
            | {
                "losses": list(self.losses),
                "judged": [list(pair) for pair in self.judged],
                "changed": list(self.changed),
                "kl_before": self.before,
                "kl_after": self.after,
            }
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Teaching:
        value = _mapping(value.get("distillation"))
        losses, judged = value.get("losses"), value.get("judged")
        pairs = [x for x in judged if isinstance(x, list) and len(x) == 2] if isinstance(judged, list) else []
        return cls(
            teacher=_text(value.get("teacher")),
            trained=_text(value.get("trained")),
            steps=_integer(value.get("steps")),
            rows=_integer(value.get("rows")),
            losses=tuple(x for v in losses if (x := _number(v)) is not None)
            if isinstance(losses, list)
            else (),
            judged=tuple((_integer(s), x) for s, v in pairs if (x := _number(v)) is not None),
            settings=_mapping(value.get("settings")),
            calibration=_mapping(value.get("calibration")) or None,
            changed=_texts(value.get("changed")),
            target=_text(value.get("target")) or "vllm",
        )


@dataclass(frozen=True)
class Provenance:
    """What made a checkpoint, when and where.

    Attributes:
        quant, torch, transformers: versions.
        date: of the report, ISO 8601 in UTC.
        machine: its GPU where the job used one, its CPU and cores, in words.
        command: the words that were typed, values of secrets hidden; None where Python called.
    """

    quant: str = ""
    torch: str = ""
    transformers: str = ""
    date: str = ""
    machine: str = ""
    command: tuple[str, ...] | None = None

    @classmethod
    def here(cls, command: Sequence[str] | None = None, gpu: str = "") -> Provenance:
        """Of this process; ``gpu``: the name of the GPU that it works on."""
        return cls(
            quant=quant.__version__,
            torch=_version("torch"),
            transformers=_version("transformers"),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            machine=", ".join(filter(None, (gpu, machine()))),
            command=None if command is None else without_secrets(command),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"command": None if self.command is None else list(self.command)}

    @classmethod
    def from_dict(cls, value: object) -> Provenance:
        value = _mapping(value)
        texts = {f.name: _text(value.get(f.name)) for f in fields(cls) if f.name != "command"}
        return cls(**texts, command=_texts(value.get("command")) or None)


@dataclass(frozen=True)
class Report:
    """Everything that happened while a checkpoint was made.

    Attributes:
        output_path: where it is published.
        source_path: the checkpoint that it was made from.
        format: its format's name in the registry.
        source_bytes, output_bytes: of the tensors as they are stored; files are larger by their headers.
        seconds: by phase, and ``total``.
        peak_rss_bytes: largest resident memory of the process.
        side_files_dropped: ``file`` and ``reason`` of the source's files that are not in the output.
        vllm: engine arguments, as in ``vllm_config.json``.
        verify: the checks that the output passed, as :meth:`quant.evaluation.verify.Verification.to_dict` has
            them.
        output_hash: of the output's tensors.
        quantization: what was quantized or scaled; None of a conversion alone.
        conversion: what was turned into another format; None where nothing was.
        pruning: which decoder blocks were left out; None where none were.
        teaching: how it was trained by a teacher; None where it was not.
        provenance: what made it, when and where.
    """

    output_path: str = ""
    source_path: str = ""
    format: str = ""
    source_bytes: int = 0
    output_bytes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    side_files_dropped: tuple[Mapping[str, str], ...] = ()
    vllm: Mapping[str, Any] = field(default_factory=dict)
    verify: Mapping[str, Any] = field(default_factory=dict)
    output_hash: str = ""
    quantization: Quantization | None = None
    conversion: Conversion | None = None
    pruning: Pruning | None = None
    teaching: Teaching | None = None
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def serve_command(self) -> str | None:
        """The command that serves the output, quoted for a shell; None of one that vLLM need not load."""
        made = (self.quantization, self.teaching)
        if any(part is not None and part.target == "other" for part in made):
            return None
        return shlex.join(["quant-deploy", "serve", "-m", self.output_path])

    def to_dict(self) -> dict[str, Any]:
        """One JSON object: what is of a quantization or a conversion stands among the rest."""
        parts = (self.quantization, self.conversion, self.pruning, self.teaching)
        return {
            "output_path": self.output_path,
            "source_path": self.source_path,
            "format": self.format,
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            **{k: v for part in parts if part is not None for k, v in part.to_dict().items()},
            "seconds": dict(self.seconds),
            "peak_rss_bytes": self.peak_rss_bytes,
            "side_files_dropped": [dict(d) for d in self.side_files_dropped],
            "vllm": dict(self.vllm),
            "verify": dict(self.verify),
            "output_hash": self.output_hash,
            "provenance": self.provenance.to_dict(),
        }

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Report:
        """The reverse of :meth:`to_dict`. Keys that are missing or hold something else are as by default:
        older releases wrote fewer."""
        seconds = {k: _number(v) for k, v in _mapping(value.get("seconds")).items()}
        return cls(
            output_path=_text(value.get("output_path")),
            source_path=_text(value.get("source_path")),
            format=_text(value.get("format")),
            source_bytes=_integer(value.get("source_bytes")),
            output_bytes=_integer(value.get("output_bytes")),
            seconds={k: v for k, v in seconds.items() if v is not None},
            peak_rss_bytes=_integer(value.get("peak_rss_bytes")),
            side_files_dropped=_mappings(value.get("side_files_dropped")),
            vllm=_mapping(value.get("vllm")),
            verify=_mapping(value.get("verify")),
            output_hash=_text(value.get("output_hash")),
            quantization=Quantization.from_dict(value)
            if {"layers", "tensors", "folds"} & value.keys()
            else None,
            conversion=Conversion.from_dict(value) if "source_format" in value else None,
            pruning=Pruning.from_dict(value) if "pruning" in value else None,
            teaching=Teaching.from_dict(value) if "distillation" in value else None,
            provenance=Provenance.from_dict(value.get("provenance")),
        )

    @classmethod
    def load(cls, path: str | Path) -> Report | None:
        """The report in a checkpoint directory; None where there is none, or none that can be read."""
        try:
            value = whole_characters(read_document(Path(path) / REPORT, bounded=False))
        except (OSError, ValueError):
            return None
        return cls.from_dict(value) if isinstance(value, dict) else None


def machine() -> str:
    """The CPU's model and the cores that this process may use, in words."""
    try:
        model = re.search(r"^model name\s*:\s*(\S.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        model = None
    name = model[1].strip() if model else platform.processor() or platform.machine() or "unknown CPU"
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return f"{name}, {cores} {'core' if cores == 1 else 'cores'}"


def without_secrets(command: Sequence[str]) -> tuple[str, ...]:
    """A command line whose program is named without its folder, and in which the values of options called
    key, token, password or secret, and users and passwords in URLs, are ``***``."""
    words: list[str] = []
    hidden = False
    for i, word in enumerate(command):
        option, equals, _ = word.partition("=")
        if hidden:
            word = _HIDDEN
        elif equals and _SECRET.match(option):
            word = f"{option}={_HIDDEN}"
        hidden = not hidden and not equals and bool(_SECRET.match(word))
        words.append(_USER.sub(_HIDDEN, Path(word).name if i == 0 else word))
    return tuple(words)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _text(value: object) -> str:
    """Halves of characters, which JSON can hold and no terminal prints, become question marks."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else ""


def _integer(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else 0


def _number(value: object) -> float | None:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _integer(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _mappings(value: object) -> tuple[dict[str, Any], ...]:
    return tuple(x for x in value if isinstance(x, dict)) if isinstance(value, list) else ()


def _texts(value: object) -> tuple[str, ...]:
    return tuple(_text(x) for x in value if isinstance(x, str)) if isinstance(value, list) else ()
