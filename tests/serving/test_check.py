"""The production checklist against an endpoint of the tests that is sound, and against the same with one lie
each; the real server's run is in tests/vllm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy_vllm import main
from quant.errors import Problems, UsageError
from quant.serving.check.operation import slope
from quant.serving.check.profile import parse_duration, profile_names, read_profile
from quant.serving.check.run import CheckRequest, check_endpoint
from quant.serving.check.value import CheckReport
from quant.serving.client import Endpoint, EndpointError
from quant.serving.foreign import ForeignServer
from tests.helpers import ROOT, change_config, copy_model
from tests.serving.endpoint import FakeEndpoint, endpoint
from tests.serving.engine import TEMPLATE, Engine

#: Loads of a few requests.
PROFILE = """
performance:
  {input_tokens: 24, output_tokens: 6, requests: 12, concurrency: 4, seconds: 1, ttft_p95_ms: 500,
   ttft_p99_ms: 1000, stream_tokens_per_second: 30, sustained_concurrency: 2,
   long_prompts: {64: 500, 9999: 500}}
fidelity: {concurrency: 4, repeats: 3}
security: {rate_limit_requests: 20}
"""


@pytest.fixture(scope="module")
def checkpoint(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a chat template."""
    path = Path(shutil.copytree(llama, tmp_path_factory.mktemp("check") / "model"))
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return Engine(checkpoint)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "quick.yaml"
    path.write_text(PROFILE)
    return path


def _report(
    fake: FakeEndpoint,
    profile: Path,
    checkpoint: Path | None,
    *groups: str,
    stall: float = 10.0,
    **given: Any,
) -> CheckReport:
    request = CheckRequest(read_profile(str(profile)), checkpoint, groups=groups, **given)
    key = fake.behaviour.key or None
    return check_endpoint(Endpoint(fake.url, stall=stall, api_key=key), request)


def _statuses(report: CheckReport) -> dict[str, str]:
    assert not any("not understood" in f.detail for f in report.findings), report.findings
    return {f.name: f.status for f in report.findings}


def test_a_sound_endpoint_passes(checkpoint: Path, engine: Engine, profile: Path) -> None:
    with endpoint(engine=engine, length=256, key="k") as fake:
        report = _report(fake, profile, checkpoint)
    statuses = _statuses(report)
    skipped = {name for name, status in statuses.items() if status == "SKIP"}
    for name in ("the client keeps up", "requests at a time within the limits"):  # of a busy machine
        if statuses.get(name) == "WARN":
            statuses.pop(name)
    assert set(statuses.values()) == {"PASS", "SKIP"}, [
        f for f in report.findings if f.status not in ("PASS", "SKIP")
    ]
    assert skipped == {
        "kernels as planned", "a prompt of 9,999 tokens", "memory of the GPUs", "KV cache as planned",
        "the gateway limits the rate", "filters stop what they must", "prompts are not in the log",
        "memory over time", "requests under way are finished", "starts again",
    }  # fmt: skip
    assert all(f.detail for f in report.findings)  # a SKIP has its reason


@pytest.mark.parametrize(
    ("lies", "group", "failed"),
    [
        (("batch",), "fidelity", {"log-probabilities, 4 at a time", "the same alone and in a batch"}),
        (
            ("template", "random", "schema"),
            "fidelity",
            {"chat template", "greedy text repeats", "JSON mode", "tool calls"},
        ),
        (("lax",), "security", {"malformed requests get 4xx"}),
        (("fragile",), "security", {"malformed requests get 4xx"}),
        (("closes",), "security", {"malformed requests get 4xx"}),
    ],
)
def test_each_lie_is_the_right_fail(
    lies: tuple[str, ...], group: str, failed: set[str], checkpoint: Path, engine: Engine, profile: Path
) -> None:
    with endpoint(engine=engine if group == "fidelity" else None, length=256, lies=lies) as fake:
        report = _report(fake, profile, checkpoint, group)
    assert {n for n, s in _statuses(report).items() if s == "FAIL"} == failed, report.findings
    assert all(f.todo for f in report.findings if f.status == "FAIL")


def test_a_checkpoint_that_its_config_contradicts_is_no_measure(
    checkpoint: Path, engine: Engine, profile: Path, tmp_path: Path
) -> None:
    wrong = copy_model(checkpoint, tmp_path / "m")
    change_config(wrong, num_hidden_layers=1)
    with endpoint(engine=engine, length=256) as fake, pytest.raises(Problems, match="layers.1"):
        _report(fake, profile, wrong, "fidelity")


def test_weights_of_another_checkpoint_are_told(
    checkpoints: Callable[..., Path], checkpoint: Path, profile: Path
) -> None:
    with endpoint(engine=Engine(checkpoints("llama", num_hidden_layers=1)), length=256) as fake:
        statuses = _statuses(_report(fake, profile, checkpoint, "fidelity"))
    assert statuses["log-probabilities, 1 at a time"] == statuses["log-probabilities, 4 at a time"] == "FAIL"
    assert statuses["the same alone and in a batch"] == "PASS"  # wrong, but always alike


