"""The files that hostile ones are made from: a model so small that every command takes milliseconds, what the
project's own commands make of it, and a job and a batch in the middle of their work."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests import helpers

#: Folder of a quantized seed → what it is made with.
QUANTIZED: dict[str, dict[str, Any]] = {
    "packed": {"group_size": 32},
    "asymmetric": {"group_size": 32, "symmetric": False, "method": "gptq"},
    "fp8": {"scheme": "w8a8-fp8-tensor", "format": "fp8"},
    "awq": {"group_size": 32, "symmetric": False, "format": "awq"},
    "gptq": {"group_size": 32, "format": "gptq"},
    "nvfp4": {"scheme": "nvfp4a16"},
    "int8": {"scheme": "w8a8-int8", "outlier_suppression": "none"},
}
TEXT = "".join(f"Sentence {i} of a text that is read to the end, {i * i} words away. " for i in range(60))
RECIPE = {
    "method": "gptq", "scheme": "w4a16", "group_size": 32, "samples": 4, "sequence_length": 32, "seed": 1,
    "calibration_dataset": ["text.txt"], "damping": 0.01, "ignore": ["*.down_proj"], "format": "auto",
    "rules": [{"layers": "first:1", "scheme": "w8a16"}, {"layers": "*.o_proj", "bits": 8}],
}  # fmt: skip
MANIFEST = {
    "defaults": {"overrides": {"samples": 4, "sequence_length": 32}, "evaluate": {"max_kl": 0.2, "chunks": 4},
                 "retries": 2, "priority": 1, "threads": 1, "retry_delay": 0.1},
    "matrix": [{"models": ["plain", "./plain"], "recipes": ["recipe.yaml"],
                "axes": {"scheme": ["w4a16", "w8a16"], "seed": [5]},
                "output": "out/{model}-{recipe}-{scheme}-{seed}",
                "overrides": {"samples": 9}}],
    "jobs": [{"name": "one", "model": "plain", "recipe": "recipe.yaml", "output": "out/one", "priority": 10,
              "verify": True, "environment": {"A": "1"}}, {"model": "plain", "output": "out/two"}],
}  # fmt: skip
#: The job that is half done.
HALF = ("quantize", "-m", "plain", "-o", "half", "--method", "gptq", "--group-size", "32", "--samples", "4",
        "--sequence-length", "32", "--calibration-dataset", "text.txt")  # fmt: skip
SMALL = {"model": "plain", "output": "small", "overrides": {"method": "minmax", "group_size": 32}}
CHAT = [{"messages": [{"role": "user", "content": f"{i} {TEXT[:400]}"},
                      {"role": "assistant", "content": TEXT[400:900]}]} for i in range(6)]  # fmt: skip


def add_small_tokenizer(folder: Path) -> None:
    """One token a byte, which is loaded in no time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(["<s>", "</s>", *words])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
              "model_max_length": 256, "clean_up_tokenization_spaces": False,
              "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def command(*words: str) -> None:
    """Runs ``quant`` in this process.

    Raises:
        RuntimeError: it failed.
    """
    import quantize

    try:
        quantize.main(list(words))
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"{' '.join(words)}: exit status {stop.code}") from stop


class _Stopped(BaseException):
    """No Exception: those that are not foreseen end in an exit status."""


def _half_done() -> None:
    """The work folder of a job of which two units are finished: what :data:`HALF` goes on with."""
    from quant.pipeline import units

    write, done = units.write_unit, []

    def stopping(*arguments: Any) -> Any:
        if len(done) == 2:
            raise _Stopped
        done.append(1)
        return write(*arguments)

    units.write_unit = stopping
    try:
        command(*HALF, "-q")
    except _Stopped:
        pass
    finally:
        units.write_unit = write


def make(folder: Path) -> Path:
    """All seeds, in a folder that need not be there."""
    folder.mkdir(parents=True, exist_ok=True)
    with inside(folder):
        shape: dict[str, Any] = {
            "vocab_size": 264,
            "hidden_size": 64,
            "intermediate_size": 64,
            "shard": "60KB",
        }
        for name, kind, more in (
            ("plain", "llama", {}),
            (
                "experts",
                "mixtral",
                {"num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 1},
            ),
            ("windows", "gemma3_text", {"num_hidden_layers": 2, "num_key_value_heads": 2}),
        ):
            model = helpers.make_checkpoint(Path(name), kind, **{**shape, **more})
            add_small_tokenizer(model)
        Path("text.txt").write_text(TEXT)
        for name, options in QUANTIZED.items():
            helpers.quantize(Path("plain"), Path(name), **{"samples": 4, "sequence_length": 32,
                "calibration_dataset": [Path("text.txt")]} | options)  # fmt: skip
        command("evaluate", "packed", "--against", "plain", "--text", "text.txt", "--chunks", "2",
                "--length", "32", "--save", "-q")  # fmt: skip
        Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        Path("manifest.yaml").write_text(yaml.safe_dump(MANIFEST))
        Path("chat.jsonl").write_text("".join(json.dumps(x) + "\n" for x in CHAT))
        Path("rows.json").write_text(json.dumps([{"text": TEXT[i:], "n": i} for i in range(6)]))
        Path("rows.csv").write_text("text,n\n" + "".join(f'"{TEXT}",{i}\n' for i in range(6)))
        _parquet(Path("rows.parquet"))
        _half_done()
        Path("small.yaml").write_text(yaml.safe_dump({"jobs": [SMALL]}))
        _ledger()
    return folder


def _parquet(file: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [TEXT[i:] for i in range(6)], "n": list(range(6))}), file)


def _ledger() -> None:
    """Events of a batch of one job: planned, begun, failed, begun again."""
    from quant.batch.forecast import Forecast
    from quant.batch.ledger import Ledger
    from quant.batch.manifest import read_manifest

    (job,) = read_manifest(Path("small.yaml"))
    with Ledger(Path("ledger")) as ledger:
        said = Forecast(method="minmax", scheme="w4a16", memory_bytes=1 << 29, seconds=1.5).to_dict()
        for kind in ("cpu", "gpu"):
            ledger.record("planned", job.slug, digest=f"{job.digest}-{kind}", **said)
        for attempt in range(2):
            claim = ledger.claim(job.slug)
            assert claim is not None
            ledger.record("started", job.slug, claim, attempt=attempt)
            ledger.record("failed", job.slug, claim, message="killed", status=-9)
            ledger.release(claim)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
