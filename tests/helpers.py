"""What several test files share: tiny checkpoints of many families, made on the spot, and plain ways to read
files back."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
TINYLM = ROOT / "examples" / "tinylm-4m"
SHARED = ROOT.parent / "shared"

#: The shape of every tiny model: small, with grouped heads, and with sides that no power of two above 32
#: divides.
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
#: Model type → what it needs beyond the shape.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 16, "head_dim": 16},
    "gemma2": {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32, "num_hidden_layers": 3},
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 16,
        "query_pre_attn_scalar": 32,
        "num_hidden_layers": 3,
        "sliding_window_pattern": 3,
    },
    "phi3": {"pad_token_id": 1},
}
#: Families without a row whose blocks have the usual shape.
GENERIC: dict[str, dict[str, Any]] = {
    "stablelm": {},
    "olmo2": {},
    "granite": {},
    "cohere": {},
    "starcoder2": {},
    "glm": {"head_dim": 16, "pad_token_id": 1},
    "gptj": {"rotary_dim": 16, "num_hidden_layers": 5},  # its blocks return tuples
}
#: A DeepSeek-V3 of the shape above without experts.
LATENT: dict[str, Any] = {
    "first_k_dense_replace": 2,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "num_key_value_heads": 4,
}


#: What every start of the programs takes: the libraries that parse and draw. Other times are judged by it, on
#: the same machine, so that a slow one fails no test.
REFERENCE = [sys.executable, "-c", "import click, rich.console, rich.table"]


def cpu_seconds(command: Sequence[str], runs: int = 5) -> float:
    """CPU seconds of a program: the least of several runs, since other work only adds. Byte code is kept, as
    it is where a package is installed."""
    times = []
    for _ in range(runs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def left_alive(processes: Iterable[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Those that still run after so many seconds; one that ended and waits for an absent parent to collect it
    does not run."""

    def runs(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return [p for p in psutil.wait_procs(list(processes), timeout=timeout)[1] if runs(p)]


def tiny_config(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    values = {**SHAPE, **FAMILIES.get(kind, GENERIC.get(kind, {})), **changes}
    return AutoConfig.for_model(kind, **values)


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Values at which every parameter matters: norms near one (or near zero where one is added), biases away
    from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(parameter.float() + 0.2 * noise)
            else:
                parameter.copy_(noise * (0.05 if "embed" in name else parameter.shape[-1] ** -0.5))


def add_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINYLM / name, folder / name)


def save_model(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    add_tokenizer(folder)
    return folder


def make_checkpoint(
    folder: Path,
    kind: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    tie: bool = False,
    seed: int = 0,
    shard: str = "5GB",
    **changes: Any,
) -> Path:
    """A checkpoint of random weights that transformers itself wrote."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        tiny_config(kind, tie_word_embeddings=tie, **changes), dtype=dtype
    )
    randomize(model, seed)
    return save_model(model, folder, max_shard_size=shard)


def copy_model(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, read by the official safetensors package."""
    from safetensors.torch import load_file

    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def save_all(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def raw_safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@functools.cache
def short_text() -> Path:
    """The beginning of the bundled text: enough for small jobs, and tokenized at once."""
    import atexit
    import gzip
    import tempfile

    folder = tempfile.mkdtemp(prefix="quant-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with gzip.open(
        ROOT / "quant" / "calibration" / "data" / "wikipedia.txt.gz", "rt", encoding="utf-8"
    ) as stream:
        (Path(folder) / "short.txt").write_text(stream.read(60_000))
    return Path(folder) / "short.txt"


def recipe(model: Path, output: Path, **options: Any) -> Any:
    import quant

    values: dict[str, Any] = {"model_path": model, "output_path": output, "method": "minmax"}
    if options.get("method") in ("gptq", "yaqa"):
        values |= {"samples": 8, "sequence_length": 64, "calibration_dataset": [short_text()]}
    return quant.make_recipe(values | options)


def quantize(model: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Runs a whole job in this process; returns its report as JSON has it."""
    import quant

    report: dict[str, Any] = quant.quantize(recipe(model, output, **options)).to_dict()
    return report


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a directory by its relative path."""
    return {
        f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()
    }


def weight_files(folder: Path) -> dict[str, bytes]:
    return {
        n: b
        for n, b in files_of(folder).items()
        if n.endswith((".safetensors", ".index.json")) or n == "config.json"
    }
