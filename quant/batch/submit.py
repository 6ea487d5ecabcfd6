"""Jobs handed to a scheduler that has its own queue: Slurm's arrays, Kubernetes' Jobs.

What is queued is this very program with one job of the manifest, ``quant batch MANIFEST --job NAME``: the
task takes the job's claim in the shared ledger, and everything else is as on one machine. Status 75 of a task
means that the scheduler's own means start it again. The caller writes the files, submits them, notes that in
the ledger, and is done; the same command again says what became of the jobs and submits those that neither
ended nor wait in the queue.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.batch.attempt import RUN_AGAIN
from quant.batch.cluster import Need
from quant.batch.ledger import Ledger
from quant.batch.run import State, Told
from quant.errors import QuantError
from quant.units import GIB, MIB

#: Memory of a task beside its job's: the batch that watches it, and what a forecast may miss; and seconds
#: that a task has to end by itself.
_BESIDE, _MARGIN, NOTICE = GIB // 2, 1.15, 120
#: What submits a task.
_COMMANDS = {"slurm": "sbatch", "kubernetes": "kubectl"}
#: Tasks of an array; Slurm's own limit is 1001 unless a site has raised it.
_ARRAY = 1000


@dataclass(frozen=True)
class Submission:
    """What every task of a batch shares.

    Attributes:
        manifest, ledger: absolute paths that hold on every machine.
        python: the interpreter that has this package there.
        most: tasks that run at once; None: as the scheduler says.
        extra: further arguments of the scheduler's command.
        image, claim: of Kubernetes: the container image that has this package, and the
            PersistentVolumeClaim that holds ``root``.
        root: the folder that holds the manifest, the ledger, the models and the outputs.
    """

    manifest: Path
    ledger: Path
    python: str = sys.executable
    most: int | None = None
    extra: tuple[str, ...] = ()
    image: str = ""
    claim: str = ""
    root: Path = Path("/")

    def words(self, name: str) -> list[str]:
        """The command of one task."""
        words = [self.python, "-m", "quant", "batch", str(self.manifest), "--ledger", str(self.ledger)]
        return [*words, "--job", name, "--jobs", "1"]


def needed(state: State) -> Need:
    """What a task asks for: its job's need, with memory for what stands beside it, in whole GiB."""
    need = Need.of(state.job, state.forecast)
    memory = math.ceil((need.memory * _MARGIN + _BESIDE) / GIB) * GIB
    return Need(need.cores, need.gpus, memory, need.accelerator)


def check_scheduler(scheduler: str) -> None:
    """
    Raises:
        QuantError: its command is not there.
    """
    if shutil.which(name := _COMMANDS[scheduler]) is None:
        raise QuantError(
            f"--executor {scheduler} needs the command {name}, which is not here: submit from a machine that "
            "has it"
        )


def call(words: Sequence[str], text: str | None = None) -> str:
    """Runs a scheduler's command; its stdout.

    Raises:
        QuantError: there is no such command, or it fails.
    """
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QuantError(
            f"{words[0]} cannot be run ({type(error).__name__}): submit from a machine that has it"
        ) from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
        raise QuantError(f"{words[0]}: {said[-1][:300]}")
    return done.stdout


def _number(state: State, ledger: Ledger) -> int:
    """Of the next submission of a job, from 1."""
    before = ledger.submitted(state.job.slug)
    return 1 if before is None else int(before["number"]) + 1


def _noted(state: State, ledger: Ledger, scheduler: str, task: str) -> str:
    """Notes that a job was handed over as this task, or, without one, that its end was told."""
    ledger.record(
        "submitted", state.job.slug, scheduler=scheduler, task=task, number=_number(state, ledger),
        seen=_last_claim(state, ledger),
    )  # fmt: skip
    return task


def _last_claim(state: State, ledger: Ledger) -> int:
    latest = ledger.latest(state.job.slug)
    return 0 if latest is None else int(latest["claim"])


# --- Slurm --------------------------------------------------------------------------------------------------


