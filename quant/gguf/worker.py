"""Quantizes a GGUF file by llama.cpp's own library. Run by the Python of an environment that has
llama-cpp-py-sync, which need not have quant:

    python worker.py SOURCE TARGET FILE_TYPE THREADS [IMPORTANCE.npz]

``IMPORTANCE.npz`` holds, by tensor, fp32 of one number for each input of each matrix: E[x²]. llama.cpp's
messages go to stdout as they come; what went wrong to stderr.
"""

from __future__ import annotations

import sys
from typing import Any


def main(source: str, target: str, file_type: int, threads: int, importance: str = "") -> int:
    import numpy as np
    from llama_cpp_py_sync._cffi_bindings import ffi, get_lib

    lib: Any = get_lib()

    @ffi.callback("void(enum ggml_log_level, const char *, void *)")
    def log(level: int, text: Any, _: Any) -> None:
        sys.stdout.write(ffi.string(text).decode(errors="replace"))
        sys.stdout.flush()

    lib.llama_log_set(log, ffi.NULL)
    lib.llama_backend_init()
    asked = lib.llama_model_quantize_default_params()
    asked.ftype, asked.nthread = file_type, threads
    kept: list[Any] = []  # what C reads must stay alive
    if importance:
        given = np.load(importance)
        rows = ffi.new("struct llama_model_imatrix_data[]", len(given.files) + 1)
        for row, name in zip(rows, given.files, strict=False):
            values = np.ascontiguousarray(given[name], np.float32)
            kept += [values, ffi.new("char[]", name.encode())]
            row.name, row.data, row.size = kept[-1], ffi.cast("float *", values.ctypes.data), values.size
        rows[len(given.files)].name = ffi.NULL
        asked.imatrix = rows
    asked_by_pointer = ffi.new("llama_model_quantize_params *", asked)
    return int(lib.llama_model_quantize(source.encode(), target.encode(), asked_by_pointer))


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:]) else 0)
