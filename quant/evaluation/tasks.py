"""Accuracy on tasks of lm-eval, with what the model thinks computed here.

The library (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness) runs in an environment of its
own (:mod:`quant.evaluation.task_environment`) and asks for log-likelihoods through a pipe
(:mod:`quant.evaluation.task_worker`); they come from the same run of the checkpoint, block by block and with
activations rounded as vLLM does it, that measures its perplexity. So every format that is read here can be
measured, in the memory of one block. Against a source the same documents are judged with both, and the error
of the difference is that of the difference document by document.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quant.accelerator import device_of
from quant.checkpoint.reader import open_checkpoint
from quant.errors import CheckpointError, QuantError, UsageError
from quant.evaluation.agreement import demand_agreement
from quant.evaluation.intervals import mean_of
from quant.evaluation.quality import Runner, columns_of, compared, only_measured
from quant.evaluation.simulation import Simulation
from quant.progress import Event, Progress, silent
from quant.vllm.context import context_length

_WORKER = Path(__file__).with_name("task_worker.py")
#: Tokens that go through the blocks together: their states are in memory at once.
_TOGETHER = 1 << 17
_BATCH_TOKENS = 2048
#: Context of a model whose config names none.
_CONTEXT = 2048


@dataclass(frozen=True)
class TaskRequest:
    """What to run.

    Attributes:
        names: tasks or groups of lm-eval.
        folder: of more tasks (YAML), or None.
        python: of the environment with lm-eval; None for this one.
        limit: documents of each task; None: all.
        few_shot: examples before each; None: the task's own number.
    """

    names: tuple[str, ...]
    folder: Path | None = None
    python: Path | None = None
    limit: int | None = None
    few_shot: int | None = None

    def check(self) -> None:
        """Refuses what cannot run, before minutes are spent on anything else.

        Raises:
            UsageError: no task, no such folder, or a Python without lm-eval.
        """
        if not self.names or not all(self.names):
            raise UsageError("--tasks names none: give tasks of lm-eval, such as arc_easy,piqa")
        if self.folder is not None and not self.folder.is_dir():
            raise UsageError(f"--tasks-path is {str(self.folder)!r}: it is not a folder")
        python = str(self.python or sys.executable)
        program = "import importlib.util as u; print(u.find_spec('lm_eval') is not None)"
        how = (
            "make an environment with `python -m quant.evaluation.task_environment DIR` and give "
            "--tasks-python DIR/bin/python"
        )
        try:
            done = subprocess.run(
                [python, "-c", program], capture_output=True, text=True, env=_environment(), timeout=120
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "no answer"
            raise UsageError(f"--tasks-python is {python!r}: it does not run ({reason}): {how}") from error
        if done.stdout.strip() != "True":
            raise UsageError(f"{python} has no lm-eval: {how}")


def _environment() -> dict[str, str]:
    """A child's environment: without this package's paths. Whether data sets may be fetched is for
    HF_HUB_OFFLINE to say, as for models."""
    own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return own | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


@only_measured()
def run_tasks(
    path: str | Path,
    request: TaskRequest,
    *,
    against: str | Path | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Runs tasks with a checkpoint, and with its source.

    Returns:
        ``version`` of lm-eval, ``limit``, and by task ``documents`` and ``metrics``: by name ``value``,
        ``standard_error``, ``source`` and ``difference`` (``mean``, ``standard_error``, ``interval``), the
        last two None without a source.

    Raises:
        UsageError: see :meth:`TaskRequest.check`.
        QuantError: lm-eval has no such task, cannot get its data, or lets models write text.
    """
    request.check()
    own = _judged(path, request, device, progress, "candidate")
    other = None if against is None else _judged(against, request, device, progress, "source")
    tasks = {}
    for name, found in own["tasks"].items():
        source = None if other is None else other["tasks"].get(name)
        tasks[name] = {
            "documents": found["documents"],
            "metrics": {metric: _metric(metric, found, source) for metric in found["metrics"]},
        }
    return {"version": own["version"], "limit": request.limit, "tasks": tasks}


def _metric(metric: str, found: dict[str, Any], source: dict[str, Any] | None) -> dict[str, Any]:
    scores = found["scores"].get(metric)
    difference = None
    if source is not None and scores and len(theirs := source["scores"].get(metric) or ()) == len(scores):
        away = mean_of([a - b for a, b in zip(scores, theirs, strict=True)])
        difference = {
            "mean": away.mean,
            "standard_error": away.standard_error,
            "interval": away.interval,
        }
    return {
        "value": found["metrics"][metric],
        "standard_error": mean_of(scores).standard_error if scores else None,
        "higher_is_better": found["higher_is_better"].get(metric),
        "source": None if source is None else source["metrics"].get(metric),
        "difference": difference,
    }