def slurm_script(submission: Submission, need: Need, names: Path, count: int) -> str:
    """A batch script for an array of tasks that ask for the same.

    Args:
        names: a file with a job's name in each line, in the order of the array.
    """
    gres = "" if not need.gpus else f"gpu:{need.accelerator}:1" if need.accelerator else "gpu:1"
    limit = f"%{submission.most}" if submission.most else ""
    log = names.with_suffix("").as_posix()
    options = [
        f"--job-name=quant-{submission.manifest.stem}",
        f"--array=0-{count - 1}{limit}",
        f"--cpus-per-task={need.cores}",
        f"--mem={math.ceil(need.memory / MIB)}M",
        *([f"--gres={gres}"] if gres else []),
        f"--signal=B:TERM@{NOTICE}",
        "--requeue",
        "--open-mode=append",
        f"--output={log}-%a.log",
    ]
    words = shlex.join(submission.words("NAME")).replace("NAME", '"$name"')
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {o}" for o in options),
            "# a job of the manifest for each task; run again, it goes on",
            f"export OMP_NUM_THREADS={need.cores}",
            f'name=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(names))})',
            f"{words} &",
            "child=$!",
            "trap 'kill -TERM $child' TERM",
            "wait $child",
            "status=$?",
            "# a signal that was passed on ends the first wait, not the child",
            "while kill -0 $child 2>/dev/null; do wait $child; status=$?; done",
            f'if [ "$status" -eq {RUN_AGAIN} ]; then',
            '  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" && exit 0',
            "fi",
            'exit "$status"',
            "",
        ]
    )


def submit_slurm(states: Iterable[State], submission: Submission, ledger: Ledger) -> dict[str, str]:
    """Submits an array for each kind of need; the tasks' numbers in Slurm by their jobs' slugs.

    Raises:
        QuantError: ``sbatch`` is not there, or refuses.
    """
    groups: dict[tuple[int, Need], list[State]] = {}
    for state in states:
        groups.setdefault((-state.job.priority, needed(state)), []).append(state)
    tasks: dict[str, str] = {}
    folder = ledger.folder / "submitted"
    folder.mkdir(exist_ok=True)
    for (_, need), members in sorted(groups.items(), key=lambda g: g[0][0]):
        for start in range(0, len(members), _ARRAY):
            some = members[start : start + _ARRAY]
            number = len([*folder.glob("*.sh")])
            names = folder / f"{number}.names"
            names.write_text("".join(f"{s.job.name}\n" for s in some), encoding="utf-8")
            script = folder / f"{number}.sh"
            script.write_text(slurm_script(submission, need, names, len(some)), encoding="utf-8")
            said = call(["sbatch", "--parsable", *submission.extra, str(script)])
            array = said.strip().partition(";")[0]
            for index, state in enumerate(some):
                tasks[state.job.slug] = _noted(state, ledger, "slurm", f"{array}_{index}")
    return tasks


def queued_slurm(tasks: Iterable[str]) -> set[str]:
    """Those of the tasks that wait or run.

    Raises:
        QuantError: ``squeue`` is not there.
    """
    arrays = sorted({task.partition("_")[0] for task in tasks})
    if not arrays:
        return set()
    try:
        said = call(["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(arrays)}"])
    except QuantError as error:
        if "Invalid job id" in str(error):  # of arrays that have ended long ago
            return set()
        raise
    return set(said.split())


# --- Kubernetes ---------------------------------------------------------------------------------------------


