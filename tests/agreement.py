"""What a recommendation prints, tried in this process on header-only stand-ins: a test takes the smallest
model of each architecture, a program the whole catalogue."""

from __future__ import annotations

import contextlib
import io
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import psutil

import quantize
from quant import jobs
from quant.catalog import catalogue, find_model, stored_bytes
from quant.commands.terminal import Outcome
from quant.errors import QuantError
from quant.evaluation.values import Values
from quant.models.support import DATA_FREE
from quant.pipeline.plan import JobPlan
from quant.pipeline.writing import output_config
from quant.planning.recommendation import Recommendation
from quant.serving.deployment import DeploymentRequest, plan
from tests.stand_ins import write_files

GPUS = ("RTX 4090", "L40S", "A100-80GB", "H100-80GB", "B200", "MI300X")
#: Share by which the bytes that were planned from a config may differ from those of the job: shapes that a
#: config leaves unsaid, and small tensors without a role.
BYTES = 0.02
_ENOUGH = 1 << 60


def architectures() -> dict[str, list[str]]:
    """Models of the catalogue by what decides how they are handled: their model types, whether they are
    quantized, and what their files spell; the smallest first."""
    alike: dict[str, list[str]] = {}
    for name in sorted(catalogue(), key=lambda n: stored_bytes(find_model(n))):
        config = catalogue()[name]["config"]
        text = config.get("text_config") or config.get("thinker_config") or {}
        quantization = config.get("quantization_config") or text.get("quantization_config") or {}
        parts = (config.get("model_type"), text.get("model_type"), quantization.get("quant_method"))
        alike.setdefault("-".join(str(p) for p in parts if p) or "none", []).append(name)
    return alike


@contextlib.contextmanager
def room_for_everything(seconds: float | None = None) -> Iterator[None]:
    """While it lasts, disk and memory hold any model, and no value of a checkpoint is looked at: its files
    have none. With ``seconds`` no trial takes longer."""
    memory = psutil.virtual_memory()._replace(total=_ENOUGH, available=_ENOUGH)
    usage = shutil.disk_usage("/")._replace(total=_ENOUGH, free=_ENOUGH)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(patch("psutil.virtual_memory", lambda: memory))
        enter(patch("shutil.disk_usage", lambda path: usage))
        enter(patch("quant.evaluation.verify.scan_values", lambda *_, **__: Values([], frozenset(), "")))
        if seconds is not None:
            enter(patch("quant.pipeline.estimate.TRIAL_SECONDS", seconds))
            enter(patch("quant.pipeline.estimate._TRIED", 1 << 18))
            enter(patch("quant.pipeline.counted._OUTPUTS", 16))
            enter(patch("quant.pipeline.counted._INPUTS", (128, 256)))
            enter(patch("quant.pipeline.counted._SIDE", 256))
            enter(patch("quant.pipeline.counted._STEPPED", (16, 128)))
        yield


def key(command: str) -> str:
    """What of a printed command decides whether it runs, the model aside."""
    words = shlex.split(command)
    return shlex.join(w for pair in _pairs(words) if pair[0] not in ("--model-path", "--output-path")
                      for w in pair)  # fmt: skip


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    return list(zip(words[2::2], words[3::2], strict=True))


def dry_run(command: str, source: Path) -> JobPlan:
    """``quant quantize`` as it was printed, of another source, as a dry run; of calibration text a little.

    Raises:
        QuantError, click.ClickException: what the command says.
    """
    words = shlex.split(command)
    options = dict(_pairs(words)) | {"--model-path": str(source)}
    del options["--output-path"]
    more = ["--dry-run", "--json"]
    if options.get("--method") not in DATA_FREE:
        more += ["--samples", "2", "--sequence-length", "16"]
    arguments = [words[1], *(w for pair in options.items() for w in pair), *more]
    plans: list[JobPlan] = []

    def planned(recipe: Any) -> JobPlan:
        plans.append(_plan(recipe))
        return plans[-1]

    with patch.object(jobs, "plan", planned), contextlib.redirect_stdout(io.StringIO()):
        quantize.cli.main(arguments, standalone_mode=False, obj=Outcome(("quant", *arguments)))
    return plans[0]


_plan = jobs.plan


def written(job: JobPlan, folder: Path) -> Path:
    """A stand-in of what a job writes."""
    tensors = (t.spec for unit in job.units for shard in unit.shards for t in shard.tensors)
    return write_files(output_config(job, {}), tensors, folder)


def serve_problems(command: str, checkpoint: Path, gpu: str) -> list[str]:
    """What ``quant-deploy plan`` has against a printed ``vllm serve`` of a checkpoint; empty where it is
    taken."""
    words = shlex.split(command)[3:]
    given: dict[str, str] = {}
    extra: list[str] = []
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            value = "" if following.startswith("--") else following
            given[word] = value
    own: Mapping[str, Any] = {
        "--tensor-parallel-size": ("tensor_parallel", int),
        "--max-model-len": ("max_model_len", int),
        "--gpu-memory-utilization": ("gpu_memory_utilization", float),
    }
    request = DeploymentRequest(gpu=gpu)
    for flag, value in given.items():
        if flag in own:
            request = replace(request, **{own[flag][0]: own[flag][1](value)})
        else:
            extra += [flag, value] if value else [flag]
    try:
        deployed = plan(checkpoint, replace(request, extra=tuple(extra)))
    except QuantError as error:
        return [str(error)]
    return list(deployed.warnings)


def disagreements(
    recommendation: Recommendation,
    gpu: str,
    source: Path,
    scratch: Path,
    jobs_done: dict[str, Any],
    sizes: bool = True,
) -> list[str]:
    """What fails of a recommendation's commands.

    Args:
        source: a stand-in of the model.
        scratch: where the job's output is put, as a stand-in.
        jobs_done: by command, of this model, what came of it: a folder, or why none did. Commands that were
            tried are not tried again.
        sizes: whether planned bytes are compared: not of models of which the catalogue knows a part.
    """
    served = source
    problems = []
    for command in recommendation.commands:
        if command.startswith("quant "):
            done = key(command)
            if done not in jobs_done:
                try:
                    job = dry_run(command, source)
                    jobs_done[done] = written(job, scratch / str(len(jobs_done))), job.output_bytes
                except (QuantError, click.ClickException) as error:
                    jobs_done[done] = str(error)
            if isinstance(jobs_done[done], str):
                return [f"{command}: {jobs_done[done]}"]
            served, size = jobs_done[done]
            planned = next(p for p in recommendation.plans if p.scheme == recommendation.recommended)
            if sizes and abs(planned.checkpoint_bytes / size - 1) > BYTES:
                problems.append(
                    f"{command}: {planned.checkpoint_bytes} bytes are planned, the job has {size}"
                )
        elif command.startswith("vllm "):
            problems += [f"{command}: {p}" for p in serve_problems(command, served, gpu)]
    return problems
