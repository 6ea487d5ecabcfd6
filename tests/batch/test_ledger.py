"""The ledger: one holder of a job whatever happens, and events that survive what a crash leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quant.batch.ledger import Ledger, Place
from tests.helpers import ROOT

Open = Callable[..., Ledger]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens the ledger of a test, as often as there are processes; ``host`` names another machine."""
    made: list[Ledger] = []

    def call(host: str = "", beat: float = 0.02, stale: float = 60.0) -> Ledger:
        ledger = Ledger(tmp_path / "l", beat, stale)
        if host:
            ledger.place = Place(host, "boot", "namespace")
        made.append(ledger)
        return ledger

    yield call
    for ledger in made:
        ledger.close()


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


#: Claims as many of a hundred jobs as it can, and prints which.
RACER = """
import sys
from pathlib import Path
from quant.batch.ledger import Ledger
with Ledger(Path(sys.argv[1])) as ledger:
    got = [n for n in range(100) if ledger.claim(f"job-{n}") is not None]
    for n in got:
        ledger.record("finished", f"job-{n}", by=sys.argv[2])
    print(*got, flush=True)
    sys.stdin.read()
"""


def test_processes_that_race_for_jobs_get_each_once(tmp_path: Path) -> None:
    words = [sys.executable, "-c", RACER, str(tmp_path / "l")]
    racers = [
        subprocess.Popen(
            [*words, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for n in range(4)
    ]  # fmt: skip
    # all claim before one of them ends and releases
    got = [int(n) for r in racers for n in (r.stdout.readline() if r.stdout else "").split()]
    for racer in racers:
        racer.communicate("")
    assert sorted(got) == list(range(100))
    assert len([*(tmp_path / "l/events").iterdir()]) <= 4


def test_a_claim_is_free_again_once_released_and_numbers_go_up(opened: Open) -> None:
    one, other = opened(), opened("b")
    claim = one.claim("x")
    assert claim is not None and claim.number == 1
    assert other.claim("x") is None and other.holder("x") == f"{one.place.host}, process {os.getpid()}"
    one.release(claim)
    assert other.holder("x") is None
    second = other.claim("x")
    assert second is not None and second.number == 2 and one.claim("x") is None


def test_the_claim_of_a_process_that_is_gone_is_free_at_once(opened: Open, tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from quant.batch.ledger import Ledger\n"
    code += "assert Ledger(Path(sys.argv[1])).claim('x'); os.kill(os.getpid(), 9)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "l")], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == -9
    claim = opened().claim("x")
    assert claim is not None and claim.number == 2


def test_another_process_by_the_same_number_does_not_hold_the_claim(opened: Open) -> None:
    ledger = opened()
    claim = ledger.claim("x")
    assert claim is not None
    value = json.loads(claim.path.read_text())
    claim.path.write_text(json.dumps({**value, "started": value["started"] - 100}))
    assert opened().holder("x") is None


def test_a_claim_of_another_machine_is_stale_by_the_observer_s_own_clock(opened: Open) -> None:
    far = opened("far", beat=1000)
    held = far.claim("x")
    assert held is not None
    os.utime(held.path, (1, 1))  # its clock is decades behind
    near = opened(stale=0.3)
    start = time.monotonic()
    assert near.claim("x") is None
    wait_for(lambda: near.holder("x") is None)
    assert time.monotonic() - start >= 0.3
    assert near.claim("x") is not None


def test_a_claim_that_is_touched_stays_held(opened: Open) -> None:
    far, near = opened("far", beat=0.05), opened(stale=1.5)
    assert far.claim("x") is not None
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        assert near.holder("x") is not None
        time.sleep(0.02)


def test_a_holder_that_was_taken_for_dead_learns_of_it(opened: Open) -> None:
    sleeper = opened("far", beat=0.05)
    claim = sleeper.claim("x")
    assert claim is not None and not claim.lost.is_set()
    # what another process does that has seen no touch for long
    (claim.path.parent / "2").write_text("{}")
    wait_for(claim.lost.is_set)
    sleeper.release(claim)
    assert not (claim.path.parent / "1.released").exists()


def test_a_holder_that_cannot_touch_its_claim_gives_up_before_others_take_it(opened: Open) -> None:
    ledger = opened("far", beat=0.05, stale=0.6)
    claim = ledger.claim("x")
    assert claim is not None
    claim.path.unlink()  # the server does not know it any more
    wait_for(claim.lost.is_set)
    assert time.monotonic() - claim.touched >= 0.3


def test_events_of_one_job_are_ordered_by_claim_not_by_clock(opened: Open) -> None:
    late, early = opened(), opened("b")
    early._own = early._own.with_name("a.jsonl")  # read before the other's
    first = late.claim("x")
    assert first is not None
    late.record("started", "x", first)
    late.record("failed", "x", first, message="1")
    late.release(first)
    second = early.claim("x")
    assert second is not None
    early.record("started", "x", second)
    early.record("finished", "x", second, message="2")
    reader = opened()
    reader.refresh()
    assert (reader.latest("x") or {})["event"] == "finished"
    assert reader.latest("y") is None


@pytest.mark.parametrize("tail", [b'{"event": "fini', b"\0" * 512, b"\xff\xfe\n", b"[1]\n", b"null\n"])
def test_what_a_crash_leaves_at_the_end_of_a_file_is_no_event(tail: bytes, opened: Open) -> None:
    ledger = opened()
    claim = ledger.claim("x")
    ledger.record("started", "x", claim)
    (file,) = (ledger.folder / "events").iterdir()
    with file.open("ab") as stream:
        stream.write(tail)
    reader = opened()
    reader.refresh()
    assert (reader.latest("x") or {})["event"] == "started"


def test_of_thousands_of_files_those_that_have_grown_are_read(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant.batch.ledger._OPENED", 3)
    reader = opened()
    files = [reader.folder / "events" / f"{n}.jsonl" for n in range(6)]
    for number, file in enumerate(files):
        file.write_text(json.dumps({"event": "started", "job": f"j{number}", "claim": 1}) + "\n")
    reader.refresh()
    with files[0].open("a") as stream:
        stream.write(json.dumps({"event": "finished", "job": "j0", "claim": 1}) + "\n")
    reads: list[str] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: reads.append(self.name) or real(self, *a, **k))
    reader.refresh()
    assert reads == ["0.jsonl"] and (reader.latest("j0") or {})["event"] == "finished"
    assert (reader.latest("j5") or {})["event"] == "started"


def test_a_line_is_read_once_it_is_whole(opened: Open) -> None:
    reader = opened()
    file = reader.folder / "events" / "z.jsonl"
    line = json.dumps({"event": "finished", "job": "x", "claim": 1}) + "\n"
    file.write_text(line[:20])
    reader.refresh()
    assert reader.latest("x") is None
    file.write_text(line)
    reader.refresh()
    assert (reader.latest("x") or {})["event"] == "finished"
