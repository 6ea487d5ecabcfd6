"""llama.cpp's own server, as the package xllamacpp has it, with llama-server's names of what it is told. Run
by the Python of an environment with that package, which need not have quant:

    python llama_worker.py --model FILE [--alias NAME] [--ctx-size N] [--parallel N] [--metrics] [--offline]
        --host HOST --port PORT

The API key stands in ``LLAMA_API_KEY``. SIGTERM ends it. Names of the fields: xllamacpp's ``CommonParams``,
which are those of llama.cpp's ``common/common.h``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from typing import Any


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser()
    for name in ("model", "alias", "host"):
        parser.add_argument(f"--{name}")
    for name in ("ctx-size", "parallel", "port"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("metrics", "offline"):
        parser.add_argument(f"--{name}", action="store_true")
    told = parser.parse_args(words)

    import xllamacpp

    asked: Any = xllamacpp.CommonParams()
    asked.model.path = told.model
    asked.hostnames, asked.port = [told.host], told.port
    asked.endpoint_metrics, asked.offline = told.metrics, told.offline
    if told.alias:
        asked.model_alias = {told.alias}
    if told.ctx_size is not None:
        asked.n_ctx = told.ctx_size
    if told.parallel is not None:
        asked.n_parallel = told.parallel
    if key := os.environ.get("LLAMA_API_KEY"):
        asked.api_keys = [key]
    try:
        server = xllamacpp.Server(asked)  # until here SIGTERM ends the process at once
    except Exception as error:
        print(f"error: llama.cpp did not start: {error}", file=sys.stderr, flush=True)
        return 1
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    while not ended.wait(0.2):
        pass
    del server
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
