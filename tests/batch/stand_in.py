"""Stands in for ``quant quantize``, ``verify`` and ``evaluate`` where the batch around them is tested: does
what ``does.json`` in the job's model says, in milliseconds.

``fails``: statuses of the first runs (negative: the signal that it sends itself); ``sleeps``: seconds of a
run; ``kl``: what evaluating measures; ``memory``: what a dry run predicts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    words = sys.argv[1:]
    if words[0] == "verify":
        degree = int(words[words.index("--tensor-parallel") + 1])
        checks = [{"name": "files", "passed": True, "detail": "all"}]
        checks.append({"name": "degree", "passed": degree == 1, "detail": f"not over {degree}"})
        print(json.dumps({"passed": degree == 1, "checks": checks}))
        return 0 if degree == 1 else 4
    if words[0] == "evaluate":
        does = json.loads((Path(words[words.index("--against") + 1]) / "does.json").read_text())
        one = {"mean": does["kl"], "standard_error": 0.0}
        value = {"text": "t", "tokens": 8, "chunks": 2, "kl": one, "top1": one, "perplexity": one}
        value |= {"source_perplexity": one}
        (Path(words[1]) / "quant_evaluation.json").write_text(json.dumps(value))
        _note(Path(words[1]).parent, "evaluate", words[1])
        print(json.dumps(value))
        return 0
    recipe = json.loads(Path(words[words.index("--config") + 1]).read_text().partition("\n")[2])
    model, output = Path(recipe["model_path"]), Path(recipe["output_path"])
    does = json.loads((model / "does.json").read_text())
    if "--dry-run" in words:
        if output.exists():
            print(json.dumps({"error": "is not empty", "exit_code": 1}))
            return 1
        if does.get("fails") == ["dry run"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if "refused" in does:
            print(json.dumps({"error": does["refused"], "exit_code": 1}))
            return 1
        value = {"scheme": {"name": "s"}, "method": "minmax", "peak_rss_bytes": does.get("memory", 1)}
        print(json.dumps(value))
        return 0

    def asked(number: int, frame: object) -> None:
        _note(output.parent, "asked", output.name)
        print(json.dumps({"error": "asked to end", "exit_code": 75, "retryable": True}))
        sys.stdout.flush()
        os._exit(75)

    signal.signal(signal.SIGTERM, asked)
    _note(output.parent, "begin", output.name)
    time.sleep(does.get("sleeps", 0.0))
    runs = output.with_name(output.name + ".runs")
    count = int(runs.read_text()) if runs.exists() else 0
    runs.write_text(str(count + 1))
    fails = [f for f in does.get("fails", []) if f != "dry run"]
    if count < len(fails):
        print("what it says last", file=sys.stderr)
        if fails[count] < 0:
            os.kill(os.getpid(), -fails[count])
        return int(fails[count])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from here on it is all or nothing, as a rename is
    output.mkdir()
    (output / "config.json").write_text("{}")
    (output / "model.safetensors").write_bytes(b"1" * 10)
    report = {"source_path": str(model), "output_hash": f"hash of {output.name}", "layers": []}
    report |= {"settings": does.get("settings", {}), "output_bytes": 10, "method": "minmax"}
    (output / "quant_report.json").write_text(json.dumps(report))
    _note(output.parent, "end", output.name)
    print(json.dumps(report))
    return 0


def _note(folder: Path, what: str, name: str) -> None:
    with (folder / "happened").open("a") as stream:
        stream.write(f"{what} {name}\n")


if __name__ == "__main__":
    sys.exit(main())