def _judged(
    path: str | Path, request: TaskRequest, device: str | None, progress: Progress, phase: str
) -> dict[str, Any]:
    """What the worker says of one checkpoint."""
    checkpoint, target = open_checkpoint(path), device_of(device)
    demand_agreement(checkpoint)
    runner = Runner(checkpoint, target, Simulation(checkpoint))
    job = {
        "model": str(checkpoint.path.absolute()),
        "tasks": list(request.names),
        "tasks_path": None if request.folder is None else str(request.folder.absolute()),
        "limit": request.limit,
        "few_shot": request.few_shot,
        "max_length": context_length(checkpoint.config) or _CONTEXT,
    }
    progress(Event(f"lm-eval, {phase}"))
    with tempfile.TemporaryDirectory(prefix="quant-tasks-") as folder, ExitStack() as stack:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        log = stack.enter_context((Path(folder) / "log").open("w+", encoding="utf-8", errors="replace"))
        process = stack.enter_context(
            subprocess.Popen(
                # isolated: modules beside the worker have names of the standard library
                [str(request.python or sys.executable), "-I", "-W", "ignore", str(_WORKER), str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                errors="replace",
                env=_environment(),
                cwd=folder,
            )
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            for line in process.stdout:
                said = json.loads(line)
                if "requests" in said:
                    answers = scores(runner, said["requests"], target, progress, phase)
                    process.stdin.write(json.dumps(answers) + "\n")
                    process.stdin.flush()
                elif "results" in said:
                    return dict(said["results"])
                else:
                    raise QuantError(f"--tasks {','.join(request.names)}: {_why(said)}")
        except BrokenPipeError:
            pass
        finally:
            process.kill()
            with suppress(OSError):
                process.stdin.close()
        log.seek(0)
        last = [x.strip() for x in log.read().replace("\r", "\n").splitlines() if x.strip()]
        raise QuantError(
            f"--tasks {','.join(request.names)}: lm-eval ended without a result: "
            f"{last[-1][:300] if last else 'it said nothing'}"
        )


#: What errors of the library say where a data set is not here and cannot be fetched.
_ABSENT = ("ConnectionError", "OfflineMode", "LocalEntryNotFound", "DatasetNotFound", "HfHubHTTPError",
           "FileNotFoundError", "Couldn't reach", "ConnectError")  # fmt: skip


def _why(said: dict[str, Any]) -> str:
    if "refused" in said:
        return str(said["refused"])
    text = str(said.get("failed"))
    if any(word in text for word in _ABSENT):
        return (
            f"its data set is not in the cache and cannot be fetched ({text}): fetch it where there is a "
            "network, and copy HF_HOME, or give a task with local data through --tasks-path"
        )
    return f"lm-eval failed: {text}"


def scores(
    runner: Runner,
    requests: Sequence[tuple[list[int], int]],
    device: torch.device,
    progress: Progress = silent,
    phase: str = "candidate",
) -> list[tuple[float, bool]]:
    """Of each (tokens, how many of them at the end are judged): the sum of their log-probabilities, and
    whether each is the model's likeliest.

    Raises:
        CheckpointError: tokens that the model does not have.
    """
    most = max((token for tokens, _ in requests for token in tokens), default=0)
    if most >= runner.tokens:
        raise CheckpointError(
            f"{runner.skeleton.checkpoint.path}: a task has token {most}, the model "
            f"{runner.tokens}: the tokenizer belongs to another model"
        )
    found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    for batches in _together(requests):
        tokens = [torch.tensor([requests[i][0] for i in batch]) for batch in batches]
        hidden = runner.hidden([t[:, :-1] for t in tokens], progress, phase)
        with runner.skeleton.outside(), torch.no_grad():
            ranges = columns_of([runner], tokens[0], [hidden[0]])
            for number, batch in enumerate(batches):
                counts = [requests[i][1] for i in batch]
                first = tokens[number].shape[1] - 1 - max(counts)
                part = tokens[number][:, first:]
                states = [hidden[number][..., first:, :].contiguous()]
                numbers = compared([runner], part, states, ranges, None, device)
                assert numbers.choice is not None
                right = numbers.choice == part[:, 1:]
                for row, (index, count) in enumerate(zip(batch, counts, strict=True)):
                    log = -float(numbers.nll[row, -count:].double().sum())
                    found[index] = (log, bool(right[row, -count:].all()))
                progress(Event(f"answers, {phase}", number + 1, len(batches)))
    return found


def _together(requests: Sequence[tuple[list[int], int]]) -> list[list[list[int]]]:
    """Numbers of requests in batches of one length each (nothing is padded), in groups that go through the
    blocks together."""
    by_length = defaultdict(list)
    for number, (tokens, count) in enumerate(requests):
        if count:  # an empty answer is certain
            by_length[len(tokens)].append(number)
    groups: list[list[list[int]]] = []
    room = 0
    for length, numbers in sorted(by_length.items()):
        size = max(1, _BATCH_TOKENS // length)
        for first in range(0, len(numbers), size):
            batch = numbers[first : first + size]
            if room < len(batch) * length:
                groups.append([])
                room = max(_TOGETHER, len(batch) * length)
            groups[-1].append(batch)
            room -= len(batch) * length
    return groups