def kubernetes_job(state: State, submission: Submission, number: int) -> dict[str, Any]:
    """A Job of one task, as the API has it.

    Args:
        number: which submission of the job this is; a Job that has ended keeps its name.
    """
    need, job = needed(state), state.job
    name = f"quant-{job.slug[:44].strip('-')}-{number}"
    gpus = {"nvidia.com/gpu": need.gpus} if need.gpus else {}
    container = {
        "name": "quant",
        "image": submission.image,
        "command": submission.words(job.name),
        "env": [{"name": "OMP_NUM_THREADS", "value": str(need.cores)}],
        "resources": {
            "requests": {"cpu": str(need.cores), "memory": str(need.memory)},
            "limits": {"memory": str(need.memory), **gpus},
        },
        "volumeMounts": [{"name": "shared", "mountPath": str(submission.root)}],
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": NOTICE,
        "containers": [container],
        "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": submission.claim}}],
    }
    if need.accelerator is not None:
        spec["nodeSelector"] = {"nvidia.com/gpu.product": need.accelerator}
    again = {"containerName": "quant", "operator": "In", "values": [RUN_AGAIN]}
    failed = {"containerName": "quant", "operator": "In", "values": [1, 2, 3, 4]}
    rules = [
        # evicted, or asked to end: another pod goes on, and that is no failure
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": again},
        # the task has tried as often as the manifest says
        {"action": "FailJob", "onExitCodes": failed},
    ]
    labels = {"app.kubernetes.io/name": "quant-batch", "quant/manifest": submission.manifest.stem[:63]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "backoffLimit": job.retries,
            "podFailurePolicy": {"rules": rules},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


def submit_kubernetes(states: Iterable[State], submission: Submission, ledger: Ledger) -> dict[str, str]:
    """Applies a Job for each state; the Jobs' names by their jobs' slugs.

    Raises:
        QuantError: ``kubectl`` is not there, or refuses.
    """
    folder = ledger.folder / "submitted"
    folder.mkdir(exist_ok=True)
    tasks: dict[str, str] = {}
    for state in states:
        value = kubernetes_job(state, submission, _number(state, ledger))
        name = value["metadata"]["name"]
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        call(["kubectl", "apply", *submission.extra, "-f", str(folder / f"{name}.json")])
        tasks[state.job.slug] = _noted(state, ledger, "kubernetes", name)
    return tasks


def queued_kubernetes(tasks: Iterable[str], extra: Sequence[str] = ()) -> set[str]:
    """Those of the Jobs that have neither completed nor failed.

    Raises:
        QuantError: ``kubectl`` is not there.
    """
    wanted = set(tasks)
    if not wanted:
        return set()
    selector = "app.kubernetes.io/name=quant-batch"
    said = json.loads(call(["kubectl", "get", "jobs", *extra, f"--selector={selector}", "--output=json"]))
    return {
        item["metadata"]["name"]
        for item in said.get("items", [])
        if item["metadata"]["name"] in wanted and not _over(item.get("status", {}))
    }


def _over(status: Mapping[str, Any]) -> bool:
    return any(
        c.get("type") in ("Complete", "Failed") and c.get("status") == "True"
        for c in status.get("conditions", [])
    )


SUBMIT = {"slurm": submit_slurm, "kubernetes": submit_kubernetes}


def hand_over(
    states: Sequence[State], submission: Submission, ledger: Ledger, scheduler: str, told: Told
) -> None:
    """Submits what waits, but for what the scheduler has already or another process holds. A job that failed
    since it was submitted is told of, and submitted again by the next run.

    Raises:
        QuantError: the scheduler's commands.
    """
    waiting = [s for s in states if s.status == "waiting"]
    events = {s.job.slug: e for s in waiting if (e := ledger.submitted(s.job.slug)) is not None}
    tasks = {slug: str(e["task"]) for slug, e in events.items() if e.get("scheduler") == scheduler}
    known = [task for task in tasks.values() if task]
    queued = queued_slurm(known) if scheduler == "slurm" else queued_kubernetes(known, submission.extra)
    new = []
    for state in waiting:
        slug, latest = state.job.slug, ledger.latest(state.job.slug)
        if tasks.get(slug) in queued:
            state.status, state.where = "submitted", f"{scheduler} {tasks[slug]}"
        elif (holder := ledger.holder(slug)) is not None:
            state.status, state.where = "elsewhere", holder
        elif (
            slug in events
            and latest is not None
            and latest["claim"] > events[slug].get("seen", 0)
            and (latest["event"] == "failed")
        ):
            state.status, state.message = "failed", str(latest.get("message", ""))
            state.facts, state.log = latest, Path(str(latest.get("log")))
            _noted(state, ledger, scheduler, "")
            told("failed", state)
        elif state.forecast.problem:
            state.status, state.message = "failed", state.forecast.problem
            told("failed", state)
        else:
            new.append(state)
    made = SUBMIT[scheduler](sorted(new, key=lambda s: (-s.job.priority, s.job.index)), submission, ledger)
    for state in new:
        state.status, state.where = "submitted", f"{scheduler} {made[state.job.slug]}"
        told("submitted", state)
    for state in waiting:
        if state.status in ("submitted", "elsewhere"):
            state.message = state.where
