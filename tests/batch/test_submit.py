"""What Slurm and Kubernetes are given: scripts that run, by a ``sbatch`` that stands in for Slurm's, and
objects that Kubernetes' own schemas accept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from quant.batch.forecast import Forecast
from quant.batch.ledger import Ledger
from quant.batch.manifest import read_manifest
from quant.batch.run import State
from quant.batch.submit import Submission, hand_over, kubernetes_job, needed, slurm_script
from quant.units import GIB
from tests.helpers import ROOT, quantize, weight_files

#: Runs the tasks of an array one after another, again where they asked for it, as Slurm would.
SBATCH = f"""#!{sys.executable}
import os, re, subprocess, sys
from pathlib import Path
here, script = Path(sys.argv[0]).parent, sys.argv[-1]
with open(here / "calls", "a") as calls: print("sbatch", *sys.argv[1:], file=calls)
options = dict(re.findall(r"^#SBATCH --([\\w-]+)(?:=(.*))?$", Path(script).read_text(), re.M))
last = int(re.match(r"0-(\\d+)", options["array"])[1])
for index in range(last + 1):
    names = {{"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(index)}}
    again = here / "requeue"
    while True:
        again.unlink(missing_ok=True)
        with open(options["output"].replace("%a", str(index)), "ab") as log:
            subprocess.run(["bash", script], stdout=log, stderr=log, env={{**os.environ, **names}})
        if not again.exists(): break
print("7;cluster")
"""
SCONTROL = '#!/bin/sh\necho "scontrol $@" >> "$(dirname "$0")/calls"\ntouch "$(dirname "$0")/requeue"\n'
SQUEUE = '#!/bin/sh\ncat "$(dirname "$0")/queue" 2>/dev/null\nexit 0\n'


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts programs on the path; their folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def call(**programs: str) -> Path:
        for name, text in programs.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        return folder

    return call


def states_of(tmp_path: Path, jobs: list[dict[str, Any]], forecast: Forecast) -> list[State]:
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model/config.json").write_text("{}")
    entries = [{"model": "model", "overrides": {"method": "gptq"}, **j} for j in jobs]
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"jobs": entries}))
    return [State(job, forecast=forecast) for job in read_manifest(tmp_path / "m.yaml")]


def test_a_task_asks_for_what_the_dry_run_said_and_room_for_what_watches_it(tmp_path: Path) -> None:
    (state,) = states_of(tmp_path, [{"output": "o", "threads": 3}], Forecast(memory_bytes=10 * GIB))
    need = needed(state)
    assert (need.cores, need.gpus, need.memory, need.accelerator) == (3, 0, 12 * GIB, None)
    on_gpu = states_of(tmp_path, [{"output": "o", "accelerator": "a100"}], Forecast(gpu_bytes=1))[0]
    assert (needed(on_gpu).gpus, needed(on_gpu).accelerator) == (1, "a100")
    named = states_of(
        tmp_path, [{"output": "o", "overrides": {"method": "gptq", "device": "cuda"}}], Forecast()
    )
    assert needed(named[0]).gpus == 1


def test_a_script_names_everything_that_slurm_must_know(tmp_path: Path) -> None:
    (state,) = states_of(
        tmp_path, [{"output": "o", "accelerator": "a100", "threads": 2}], Forecast(memory_bytes=3 * GIB)
    )
    submission = Submission(tmp_path / "m.yaml", tmp_path / "m.batch", most=4)
    lines = slurm_script(submission, needed(state), tmp_path / "0.names", 5).splitlines()
    assert lines[0] == "#!/bin/bash"
    assert {x.removeprefix("#SBATCH --") for x in lines if x.startswith("#SBATCH")} == {
        "job-name=quant-m", "array=0-4%4", "cpus-per-task=2", "mem=4096M", "gres=gpu:a100:1",
        "signal=B:TERM@120", "requeue", "open-mode=append", f"output={tmp_path}/0-%a.log",
    }  # fmt: skip


@pytest.mark.parametrize("status", [75, 1, 0])
def test_a_script_queues_its_task_again_at_status_75_alone(
    status: int, commands: Callable[..., Path], tmp_path: Path
) -> None:
    folder = commands(
        scontrol=SCONTROL, python=f'#!/bin/sh\necho "$@" > "$(dirname "$0")/words"\nexit {status}\n'
    )
    (state,) = states_of(tmp_path, [{"output": "o", "name": "it's; $(touch x) a job"}], Forecast())
    (tmp_path / "n.names").write_text(f"first\n{state.job.name}\n")
    submission = Submission(tmp_path / "m.yaml", tmp_path / "m.batch", python=str(folder / "python"))
    (tmp_path / "s.sh").write_text(slurm_script(submission, needed(state), tmp_path / "n.names", 2))
    numbers = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(["bash", str(tmp_path / "s.sh")], env={**os.environ, **numbers}, cwd=tmp_path)
    assert done.returncode == (0 if status == 75 else status)
    assert (folder / "words").read_text().endswith(f"--job {state.job.name} --jobs 1\n")
    assert not (tmp_path / "x").exists()
    said = (folder / "calls").read_text() if (folder / "calls").exists() else ""
    assert said == ("scontrol requeue 9_1\n" if status == 75 else "")


def test_a_script_passes_slurm_s_notice_on_and_waits_for_the_task(
    commands: Callable[..., Path], tmp_path: Path
) -> None:
    code = "import signal, sys, time\n"
    code += "signal.signal(signal.SIGTERM, lambda *a: (time.sleep(0.3), sys.exit(75)))\n"
    code += f"open({str(tmp_path / 'begun')!r}, 'w').close()\ntime.sleep(60)\n"
    folder = commands(scontrol=SCONTROL, python=f"#!{sys.executable}\n{code}")
    (state,) = states_of(tmp_path, [{"output": "o"}], Forecast())
    (tmp_path / "n.names").write_text(f"{state.job.name}\n")
    submission = Submission(tmp_path / "m.yaml", tmp_path / "m.batch", python=str(folder / "python"))
    (tmp_path / "s.sh").write_text(slurm_script(submission, needed(state), tmp_path / "n.names", 1))
    numbers = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "0"}
    task = subprocess.Popen(["bash", str(tmp_path / "s.sh")], env={**os.environ, **numbers})
    while not (tmp_path / "begun").exists():
        assert task.poll() is None
        time.sleep(0.02)
    task.send_signal(signal.SIGTERM)
    assert task.wait(60) == 0 and (folder / "calls").read_text() == "scontrol requeue 9_0\n"


def test_an_array_runs_the_jobs_and_the_same_command_again_sees_them_done(
    llama: Path, tmp_path: Path, commands: Callable[..., Path], cli: Callable[..., Any]
) -> None:
    folder = commands(sbatch=SBATCH, scontrol=SCONTROL, squeue=SQUEUE)
    options = {"method": "minmax", "group_size": 32}
    job = {"model": str(llama), "output": "out/a", "overrides": options, "threads": torch.get_num_threads()}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"jobs": [job]}))
    words = ["batch", tmp_path / "m.yaml", "--executor", "slurm", "--submit-argument=--partition=x", "--json"]
    found = cli(*words)
    assert found.code == 75, found.err
    assert [json.loads(x)["event"] for x in found.out.splitlines()] == ["planned", "submitted", "summary"]
    assert (folder / "calls").read_text().startswith("sbatch --parsable --partition=x ")
    again = cli(*words)
    assert again.code == 0, again.err + "".join(p.read_text() for p in tmp_path.rglob("*.log"))
    quantize(llama, tmp_path / "alone", **options)
    assert weight_files(tmp_path / "out/a") == weight_files(tmp_path / "alone")
    assert (folder / "calls").read_text().count("sbatch") == 1


def test_what_waits_in_the_queue_is_not_submitted_twice_and_a_failure_is_told_once(
    tmp_path: Path, commands: Callable[..., Path]
) -> None:
    folder = commands(sbatch='#!/bin/sh\necho x >> "$(dirname "$0")/calls"\necho 7\n', squeue=SQUEUE)
    jobs = [{"output": "a"}, {"output": "b", "priority": 5}, {"output": "c", "priority": 5}]
    submission = Submission(tmp_path / "m.yaml", tmp_path / "l")

    def submit() -> dict[str, str]:
        states = states_of(tmp_path, jobs, Forecast())
        with Ledger(tmp_path / "l") as ledger:
            ledger.refresh()
            hand_over(states, submission, ledger, "slurm", lambda kind, state: None)
        return {s.job.name: f"{s.status} {s.where}" for s in states}

    # those of higher priority are an array of their own, submitted first
    assert submit() == {n: f"submitted slurm 7_{i}" for n, i in (("a", 0), ("b", 0), ("c", 1))}
    names = [p.read_text().split() for p in sorted((tmp_path / "l/submitted").glob("*.names"))]
    assert names == [["b", "c"], ["a"]]
    (folder / "queue").write_text("7_0\n7_1\n")
    submit()
    assert (folder / "calls").read_text().count("x\n") == 2
    (folder / "queue").write_text("")
    with Ledger(tmp_path / "l") as ledger:
        slug = states_of(tmp_path, jobs, Forecast())[0].job.slug
        claim = ledger.claim(slug)
        assert claim is not None
        ledger.record("failed", slug, claim, message="why", log="x.log")
    assert submit()["a"].startswith("failed") and (folder / "calls").read_text().count("x\n") == 3
    assert submit()["a"].startswith("submitted") and (folder / "calls").read_text().count("x\n") == 5


def test_kubernetes_own_schemas_accept_the_jobs(tmp_path: Path, commands: Callable[..., Path]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    forecast = Forecast(memory_bytes=3 * GIB, gpu_bytes=GIB)
    jobs = [{"output": "Out/Ä b_c", "accelerator": "NVIDIA-L4", "retries": 4}, {"output": "x" * 150}]
    submission = Submission(
        tmp_path / "m.yaml", tmp_path / "m.batch", python="python3", image="registry/quant:1", claim="models",
        root=tmp_path,
    )  # fmt: skip
    for state in states_of(tmp_path, jobs, forecast):
        value = kubernetes_job(state, submission, 1)
        kubernetes_validate.validate(value, "1.31", strict=True)
        assert len(value["metadata"]["name"]) <= 63
        (container,) = value["spec"]["template"]["spec"]["containers"]
        assert container["command"][-4:] == ["--job", state.job.name, "--jobs", "1"]
        assert container["resources"]["limits"] == {"memory": str(4 * GIB), "nvidia.com/gpu": 1}
        actions = [r["action"] for r in value["spec"]["podFailurePolicy"]["rules"]]
        assert actions == ["Ignore", "Ignore", "FailJob"]
        assert value["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == [75]
        assert value["spec"]["backoffLimit"] == state.job.retries


def test_a_job_of_kubernetes_is_applied_once_and_under_a_new_name_after_it_ended(
    tmp_path: Path, commands: Callable[..., Path]
) -> None:
    program = '#!/bin/sh\necho "$@" >> "$(dirname "$0")/calls"\n'
    program += '[ "$1" = get ] && cat "$(dirname "$0")/items"\nexit 0\n'
    folder = commands(kubectl=program)
    submission = Submission(tmp_path / "m.yaml", tmp_path / "l", image="i", claim="c", root=tmp_path)

    def submit() -> str:
        (state,) = states_of(tmp_path, [{"output": "a"}], Forecast())
        with Ledger(tmp_path / "l") as ledger:
            ledger.refresh()
            hand_over([state], submission, ledger, "kubernetes", lambda kind, state: None)
        return state.where.removeprefix("kubernetes ")

    first = submit()
    active = {"metadata": {"name": first}, "status": {"active": 1}}
    (folder / "items").write_text(json.dumps({"items": [active]}))
    assert submit() == first
    over = {**active, "status": {"conditions": [{"type": "Failed", "status": "True"}]}}
    (folder / "items").write_text(json.dumps({"items": [over]}))
    second = submit()
    assert (first[-2:], second[-2:]) == ("-1", "-2") and first[:-2] == second[:-2]
    assert (folder / "calls").read_text().count("apply") == 2


def test_what_belongs_to_one_executor_is_refused_with_another(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    for words, said in (
        (["--address", "auto"], "--address is a Ray cluster's"),
        (["--submit-argument=-p"], "--submit-argument is for --executor slurm or kubernetes"),
        (["--executor", "kubernetes"], "needs --image and --shared-claim"),
        (["--image", "x"], "--image and --shared-claim are for --executor kubernetes"),
    ):
        found = cli("batch", tmp_path / "m.yaml", *words)
        assert found.code == 2 and said in found.err


@pytest.mark.parametrize(("executor", "command"), [("slurm", "sbatch"), ("kubernetes", "kubectl")])
def test_a_scheduler_that_is_not_here_is_said_before_any_dry_run(
    executor: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    states_of(tmp_path, [{"output": "a"}], Forecast())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("quant.batch.session.forecasts", lambda *a: pytest.fail("a dry run was made"))
    more = ["--image", "i", "--shared-claim", "c"] if executor == "kubernetes" else []
    found = cli("batch", tmp_path / "m.yaml", "--executor", executor, *more)
    assert found.code == 1 and f"needs the command {command}, which is not here" in found.err


def test_without_ray_its_executor_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    states_of(tmp_path, [{"output": "a"}], Forecast())
    monkeypatch.setitem(sys.modules, "ray", None)
    found = cli("batch", tmp_path / "m.yaml", "--executor", "ray")
    assert found.code == 1 and "pip install 'quant[ray]'" in found.err


def test_a_scheduler_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quant.errors import QuantError

    monkeypatch.setenv("PATH", str(tmp_path))
    states = states_of(tmp_path, [{"output": "a"}], Forecast())
    with (
        Ledger(tmp_path / "l") as ledger,
        pytest.raises(QuantError, match="sbatch cannot be run.*submit from"),
    ):
        hand_over(states, Submission(tmp_path / "m.yaml", tmp_path / "l"), ledger, "slurm", lambda k, s: None)
