"""The batch around the jobs: order, room, retries, gates, others at work, and what is noticed later. The jobs
are stand-ins (``stand_in.py``); those of ``test_kills.py`` are real."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from quant.batch import attempt, outputs
from quant.batch.forecast import Forecast
from quant.batch.ledger import Ledger
from quant.batch.local import Device, Slots, devices_of
from quant.batch.manifest import read_manifest
from quant.batch.session import Batch, run_manifest
from quant.hardware import named_gpu
from quant.units import GIB
from tests.helpers import ROOT


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Batch]:
    """Runs a batch of stand-ins, each job with a model of its own name; ``does`` says what each of them does,
    ``manifest`` holds keys of the jobs. The same jobs again, where none are given."""
    program = str(Path(__file__).with_name("stand_in.py"))
    monkeypatch.setattr(attempt, "command", lambda *words: [sys.executable, "-S", program, *words])
    monkeypatch.setattr("quant.batch.forecast.command", attempt.command)
    monkeypatch.setattr(yaml, "safe_dump", lambda value, **options: json.dumps(value))
    monkeypatch.setattr("quant.batch.session.write_batch_page", lambda states, folder: None)
    monkeypatch.setattr("quant.batch.run._OTHERS", 0.2)

    def call(does: dict[str, Any] | None = None, manifest: Any = (), **options: Any) -> Batch:
        file = tmp_path / "m.yaml"
        if does is not None:
            jobs = []
            for name, one in does.items():
                (tmp_path / "models" / name).mkdir(parents=True, exist_ok=True)
                if not (tmp_path / "models" / name / "config.json").exists():  # a new one is a new source
                    (tmp_path / "models" / name / "config.json").write_text("{}")
                (tmp_path / "models" / name / "does.json").write_text(json.dumps(one))
                own = dict(manifest).get(name, {})
                jobs.append({"model": f"models/{name}", "output": f"out/{name}", "name": name, **own})
            shared = {"overrides": {"method": "minmax"}, "retry_delay": 0.0, **dict(manifest).get("*", {})}
            file.write_text(json.dumps({"defaults": shared, "jobs": jobs}))
            (tmp_path / "out").mkdir(exist_ok=True)
        return run_manifest(file, **{"jobs": 2, **options})

    return call


def happened(tmp_path: Path, what: str = "begin") -> list[str]:
    file = tmp_path / "out/happened"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.split()[1] for line in lines if line.startswith(what)]


def statuses(batch: Batch) -> dict[str, str]:
    return {s.job.name: s.status for s in batch.states}


def test_one_failure_does_not_stop_the_rest_and_says_its_last_line_and_log(
    run: Callable[..., Batch], tmp_path: Path
) -> None:
    done = run({"bad": {"fails": [1, 1]}, "good": {}, "never": {"refused": "cannot be"}})
    assert statuses(done) == {"bad": "failed", "good": "done", "never": "failed"}
    bad, _, never = done.states
    assert bad.message == "what it says last" and bad.attempts == 1  # not retryable
    assert bad.log is not None and bad.log.read_text().endswith("what it says last\n")
    assert never.message == "cannot be" and never.attempts == 0
    assert done.to_dict()["failures"][0] == {"name": "bad", "message": bad.message, "log": str(bad.log)}


def test_what_may_pass_is_tried_again_and_the_rest_is_not(run: Callable[..., Batch], tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    done = run(
        {
            "killed": {"fails": [-9, -15]},
            "again": {"fails": [75]},
            "hopeless": {"fails": [-9, -9, -9, -9]},
            "wrong": {"fails": [2]},
        },
        told=lambda kind, state: told.append((kind, state.job.name)),
    )
    assert statuses(done) == {"killed": "done", "again": "done", "hopeless": "failed", "wrong": "failed"}
    assert {s.job.name: s.attempts for s in done.states} == {
        "killed": 3, "again": 2, "hopeless": 3, "wrong": 1
    }  # fmt: skip
    assert told.count(("retry", "killed")) == 2 and ("retry", "wrong") not in told
    assert done.states[2].message.startswith("ended by SIGKILL: the system kills so where memory is short")
    again = run()  # another run of the same command tries what failed once more
    assert statuses(again)["hopeless"] == "done" and statuses(again)["wrong"] == "done"
    assert happened(tmp_path).count("killed") == 3


def test_a_retry_waits_longer_each_time_but_status_75_goes_on_at_once(
    run: Callable[..., Batch], tmp_path: Path
) -> None:
    waits: list[tuple[str, float]] = []

    def told(kind: str, state: Any) -> None:
        if kind == "retry":
            waits.append((state.job.name, state.not_before - time.monotonic()))

    run(
        {"killed": {"fails": [-9, -9]}, "again": {"fails": [75, 75]}},
        {"killed": {"retry_delay": 0.4}, "again": {"retry_delay": 100}},
        told=told,
    )
    first, second = (w for n, w in waits if n == "killed")
    assert 0.0 < first <= 0.4 < second <= 0.8
    assert all(w <= 0 for n, w in waits if n == "again") and len(waits) == 4


def test_the_higher_priority_starts_first(run: Callable[..., Batch], tmp_path: Path) -> None:
    run({n: {} for n in "abcd"}, {"c": {"priority": 2}, "d": {"priority": 1}}, jobs=1)
    assert happened(tmp_path) == ["c", "d", "a", "b"]


def test_memory_is_never_promised_twice(run: Callable[..., Batch], tmp_path: Path) -> None:
    does = {n: {"memory": 4 * GIB, "sleeps": 1.0} for n in ("a", "b", "c")} | {"huge": {"memory": 20 * GIB}}
    done = run(does, jobs=4, max_memory=9 * GIB)
    assert statuses(done) == {"a": "done", "b": "done", "c": "done", "huge": "failed"}
    assert "needs about 20.0 GiB of memory, jobs may take 9.00 GiB" in done.states[3].message
    running, most = 0, 0
    for line in (tmp_path / "out/happened").read_text().splitlines():
        running += {"begin": 1, "end": -1}[line.split()[0]]
        most = max(most, running)
    assert most == 2


def job_of(tmp_path: Path, **overrides: Any) -> Any:
    (tmp_path / "config.json").write_text("{}")
    value = {"jobs": [{"model": ".", "output": "../o", "overrides": {"method": "gptq", **overrides}}]}
    (tmp_path / "x.yaml").write_text(json.dumps(value))
    return read_manifest(tmp_path / "x.yaml")[0]


def test_slots_keep_their_budgets_whatever_comes_and_goes(tmp_path: Path) -> None:
    rng = random.Random(0)
    any_gpu, second, cpu = (job_of(tmp_path, **d) for d in ({}, {"device": "cuda:1"}, {"device": "cpu"}))
    slots = Slots(100, [Device("0", 50), Device("1", 40)], most=5)
    held: list[tuple[Any, Any]] = []
    refused = 0
    for _ in range(3000):
        job = rng.choice([any_gpu, second, cpu])
        known = rng.random() > 0.1
        forecast = Forecast(memory_bytes=rng.randint(0, 60), gpu_bytes=rng.randint(0, 50), known=known)
        if rng.random() < 0.6 and not slots.never(job, forecast):
            slot = slots.take(job, forecast, rng.choice([1.0, 1.5]))
            refused += slot is None
            held += [] if slot is None else [(job, slot)]
        elif held:
            slots.give(held.pop(rng.randrange(len(held)))[1])
        assert slots.taken == sum(s.memory for _, s in held) <= 100 and len(held) <= 5
        for device in slots.devices:
            mine = [s for _, s in held if s.device is device]
            assert device.taken == sum(s.gpu for s in mine) <= device.budget and device.jobs == len(mine)
        assert all(s.device is slots.devices[1] for j, s in held if j is second)
        assert all(s.device is None for j, s in held if j is cpu)
        assert len(held) == 1 or not any(s.alone for _, s in held)
    assert refused > 100


def test_jobs_are_spread_over_gpus_and_what_fits_none_is_said(tmp_path: Path) -> None:
    gpus = [named_gpu("L4"), named_gpu("L4")]
    slots = Slots(100 * GIB, devices_of(gpus, 10 * GIB), most=9)
    job, forecast = job_of(tmp_path), Forecast(gpu_bytes=4 * GIB)
    taken = [slots.take(job, forecast) for _ in range(5)]
    assert [t and slots.devices.index(t.device) for t in taken if t] == [0, 1, 0, 1] and taken[4] is None
    assert "needs about 12.0 GiB of GPU memory, jobs may take 10.0 GiB" in slots.never(
        job, Forecast(gpu_bytes=12 * GIB)
    )


def test_a_job_whose_dry_run_was_killed_runs_alone(run: Callable[..., Batch], tmp_path: Path) -> None:
    done = run({"a": {"fails": ["dry run"]}, "b": {"sleeps": 0.1}, "c": {}}, jobs=3)
    assert set(statuses(done).values()) == {"done"} and not done.states[0].forecast.known
    lines = (tmp_path / "out/happened").read_text().splitlines()
    assert lines[lines.index("begin a") + 1] == "end a"


def test_the_same_command_again_runs_nothing_that_is_done(run: Callable[..., Batch], tmp_path: Path) -> None:
    first = run({"a": {}, "b": {}})
    assert statuses(first) == {"a": "done", "b": "done"} and not any(s.before for s in first.states)
    again = run()
    assert statuses(again) == {"a": "done", "b": "done"} and all(s.before for s in again.states)
    assert sorted(happened(tmp_path)) == ["a", "b"]


def test_an_output_that_the_ledger_does_not_know_is_the_job_s_if_it_is_what_it_would_make(
    run: Callable[..., Batch], tmp_path: Path
) -> None:
    from quant.recipe import make_recipe

    made = make_recipe({"model_path": "m", "output_path": "o", "method": "minmax", "seed": 3}).settings()
    settings = json.loads(json.dumps(made))
    own = {n: {"overrides": {"method": "minmax", "seed": 3}} for n in ("a", "b")}
    does = {"a": {"settings": settings}, "b": {"settings": {**settings, "seed": 4}}}
    run(does, own)
    for file in (tmp_path / "m.batch/events").iterdir():
        file.unlink()
    gate = {"evaluate": {"max_kl": 1, "chunks": 2}}
    again = run({n: {**d, "kl": 0.5} for n, d in does.items()}, {n: {**o, **gate} for n, o in own.items()})
    assert statuses(again) == {"a": "done", "b": "failed"} and happened(tmp_path, "evaluate") != []
    assert "was made with other settings (seed was 4, is 3)" in again.states[1].message
    assert sorted(happened(tmp_path)) == ["a", "b"]


def test_a_changed_job_a_changed_source_and_a_damaged_output_are_noticed(
    run: Callable[..., Batch], tmp_path: Path
) -> None:
    names = ("job", "source", "output", "foreign", "gone")
    does: dict[str, Any] = {n: {} for n in names}
    run({n: {} for n in names if n != "foreign"})
    (tmp_path / "models/source/model.safetensors").write_bytes(b"2")
    (tmp_path / "out/output/model.safetensors").write_bytes(b"1" * 9)
    (tmp_path / "out/foreign").mkdir()
    (tmp_path / "out/foreign/thesis.txt").write_text("x")
    (tmp_path / "out/gone").rename(tmp_path / "elsewhere")
    done = run(does, {"job": {"overrides": {"seed": 7}}})
    assert statuses(done) == {n: "done" if n == "gone" else "failed" for n in names}
    said = {s.job.name: s.message for s in done.states}
    assert "was made with other settings (seed was None, is 7): move it away" in said["job"]
    assert "its source" in said["source"] and "has changed since it was made" in said["source"]
    assert "model.safetensors was 10 B, is 9 B" in said["output"]
    assert "was not made by quant" in said["foreign"]
    assert (tmp_path / "out/foreign/thesis.txt").exists()
    assert happened(tmp_path).count("gone") == 2


def test_a_gate_fails_a_job_and_a_wider_one_passes_it_without_measuring_again(
    run: Callable[..., Batch], tmp_path: Path
) -> None:
    does = {"a": {"kl": 0.5}, "b": {"kl": 0.01}}
    gate = {"*": {"evaluate": {"max_kl": 0.1, "chunks": 2}}}
    done = run(does, gate)
    assert statuses(done) == {"a": "failed", "b": "done"}
    assert done.states[0].message == "evaluate: KL divergence is 0.50000 nats, the gate allows 0.1"
    assert done.states[0].attempts == 1 and (tmp_path / "out/a/config.json").exists()
    assert done.states[1].to_dict()["kl"] == 0.01
    wider = run(does, {"*": {"evaluate": {"max_kl": 0.6, "chunks": 2}}})
    assert statuses(wider) == {"a": "done", "b": "done"}
    assert len(happened(tmp_path, "evaluate")) == 2 and len(happened(tmp_path)) == 2
    other = run(does, {"*": {"evaluate": {"max_kl": 0.6, "chunks": 3}}})
    assert statuses(other) == {"a": "done", "b": "done"}
    assert len(happened(tmp_path, "evaluate")) == 4  # other chunks are another measurement


def test_an_output_that_does_not_verify_fails_by_the_check(run: Callable[..., Batch], tmp_path: Path) -> None:
    done = run({"a": {}, "b": {}}, {"a": {"verify": {"tensor_parallel": 7}}, "b": {"verify": {}}})
    assert statuses(done) == {"a": "failed", "b": "done"}
    assert done.states[0].message == "verify: degree: not over 7"
    assert set(statuses(run({"a": {}, "b": {}}, {"a": {"verify": {}}})).values()) == {"done"}
    assert sorted(happened(tmp_path)) == ["a", "b"]


def test_perplexity_is_judged_too() -> None:
    from quant.batch.manifest import EvaluateGate

    one = {"kl": {"mean": 0.1}, "perplexity": {"mean": 11.0}, "source_perplexity": {"mean": 10.0}}
    assert outputs.judged(EvaluateGate(max_perplexity_increase=0.11), one) == ""
    assert "rises by 10.00%" in outputs.judged(EvaluateGate(max_perplexity_increase=0.09), one)
    nan = {**one, "kl": {"mean": float("nan")}}
    assert "nan" in outputs.judged(EvaluateGate(max_kl=1), nan)


def test_two_batches_on_one_ledger_share_the_jobs(run: Callable[..., Batch], tmp_path: Path) -> None:
    does = {n: {"sleeps": 0.2} for n in "abcdef"}
    run(does, only=["a"])
    found: list[Batch] = []
    threads = [threading.Thread(target=lambda: found.append(run(jobs=1))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [set(statuses(b).values()) for b in found] == [{"done"}] * 3
    assert sorted(happened(tmp_path)) == [*"abcdef"]


def test_a_failure_of_another_batch_is_this_one_s_too(run: Callable[..., Batch], tmp_path: Path) -> None:
    does = {"a": {"sleeps": 2.5, "fails": [1, 1, 1]}, "b": {}}
    found: list[Batch] = []
    threads = [threading.Thread(target=lambda d=d: found.append(run(d, jobs=1))) for d in (does, None)]
    threads[0].start()
    while not happened(tmp_path):
        time.sleep(0.02)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert [statuses(b)["a"] for b in found] == ["failed"] * 2
    assert [b.states[0].message for b in found] == ["what it says last"] * 2
    assert happened(tmp_path).count("a") == 1


def test_a_batch_that_is_asked_to_end_asks_its_jobs_and_goes_on_later(
    run: Callable[..., Batch], tmp_path: Path
) -> None:
    stop = threading.Event()

    def ask() -> None:
        while not happened(tmp_path):
            time.sleep(0.02)
        stop.set()

    threading.Thread(target=ask).start()
    done = run({"a": {"sleeps": 60.0}, "b": {}}, jobs=1, stop=stop)
    assert statuses(done) == {"a": "interrupted", "b": "interrupted"}
    assert happened(tmp_path, "asked") == ["a"]
    with Ledger(done.ledger) as ledger:
        ledger.refresh()
        assert (ledger.latest(done.states[0].job.slug) or {})["event"] == "interrupted"
        assert ledger.holder(done.states[0].job.slug) is None
    (tmp_path / "models/a/does.json").write_text("{}")
    assert statuses(run()) == {"a": "done", "b": "done"}


#: A batch of stand-ins in a process of its own.
BATCH = """
import json, sys, yaml
from pathlib import Path
from quant.batch import attempt, forecast, session
attempt.command = forecast.command = lambda *words: [sys.executable, "-S", sys.argv[1], *words]
yaml.safe_dump = lambda value, **options: json.dumps(value)
session.write_batch_page = lambda states, folder: None
done = session.run_manifest(Path(sys.argv[2]), jobs=2)
print(json.dumps({s.job.name: s.status for s in done.states}))
"""


def test_a_batch_that_is_killed_again_and_again_does_every_job_once(
    run: Callable[..., Batch], tmp_path: Path
) -> None:
    from quant.recipe import make_recipe

    made = make_recipe({"model_path": "m", "output_path": "o", "method": "minmax"}).settings()
    one = {"settings": json.loads(json.dumps(made)), "sleeps": 0.5}
    run({n: one for n in "abcdefg"}, dry_run=True)
    program = str(Path(__file__).with_name("stand_in.py"))
    words = [sys.executable, "-c", BATCH, program, str(tmp_path / "m.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    rng, kills = random.Random(0), 0
    for ended in (1, 3, 5):
        batch = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=environment, cwd=tmp_path)
        while batch.poll() is None and len(happened(tmp_path, "end")) < ended:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.6))
        kills += batch.poll() is None
        batch.kill()
        batch.wait()
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert kills >= 2 and set(json.loads(done.stdout).values()) == {"done"}, done.stderr
    assert sorted(happened(tmp_path, "end")) == [*"abcdefg"]


def test_a_job_that_does_not_end_when_asked_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    start = time.monotonic()
    ended = attempt.run(
        [sys.executable, "-S", "-c", code], tmp_path, tmp_path / "log", {},
        lambda: time.monotonic() - start > 1.0, grace=0.3,
    )  # fmt: skip
    assert ended.status is None and time.monotonic() - start < 30


def test_a_job_waits_for_a_run_that_is_still_at_work_on_its_output(
    run: Callable[..., Batch], tmp_path: Path
) -> None:
    (tmp_path / "out/a.work").mkdir(parents=True)
    lock = os.open(tmp_path / "out/a.work/lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    begun: list[list[str]] = []

    def let_go() -> None:
        begun.append(happened(tmp_path))
        os.close(lock)

    done = run(
        {"a": {}}, {"a": {"retries": 0}},
        told=lambda kind, state: threading.Timer(0.6, let_go).start() if kind == "started" else None,
    )  # fmt: skip
    assert statuses(done) == {"a": "done"} and begun == [[]]


def test_a_dry_run_leaves_nothing(run: Callable[..., Batch], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    done = run({"a": {"memory": 3 * GIB}, "b": {"refused": "cannot be"}}, dry_run=True, max_memory=4 * GIB)
    assert statuses(done) == {"a": "waiting", "b": "failed"}
    assert done.states[0].forecast.memory_bytes == 3 * GIB and done.states[1].message == "cannot be"
    assert {p.name for p in tmp_path.iterdir()} - {p.name for p in before} == {"models", "m.yaml", "out"}
    assert happened(tmp_path) == []


def test_the_command_prints_lines_for_programs_and_its_status_says_how_it_went(
    run: Callable[..., Batch], cli: Callable[..., Any], tmp_path: Path
) -> None:
    run({"good": {}, "bad": {"fails": [1, 1, 1]}}, dry_run=True)
    found = cli("batch", tmp_path / "m.yaml", "--json", "--jobs", "1")
    assert found.code == 1 and "1 of 2 jobs failed" in found.err
    lines = [json.loads(line) for line in found.out.splitlines()]
    assert [x["event"] for x in lines if x.get("name") == "good"] == ["planned", "started", "finished"]
    assert lines[-1]["event"] == "summary" and (lines[-1]["done"], lines[-1]["failed"]) == (1, 1)
    assert cli("batch", tmp_path / "m.yaml", "--job", "good").code == 0
    text = cli("batch", tmp_path / "m.yaml", "-q")  # the second of its failures
    assert text.code == 1 and "✗ bad: what it says last; its log: " in text.out and "done before" in text.out
    assert cli("batch", tmp_path / "m.yaml", "-q").code == 1
    assert cli("batch", tmp_path / "m.yaml", "-q").code == 0
    unknown = cli("batch", tmp_path / "m.yaml", "--job", "god")
    assert unknown.code == 2 and "did you mean 'good'" in unknown.err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_ends_the_command_with_its_work_kept(
    number: int, status: int, run: Callable[..., Batch], cli: Callable[..., Any], tmp_path: Path
) -> None:
    run({"a": {"sleeps": 30.0}}, dry_run=True)

    def send() -> None:
        while not happened(tmp_path):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    found = cli("batch", tmp_path / "m.yaml", "--json")
    assert found.code == status
    assert json.loads(found.out.splitlines()[-1])["interrupted"] == 1
    assert happened(tmp_path, "asked") == ["a"]
