"""Real jobs on a Ray cluster of two nodes on this machine, of which a worker is killed. Skipped where Ray is
not installed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from quant.batch.session import run_manifest
from tests.helpers import quantize, short_text, weight_files

ray = pytest.importorskip("ray")

TEXT = str(short_text())
OPTIONS = {"group_size": 32, "samples": 48, "sequence_length": 128, "calibration_dataset": [TEXT]}


@pytest.fixture
def address() -> Iterator[str]:
    """A cluster of two nodes with a core each."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "memory": 4 << 30, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**{k: v for k, v in node.items() if k != "include_dashboard"})
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


def worker_of(name: str) -> psutil.Process | None:
    """The Ray worker whose job writes ``name``."""
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if "quantize" in words and any(f"/{name}-" in w for w in words):
                return process.parent()
        except psutil.Error:
            continue
    return None


@pytest.mark.filterwarnings("ignore")
def test_a_worker_that_is_killed_loses_nothing(
    address: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoints("llama", num_hidden_layers=8)
    methods: dict[str, dict[str, Any]] = {
        "job4": {"bits": 4}, "job8": {"bits": 8}, "jobz": {"bits": 4, "symmetric": False}
    }  # fmt: skip
    jobs = [
        {"model": str(source), "output": name, "overrides": {"method": "gptq", **OPTIONS, **own}}
        for name, own in methods.items()
    ]
    value = {"defaults": {"threads": 1, "retry_delay": 0.0}, "jobs": jobs}
    value["jobs"].append({**jobs[0], "output": "large", "threads": 2})
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(value))
    killed: list[str] = []

    def kill() -> None:
        deadline = time.monotonic() + 300
        while not killed and time.monotonic() < deadline:
            for work in tmp_path.glob("job*.work/journal.jsonl"):
                name = work.parent.name.removesuffix(".work")
                if work.read_text().count("\n") > 2 and (worker := worker_of(name)) is not None:
                    assert "ray::" in worker.name() or "ray" in " ".join(worker.cmdline())
                    worker.kill()
                    killed.append(name)
                    break
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    told: list[tuple[str, str]] = []
    done = run_manifest(
        tmp_path / "m.yaml", executor="ray", address=address,
        told=lambda kind, state: told.append((kind, state.job.name)),
    )  # fmt: skip
    killer.join()
    states = {s.job.name: s for s in done.states}
    assert "needs 2 cores, the largest machine of the Ray cluster has 1" in states.pop("large").message
    assert {s.status for s in states.values()} == {"done"}, [s.message for s in states.values()]
    assert killed and ("retry", killed[0]) in told and states[killed[0]].attempts == 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, own in methods.items():
            quantize(source, tmp_path / f"alone-{name}", method="gptq", **OPTIONS, **own)
            assert weight_files(tmp_path / name) == weight_files(tmp_path / f"alone-{name}")
    finally:
        torch.set_num_threads(threads)
    logs = sorted((tmp_path / "m.batch/jobs").glob(f"{killed[0]}-*/[0-9]*.log"))
    assert "resuming: " in logs[-1].read_text()
    assert os.path.exists(tmp_path / "m.batch/report.html")
