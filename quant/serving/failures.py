"""What vLLM's log says about a failed start, as cause and next step. A table: one row for each failure that
people meet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

#: Last lines of a log that an error shows.
_QUOTED = 12


@dataclass(frozen=True)
class Cause:
    """``kind`` names the failure for programs; ``text`` is cause and next step.

    Attributes:
        checkpoint: the checkpoint is at fault (or its pairing with this build of vLLM), not the machine or
            the request.
    """

    kind: str
    text: str
    checkpoint: bool = False


@dataclass(frozen=True)
class _Row:
    pattern: str
    kind: str
    text: str
    checkpoint: bool = False


# {1}, {2} stand for the pattern's groups. The first row that matches anywhere in the log wins, so the
# specific ones come first.
_ROWS = (
    _Row(
        r"No module named '?vllm",
        "no vLLM",
        "vLLM is not installed there: pip install vllm, or name another Python with --vllm-python",
    ),
    _Row(
        r"\[Errno (?:98|48)\]|[Aa]ddress already in use",
        "port in use",
        "another program listens on the port: choose another --port, or 0 for a free one",
    ),
    _Row(
        r"Cannot assign requested address",
        "no such address",
        "this machine has no such address: choose another --host",
    ),
    _Row(
        r"which is larger than the available KV cache memory \(([\d.]+) GiB\)\. .*?estimated maximum model "
        r"length is (\d+)",
        "no memory for the KV cache",
        "one request of the longest context does not fit in the {1} GiB left for the KV cache: "
        "--max-model-len {2} does",
    ),
    _Row(
        r"which is larger than the available KV cache memory",
        "no memory for the KV cache",
        "one request of the longest context does not fit in what is left for the KV cache: lower "
        "--max-model-len or raise --gpu-memory-utilization",
    ),
    _Row(
        r"No available memory for the cache blocks",
        "no memory for the KV cache",
        "the weights leave no room for the KV cache: raise --gpu-memory-utilization, use more GPUs with "
        "--tensor-parallel, or quantize to fewer bits",
    ),
    _Row(
        r"(?:on kv cache allocation|on startup) is less than (?:requested memory for kv|desired CPU memory)",
        "no memory for the KV cache",
        "the machine's free memory is less than vLLM would reserve: set VLLM_CPU_KVCACHE_SPACE (whole GiB) "
        "lower, or stop other programs",
    ),
    _Row(
        r"Free memory on device .{0,200}?less than desired GPU memory utilization",
        "GPU memory in use",
        "other programs hold GPU memory: stop them, or lower --gpu-memory-utilization",
    ),
    _Row(
        r"OutOfMemoryError|CUDA out of memory|not enough GPU memory",
        "GPU memory exhausted",
        "the model does not fit on the GPU: use more GPUs with --tensor-parallel, a lower --max-model-len, "
        "or fewer bits",
    ),
    _Row(
        r"Failed to find a kernel that can implement",
        "no kernel for the scheme",
        "this build of vLLM has no kernel for the checkpoint's scheme on this hardware (8-bit weight-only "
        "has none on CPUs): serve it on a GPU, "
        "or quantize with --scheme w4a16",
        True,
    ),
    _Row(
        r"_C::static_scaled_fp8_quant\(\) expected at most 0 argument",
        "no kernel for the scheme",
        "vLLM's CPU build has no kernel for FP8 with one scale a tensor: serve it on a GPU, or quantize "
        "with --scheme w8a8-fp8",
        True,
    ),
    _Row(
        r"Unknown quantization method:? ?'?([\w-]*)|quantization method '?([\w-]+)'? is not supported|"
        r"([\w-]+) quantization is currently not supported",
        "unsupported quantization",
        "this vLLM does not load that quantization: export the checkpoint with quant export-vllm --format "
        "compressed-tensors, or use a newer vLLM",
        True,
    ),
    _Row(
        r"is not supported for the current GPU\. Minimum\s+capability: (\d+)",
        "GPU too old for the quantization",
        "the GPU's compute capability is below {1}, which this quantization needs: serve it on a newer GPU, "
        "or choose another scheme",
        True,
    ),
    _Row(
        r"Following weights were not initialized from checkpoint: \{?([^}]{0,200})",
        "weights missing",
        "the checkpoint lacks weights of the model ({1}): make it again; quant verify lists what is missing",
        True,
    ),
    _Row(
        r"There is no module or parameter named '?([\w.]+)",
        "unexpected tensor",
        "the checkpoint has a tensor {1} that vLLM's model does not: quant verify lists what does not "
        "belong there",
        True,
    ),
    _Row(
        r"User-specified max_model_len \((\d+)\) is greater than the derived max_model_len \([^\d]*(\d+)",
        "context too long",
        "--max-model-len is {1}, the model's longest context is {2}: lower it",
    ),
    _Row(
        r"World size \((\d+)\) is larger than the number of available GPUs \((\d+)\)",
        "too few GPUs",
        "--tensor-parallel asks for {1} GPUs, {2} are there: lower it",
    ),
    _Row(
        r"\((\d+)\) must be divisible by tensor parallel size \((\d+)\)",
        "tensor parallel size",
        "{1} attention heads do not divide over --tensor-parallel {2}: choose a divisor",
    ),
    _Row(
        r"Model architectures? \[?'?([\w, ']+)'?\]? (?:are|is) not supported|does not recognize this "
        r"architecture",
        "unknown architecture",
        "this vLLM does not know the model's architecture: use a newer vLLM",
        True,
    ),
    _Row(
        r"error: unrecognized arguments: (.+)",
        "unknown argument",
        "vLLM does not know {1}: check the arguments after --",
    ),
    _Row(r"error: argument (.+)", "bad argument", "vLLM refuses argument {1}"),
    _Row(
        r"Illegal instruction",
        "CPU too old",
        "this build of vLLM needs a CPU with AVX2 or AVX512: use another build or machine",
    ),
)


def diagnose(log: Sequence[str]) -> Cause | None:
    """The cause of a failed start, where the log names one that is known.

    >>> diagnose(["ValueError: No available memory for the cache blocks. Try …"]).kind
    'no memory for the KV cache'
    """
    text = "\n".join(_bare(line) for line in log)
    for row in _ROWS:
        if match := re.search(row.pattern, text):
            return Cause(row.kind, _filled(row.text, match), row.checkpoint)
    return None


def quote(log: Sequence[str]) -> str:
    """The last lines of a log as they belong into an error: the last exception if there is one, then the
    end."""
    lines = [line for line in log if line.strip() and "leaked" not in line]
    raised = [
        line for line in lines if re.match(r"(?:[A-Za-z_]+\.)*[A-Za-z_]*(?:Error|Exception)\b", _bare(line))
    ]
    end = lines[-_QUOTED:]
    # the exception of the engine's process comes long before the server's own "engine core initialization
    # failed"
    chosen = [line for line in raised[:1] if line not in end] + end
    return "\n".join(f"  | {line[:300]}" for line in chosen)


def _filled(text: str, match: re.Match[str]) -> str:
    return re.sub(r"\{(\d)\}", lambda m: (match[int(m[1])] or "").strip(), text)


def _bare(line: str) -> str:
    """A log line without vLLM's prefixes: process, level, time and place."""
    line = re.sub(r"^\([\w-]+ pid=\d+\) ", "", line)
    return re.sub(r"^(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \S+ \S+ \[[^\]]*\] ?", "", line)