@pytest.mark.parametrize(
    ("behaviour", "errors"),
    [
        ({"fault": "500"}, "5xx"),
        ({"fault": "cut"}, "cut off"),
        ({"fault": "garbage"}, "no stream"),
        ({"fault": "429", "every": 3}, "429"),
        ({"fault": "drop"}, "cut off"),
        ({"fault": "hang"}, "timeout"),
        ({"itl": 5.0}, "timeout"),
    ],
)
def test_what_fails_under_load_is_counted_by_kind_and_ends(
    behaviour: dict[str, Any], errors: str, profile: Path
) -> None:
    with endpoint(**behaviour) as fake:
        report = _report(fake, profile, None, "performance", stall=1.5)
    answered = next(f for f in report.findings if f.name == "requests are answered")
    assert answered.status == "FAIL" and errors in answered.todo
    statuses = _statuses(report)
    assert statuses["requests at a time within the limits"] == "FAIL"
    if "itl" in behaviour:  # its first tokens come at once
        assert statuses["TTFT P95"] == "PASS" and statuses["tokens/s of a stream"] == "FAIL"
    elif behaviour["fault"] not in ("cut", "429"):
        assert statuses["TTFT P95"] == "FAIL"


def test_a_server_that_stands_still_once_hides_nothing(profile: Path) -> None:
    """The requests under way wait, and those that were to come meanwhile do not make up for them."""
    with endpoint(stall_after=8, stall=0.8) as fake:  # within the load of 12, after two that warm up
        statuses = _statuses(_report(fake, profile, None, "performance"))
    assert statuses["requests are answered"] == "PASS"
    assert statuses["TTFT P95"] == "FAIL"


