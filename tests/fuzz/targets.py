"""Which files are made hostile, and which commands read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz import mutations, seeds

Change = Callable[[bytes], st.SearchStrategy[bytes]]
Command = tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """A file of the seeds that is changed before one of the commands runs.

    Attributes:
        file: relative to the seeds' folder; with ``*`` any that matches.
        change: a strategy of hostile bytes, given those of the seed.
        commands: words of ``quant``, or of ``quant-deploy`` behind ``deploy``, run in the folder.
        weight: share of the examples.
    """

    file: str
    change: Change
    commands: tuple[Command, ...]
    weight: int = 10


_TEXT = ("--calibration-dataset", "text.txt", "--samples", "4", "--sequence-length", "32")
_CHUNKS = ("--text", "text.txt", "--chunks", "2", "--length", "32", "-q")
_GPU = ("--gpu", "L40S-48GB")


#: Commands that between them import all that any does.
WARM: tuple[Command, ...] = (
    ("quantize", "-m", "plain", "-o", "out.a", "--method", "gptq", "--group-size", "32", *_TEXT, "-q"),
    (
        "evaluate",
        "packed",
        "--against",
        "plain",
        "--text",
        "text.txt",
        "--chunks",
        "2",
        "--length",
        "32",
        "-q",
    ),
    ("export-vllm", "-m", "packed", "-o", "out.b", "--format", "plain", "-q"),
    ("deploy", "plan", "-m", "packed", *_GPU),
    ("report", "packed", "--output", "out.c.html"),
)


def _reading(model: str) -> tuple[Command, ...]:
    """Commands that look at a model of any kind."""
    return (
        ("inspect", "-m", model),
        ("inspect", "-m", model, "--json"),
        ("verify", model),
        ("verify", model, "--json"),
        ("recommend", "--model-path", model, *_GPU),
        ("evaluate", model, *_CHUNKS),
        ("deploy", "plan", "-m", model, *_GPU),
    )


def _making(model: str) -> tuple[Command, ...]:
    """Commands that make something of an unquantized one."""
    job = ("quantize", "-m", model, "-o", "out", "-q")
    return (
        (*job, "--method", "minmax", "--group-size", "32", "--dry-run"),
        (*job, "--method", "minmax", "--group-size", "32"),
        (*job, "--method", "minmax", "--scheme", "w8a8-fp8", "--json"),
        (*job, "--method", "gptq", "--group-size", "32", *_TEXT),
        ("recipe", "init", "-m", model, *_GPU),
        ("quantize", "-m", model, "-o", "out", *_GPU, "--dry-run"),
    )


def _made(model: str) -> tuple[Command, ...]:
    """Commands that read a quantized one."""
    return (
        *_reading(model),
        ("verify", model, "--against", "plain", "--source", "plain"),
        (
            "evaluate",
            model,
            "--against",
            "plain",
            "--text",
            "text.txt",
            "--chunks",
            "2",
            "--length",
            "32",
            "-q",
        ),
        ("export-vllm", "-m", model, "-o", "out", "-q"),
        ("export-vllm", "-m", model, "-o", "out", "--format", "plain", "-q"),
        ("report", model, "--output", "out.html"),
        ("report", model, "packed", "--output", "out.html", "--json"),
        ("quantize", "-m", model, "-o", "out", "--method", "minmax", "--group-size", "32", "-q"),
        ("deploy", "plan", "-m", model, *_GPU, "--json"),
        ("deploy", "plan", "-m", model, *_GPU, "--output", "kubernetes"),
        ("deploy", "plan", "-m", model, *_GPU, "--engine", "sglang"),
    )


def _calibrated(file: str) -> tuple[Command, ...]:
    job = (
        "quantize",
        "-m",
        "plain",
        "-o",
        "out",
        "--group-size",
        "32",
        "--samples",
        "4",
        "--sequence-length",
        "32",
    )
    return (
        (*job, "--method", "gptq", "--calibration-dataset", file, "-q"),
        (*job, "--method", "gptq", "--calibration-dataset", file, "--dry-run", "-q"),
        ("evaluate", "plain", "--text", file, "--chunks", "2", "--length", "32", "-q"),
    )


_JSON, _LINES, _YAML = mutations.json_files, mutations.line_files, mutations.yaml_files
_WEIGHTS, _BYTES = mutations.safetensors_files, mutations.damaged
_ANY = {name: (*_reading(name), *_making(name)) for name in ("plain", "experts", "windows")}
TARGETS: dict[str, Target] = {
    "config": Target("plain/config.json", _JSON, _ANY["plain"], 30),
    "config of experts": Target("experts/config.json", _JSON, _ANY["experts"], 15),
    "config of windows": Target("windows/config.json", _JSON, _ANY["windows"], 15),
    "generation config": Target("plain/generation_config.json", _JSON, _ANY["plain"]),
    "tokenizer": Target("plain/tokenizer.json", _JSON, (*_calibrated("text.txt"), *_reading("plain"))),
    "tokenizer config": Target("plain/tokenizer_config.json", _JSON, (
        *_calibrated("chat.jsonl"), *_reading("plain"))),
    "index": Target("plain/model.safetensors.index.json", _JSON, _ANY["plain"], 20),
    "weights": Target("plain/model-00001-of-*.safetensors", _WEIGHTS, _ANY["plain"], 25),
    "weights of experts": Target("experts/model-00001-of-*.safetensors", _WEIGHTS, _ANY["experts"]),
    **{
        f"{kind} of {name}": Target(f"{name}/{file}", change, _made(name), weight)
        for name in seeds.QUANTIZED
        for kind, file, change, weight in (
            ("config", "config.json", _JSON, 8),
            ("weights", "*.safetensors", _WEIGHTS, 8),
        )
    },
    "report": Target("packed/quant_report.json", _JSON, _made("packed"), 15),
    "serving config": Target("packed/vllm_config.json", _JSON, _made("packed")),
    "evaluation": Target("packed/quant_evaluation.json", _JSON, (
        ("report", "packed", "--output", "out.html"),
        ("report", "packed", "fp8", "--output", "out.html", "--json"),
        ("inspect", "packed"), ("deploy", "plan", "-m", "packed", *_GPU))),
    "model card": Target("packed/README.md", _BYTES, _made("packed"), 3),
    "recipe": Target("recipe.yaml", _YAML, (
        ("quantize", "-m", "plain", "-o", "out", "--config", "recipe.yaml", "--dry-run", "-q"),
        ("quantize", "-m", "plain", "-o", "out", "--config", "recipe.yaml", "-q"),
        ("quantize", "-m", "experts", "-o", "out", "--config", "recipe.yaml", "--dry-run", "--json")), 40),
    "manifest": Target("manifest.yaml", _YAML, (("manifest", "manifest.yaml", "ledger"),), 40),
    "recipe of jobs": Target("recipe.yaml", _YAML, (("manifest", "manifest.yaml", "ledger"),)),
    "ledger": Target("ledger/events/*.jsonl", _LINES, (
        ("batch", "small.yaml", "--ledger", "ledger", "--dry-run"),
        ("batch", "small.yaml", "--ledger", "ledger", "--dry-run", "--json")), 1),
    "claim": Target("ledger/claims/*/2", _JSON, (
        ("batch", "small.yaml", "--ledger", "ledger", "--dry-run"),), 1),
    "journal": Target("half.work/journal.jsonl", _LINES, (seeds.HALF, (*seeds.HALF, "--fresh")), 10),
    "finished shard": Target("half.work/*.safetensors", _WEIGHTS, (seeds.HALF,), 5),
    "text": Target("text.txt", _BYTES, _calibrated("text.txt")),
    "chat": Target("chat.jsonl", _LINES, _calibrated("chat.jsonl"), 15),
    "rows": Target("rows.json", _JSON, _calibrated("rows.json")),
    "table": Target("rows.csv", _BYTES, _calibrated("rows.csv"), 5),
    "parquet": Target("rows.parquet", _BYTES, _calibrated("rows.parquet"), 15),
}  # fmt: skip


def seed_file(folder: Path, target: Target) -> Path:
    """The seed's file that a target changes.

    Raises:
        StopIteration: there is none, so that the table above is wrong.
    """
    return next(iter(sorted(folder.glob(target.file))))


@st.composite
def examples(draw: st.DrawFn, target: Target, data: bytes) -> tuple[bytes | str, Command]:
    """What becomes of the file, bytes or one of :data:`tests.fuzz.mutations.ODD`, and the command."""
    command = draw(st.sampled_from(target.commands))
    if draw(st.integers(0, 49)) == 0:
        # a pipe that nobody writes into is waited for where it was named, never inside a folder of others
        named = "/" not in target.file
        return draw(st.sampled_from([k for k in mutations.ODD if not (named and k == "fifo")])), command
    return draw(target.change(data)), command
