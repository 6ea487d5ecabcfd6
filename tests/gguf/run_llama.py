"""Run in the environment of llama.cpp: reads requests as JSON on stdin, answers as JSON on stdout.

    [{"file": "…", "rows": [[token, …], …], "reference": "….npy", "greedy": 16, "texts": […]}, …]

With ``importance`` (a path) the mean square of what each matrix multiplies over all rows is put there, fp32
by the matrix's name: what `llama-imatrix` gathers by the same hook.

For each: the mean of −log p over the rows' tokens after the first (``loss``), the KL divergence from
log-probabilities fp32 [rows, T - 1, V] (``kl``), the tokens that greedy decoding puts behind the first 16 of
the first row, and the tokens of each text.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
from typing import Any, ClassVar

import numpy as np
from llama_cpp_py_sync._cffi_bindings import ffi, get_lib

lib: Any = get_lib()
_messages: list[str] = []


@ffi.callback("void(enum ggml_log_level, const char *, void *)")
def _log(level: int, text: Any, _: Any) -> None:
    if level >= 3:
        _messages.append(ffi.string(text).decode(errors="replace"))


class Tensor(ctypes.Structure):
    """``struct ggml_tensor`` of ``ggml.h``, as far as its name."""

    _fields_: ClassVar[list[Any]] = [  # type: ignore[misc]
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


class Sums:
    """Sums of squares of the inputs of matrices, by the matrices' names, and rows."""

    def __init__(self) -> None:
        self.of: dict[str, Any] = {}

        @ffi.callback("ggml_backend_sched_eval_callback")
        def look(tensor: Any, ask: bool, _: Any) -> bool:
            node = Tensor.from_address(int(ffi.cast("uintptr_t", tensor)))
            if not (node.src[0] and node.src[1]):
                return False if ask else True
            weight, inputs = Tensor.from_address(node.src[0]), Tensor.from_address(node.src[1])
            name = weight.name.decode()
            product = name.endswith(".weight") and inputs.ne[0] == weight.ne[0] and weight.ne[1] == node.ne[0]
            if ask or not product or weight.ne[1] == 1:
                return product if ask else True
            count = inputs.ne[1] * inputs.ne[2] * inputs.ne[3]
            flat = (ctypes.c_float * (inputs.ne[0] * count)).from_address(inputs.data)
            values = np.frombuffer(flat, np.float32).reshape(count, inputs.ne[0]).astype(np.float64)
            total, rows = self.of.get(name, (0.0, 0))
            self.of[name] = total + (values**2).sum(0), rows + count
            return True

        self.look = look

    def save(self, path: str) -> None:
        np.savez(path, **{n: (total / rows).astype(np.float32) for n, (total, rows) in self.of.items()})


def decode(context: Any, tokens: list[int], first: int) -> np.ndarray:
    """Logits fp32 [T, V] of tokens at positions from ``first``."""
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, first + i, 1, 0
        batch.logits[i] = 1
    if lib.llama_decode(context, batch):
        raise SystemExit("llama_decode failed: " + "".join(_messages))
    width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(lib.llama_get_model(context)))
    logits = np.frombuffer(ffi.buffer(lib.llama_get_logits(context), 4 * len(tokens) * width), np.float32)
    logits = logits.reshape(len(tokens), width).copy()
    lib.llama_batch_free(batch)
    return logits


def tokenize(vocab: Any, text: str) -> list[int]:
    data = text.encode()
    room = ffi.new("llama_token[]", len(data) + 16)
    count = lib.llama_tokenize(vocab, data, len(data), room, len(data) + 16, True, True)
    return [int(room[i]) for i in range(count)]


def answer(request: dict[str, Any]) -> dict[str, Any]:
    settings = lib.llama_model_default_params()
    settings.use_extra_bufts = False
    model = lib.llama_model_load_from_file(request["file"].encode(), settings)
    if model == ffi.NULL:
        return {"error": "".join(_messages)}
    vocab = lib.llama_model_get_vocab(model)
    rows = request.get("rows", [])
    asked = lib.llama_context_default_params()
    longest = max([len(r) for r in rows] + [64]) + request.get("greedy", 0)
    asked.n_ctx = asked.n_batch = asked.n_ubatch = longest
    asked.n_threads = asked.n_threads_batch = 1
    asked.type_k = asked.type_v = 0  # fp32, so that the cache rounds nothing
    sums = Sums() if "importance" in request else None
    if sums is not None:
        asked.cb_eval = sums.look
    context = lib.llama_init_from_model(model, asked)
    losses: list[float] = []
    divergence, count = 0.0, 0
    for row in rows:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        logits = decode(context, row, 0).astype(np.float64)[:-1]
        top = logits.max(1)
        norm = top + np.log(np.exp(logits - top[:, None]).sum(1))
        losses += list(norm - logits[np.arange(len(row) - 1), row[1:]])
        if "reference" in request:
            other = np.load(request["reference"])[count]
            probability = np.exp(other)
            divergence += float((probability * (other - (logits - norm[:, None]))).sum(1).mean())
        count += 1
    if sums is not None:
        sums.save(request["importance"])
    greedy = []
    if rows and request.get("greedy"):
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        start = rows[0][:16]
        logits = decode(context, start, 0)
        for i in range(request["greedy"]):
            greedy.append(int(logits[-1].argmax()))
            logits = decode(context, greedy[-1:], len(start) + i)
    result = {
        "loss": float(np.mean(losses)) if losses else math.nan,
        "kl": divergence / max(1, count),
        "greedy": greedy,
        "tokens": [tokenize(vocab, text) for text in request.get("texts", [])],
    }
    lib.llama_free(context)
    lib.llama_model_free(model)
    return result


def main() -> None:
    lib.llama_log_set(_log, ffi.NULL)
    lib.llama_backend_init()
    answers = []
    for request in json.load(sys.stdin):
        _messages.clear()
        answers.append(answer(request))
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