def _runs(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    with pytest.raises(SystemExit) as stop:
        main(["check", *arguments, "--json"])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return int(stop.value.code or 0), json.loads(said.out), said.err


def test_a_key_that_is_refused_is_a_fail_and_an_open_door_is_told(
    profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint(key="right") as fake:
        code, value, err = _runs(capsys, "--url", fake.url, "--api-key", "wrong")
        assert code == 4 and value["counts"]["FAIL"] == 1 and not value["counts"]["PASS"]
        assert value["findings"][0]["name"] == "the right key is taken" and "right key" in err
        assert _statuses(_report(fake, profile, None, "security"))["a wrong key is refused"] == "PASS"
    with endpoint() as fake:  # it takes any key
        code, value, _ = _runs(
            capsys, "--url", fake.url, "--api-key", "any", "--only", "security", "--profile", str(profile)
        )
    failed = {f["name"] for f in value["findings"] if f["status"] == "FAIL"}
    assert code == 4 and failed == {"a missing key is refused", "a wrong key is refused"}


def test_a_gateway_probes_and_a_log_are_looked_at(
    checkpoint: Path, engine: Engine, profile: Path, tmp_path: Path
) -> None:
    log, probes = tmp_path / "server.log", tmp_path / "probes.jsonl"
    log.write_text("INFO Using CPUWNA16LinearKernel for CompressedTensorsWNA16\n")
    probes.write_text('{"prompt": "a", "blocked": true}\n{"prompt": "b", "absent": "[a-z]"}\n')
    with endpoint(engine=engine, length=256) as fake, endpoint(fault="429", every=5) as gateway:
        given = {"gateway": gateway.url, "probes": probes, "log": log}
        report = _report(fake, profile, checkpoint, "security", **given)
    statuses = _statuses(report)
    assert statuses["the gateway limits the rate"] == "PASS"
    assert statuses["filters stop what they must"] == "FAIL"
    assert statuses["prompts are not in the log"] == "PASS"
    with endpoint(engine=engine, length=256, lies=("logs",)) as fake:
        fake.log = _Appended(log)
        statuses = _statuses(_report(fake, profile, None, "security", log=log, gateway=fake.url))
    assert statuses["prompts are not in the log"] == "FAIL"
    assert statuses["the gateway limits the rate"] == "FAIL"


class _Appended(list[str]):
    """A log that is a file too."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def append(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(line + "\n")


def test_a_certificate_is_looked_at(profile: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl, which makes the certificate")
    certificate, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    made = "req -x509 -newkey rsa:2048 -nodes -days 5 -subj /CN=x -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        ["openssl", *made.split(), "-keyout", key, "-out", certificate], capture_output=True, check=True
    )
    request = CheckRequest(read_profile(str(profile)), groups=("security",))
    with endpoint(certificate=(certificate, key)) as fake:
        trusted = _statuses(check_endpoint(Endpoint(fake.url, ca=certificate), request))
        blind = _statuses(check_endpoint(Endpoint(fake.url, insecure=True), request))
        with pytest.raises(EndpointError, match="--ca"):
            check_endpoint(Endpoint(fake.url), request)
    assert trusted["encrypted"] == "WARN"  # it ends in five days
    assert blind["encrypted"] == "FAIL"


_ALONE = """
import signal, sys, threading, time
from tests.serving.endpoint import endpoint

with endpoint(itl=0.01) as fake:
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    print(fake.url, flush=True)
    ended.wait(60)
    time.sleep({grace})  # what is under way goes on for so long
    if {grace} == 0:
        import os
        os._exit(0)
"""


@pytest.mark.parametrize(("grace", "status"), [(8, "PASS"), (0, "FAIL")])
def test_anothers_server_is_ended_where_its_process_is_named(grace: int, status: str, profile: Path) -> None:
    command = [sys.executable, "-c", _ALONE.format(grace=grace)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        try:
            with endpoint() as other, pytest.raises(UsageError, match="it listens on"):
                _report(other, profile, None, "operation", pid=process.pid)
            assert process.poll() is None  # nothing else is ended
            request = CheckRequest(read_profile(str(profile)), groups=("operation",), pid=process.pid)
            report = check_endpoint(Endpoint(url, stall=10.0), request)
            assert process.wait(20) == 0
        finally:
            process.kill()
    by_name = {f.name: f for f in report.findings}
    assert by_name["requests under way are finished"].status == status, report.findings
    assert by_name["starts again"].status == "SKIP" and "--pid" in by_name["starts again"].detail
    with pytest.raises(UsageError, match="no such process"):
        check_endpoint(Endpoint(url), request)


@contextmanager
def _sleeping() -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


def test_a_process_that_was_given_the_servers_number_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with _sleeping() as process:
        # as it was told when the address was looked at: of an earlier start than the one that has it now
        monkeypatch.setattr(process, "_ident", (process.pid, process.create_time() - 9))
        server = ForeignServer(process)
        server.ask_to_end()
        assert not server.alive and server.resident_bytes == 0
        assert psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE
        with pytest.raises(psutil.TimeoutExpired):
            psutil.Process(process.pid).wait(0.3)


def test_a_child_that_ends_while_it_is_looked_at_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with _sleeping() as gone:
        pass
    with endpoint() as fake:
        monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [gone])
        server = ForeignServer.that_serves(os.getpid(), fake.url)
    assert server.resident_bytes == pytest.approx(server.process.memory_info().rss, rel=0.2)


def test_a_slope_is_told_from_noise() -> None:
    import random

    noise = random.Random(0)
    times = [float(t) for t in range(0, 600, 3)]
    flat = [1e9 + noise.gauss(0, 1e6) for _ in times]
    rate, half = slope(times, flat)
    assert abs(rate) < half < 50e6
    rate, half = slope(times, [v + 1e9 * t / 3600 for v, t in zip(flat, times, strict=True)])
    assert rate - half > 0.9e9 and rate == pytest.approx(1e9, rel=0.05)


def test_profiles_are_read_and_every_mistake_is_listed(tmp_path: Path) -> None:
    assert profile_names() == ["batch", "chat"]
    assert read_profile("chat").performance.ttft_p95_ms == 500
    assert read_profile("batch").performance.tokens_per_second == 1000
    path = tmp_path / "mine.yaml"
    path.write_text(
        "performance: {ttft_p95: 5, requests: many, seconds: -1}\nsecurty: {}\nresources: {free_disk: 5 XB}"
    )
    with pytest.raises(Exception, match="5 problems") as error:
        read_profile(str(path))
    said = str(error.value)
    assert "did you mean 'ttft_p95_ms'" in said and "requests is 'many'" in said and "'security'" in said
    assert parse_duration("90s", "--soak") == 90 and parse_duration("10m", "--soak") == 600


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "--url of an endpoint"),
        (["--url", "http://127.0.0.1:9"], 1, "is the server up"),
        (["--url", "ftp://x"], 2, "give an address such as"),
        (["--url", "http://a", "--profile", "caht"], 2, "did you mean 'chat'"),
        (["--url", "http://a", "--soak", "soon"], 2, "30s, 10m"),
        (["--url", "http://a", "--log", "missing.log"], 2, "--log is"),
        (["--url", "http://a", "--probes", "missing.jsonl"], 2, "--probes is"),
        (["--url", "http://a", "--pid", "77"], 2, "another machine's"),
        (["--checkpoint", "x", "--pid", "77"], 2, "give its --url"),
        (["--url", "http://a", "--", "--enforce-eager"], 2, "started here"),
        (["--url", "http://a", "--output", "no/such/folder/x.json"], 2, "--output is"),
        (["--url", "http://a", "--gateway", "x y"], 2, "--gateway is 'x y'"),
        (["--url", "http://a", "--api-key", "a\nb"], 2, "no header can carry it"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["check", *arguments])
    said = capsys.readouterr().err
    assert int(stop.value.code or 0) == code and words in said and "Traceback" not in said


def test_the_screen_says_what_to_do(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--only", "security", "--profile", str(profile), "--output", str(tmp_path / "r.json"), "-q"]
    for width in ("100", "50"):
        monkeypatch.setenv("COLUMNS", width)
        with endpoint(lies=("lax",)) as fake, pytest.raises(SystemExit) as stop:
            main(["check", "--url", fake.url, *arguments])
        out = capsys.readouterr().out
        assert stop.value.code == 4
        assert "FAIL" in out and "→ " in out and "SKIP" in out
        assert max(map(len, out.splitlines()[1:-1])) <= int(width)
    assert json.loads((tmp_path / "r.json").read_text())["passed"] is False
