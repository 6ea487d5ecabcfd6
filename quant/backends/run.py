"""One job by a legacy backend: the library in its child process, then everything that follows a quantization
here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant.backends import BACKENDS, Backend
from quant.calibration.text import Rows
from quant.checkpoint.reader import Checkpoint
from quant.errors import Problems, QuantError
from quant.evaluation.compare import compare
from quant.evaluation.layers import output_errors
from quant.pipeline.export import export
from quant.pipeline.plan import JobPlan, plan_job
from quant.pipeline.rows import job_rows, tell_notes
from quant.progress import Event, Progress, silent
from quant.recipe import Recipe
from quant.report.value import NOT_HELD_OUT, LayerResult, Quantization, Report, TensorsAccount

_PROBE = """
import importlib, json, sys
found = {}
try:
    found["module"] = getattr(importlib.import_module(sys.argv[1]), "__version__", "unknown")
    import torch
    found["cuda"] = torch.cuda.is_available()
except BaseException as error:
    found["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
print(json.dumps(found))
"""


def probe(backend: Backend, python: Path) -> list[str]:
    """Why a backend cannot run with a Python, or nothing."""
    how = (
        f"{backend.name} {backend.version} is archived upstream since {backend.archived} and needs an "
        "environment of its own: "
        f"make one with `python -m quant.backends.environment {backend.name} DIR` and give --backend-python "
        "DIR/bin/python; "
        f"--backend native --method {backend.method} needs neither"
    )
    try:
        done = subprocess.run(
            [str(python), "-W", "ignore", "-c", _PROBE, backend.module],
            capture_output=True,
            text=True,
            env=_environment(),
            timeout=600,
        )
        versions = json.loads(done.stdout.splitlines()[-1])
        if not isinstance(versions, dict) or not versions.keys() & {"error", "cuda"}:
            raise ValueError(f"it said {str(versions)[:60]!r}")
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        return [
            f"--backend-python {python}: is not a Python that runs "
            f"({str(error)[:120] or type(error).__name__}). {how}"
        ]
    if "error" in versions:
        return [
            f"--backend {backend.name}: {backend.module} cannot be imported by {python} "
            f"({versions['error']}). {how}"
        ]
    if backend.needs_cuda and not versions["cuda"]:
        return [
            f"--backend {backend.name}: the library quantizes only on a CUDA GPU, and {python} sees none: "
            "run it on a machine with one, "
            f"or use --backend native --method {backend.method}, which runs on a CPU too"
        ]
    return []


def legacy_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that transformers 4 reads as transformers 5 reads ``config``: the rotary embedding and
    the dtype under their old keys.

    transformers 4 passes over ``rope_parameters`` without a word and takes a base of 10000 instead.

    Raises:
        QuantError: rotary embeddings by kind of layer, which the old keys have no place for.
    """
    old = dict(config)
    if (dtype := config.get("dtype")) and "torch_dtype" not in old:
        old["torch_dtype"] = dtype
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping):
        if any(isinstance(v, Mapping) for v in rope.values()):
            raise QuantError(
                "config.json: rope_parameters differ by kind of layer, which the transformers 4 of legacy "
                "backends has no place for: use --backend native"
            )
        if "rope_theta" in rope:
            old["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            old["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return old


def problems(recipe: Recipe) -> list[str]:
    """Everything about a recipe that its backend cannot do, the environment included."""
    backend = BACKENDS[recipe.backend]
    return [*backend.problems(recipe), *probe(backend, recipe.backend_python or Path(sys.executable))]


def plan_backend(recipe: Recipe) -> JobPlan:
    """:func:`quant.pipeline.plan.plan_job` with what the backend has against the job.

    Raises:
        Problems, QuantError: everything that is wrong, listed together.
    """
    against = problems(recipe)
    if recipe.method != BACKENDS[recipe.backend].method:
        raise Problems(against, exit_code=2)
    try:
        # settings of the library are not those of our method of that name
        plan = replace(
            plan_job(recipe.model_copy(update={"options": {}, "damping": None, "act_order": None})),
            recipe=recipe,
        )
        legacy_config(plan.checkpoint.config)
    except QuantError as error:
        more = error.problems if isinstance(error, Problems) else [str(error)]
        raise Problems([*against, *more], exit_code=2 if against else error.exit_code) from error
    if against:
        raise Problems(against, exit_code=2)
    return plan


def quantize_with(plan: JobPlan, progress: Progress = silent, command: Sequence[str] | None = None) -> Report:
    """Runs a planned job with its backend; returns the report that is also written as ``quant_report.json``.

    The library's own checkpoint is made in a folder beside the target that is removed again; what is
    published has the source's side files and config.json. A layer's ``error`` is the relative error of its
    output on a held-out row when its block is given the source's own inputs: the library may have moved
    scales from one layer into another, so weights cannot be compared one by one.

    Raises:
        QuantError: the library failed, with its last words; or what it wrote cannot be read or loaded.
    """
    recipe = plan.recipe
    backend, start = BACKENDS[recipe.backend], time.perf_counter()
    python = recipe.backend_python or Path(sys.executable)
    rows = job_rows(plan)
    tell_notes(rows, progress)
    with _beside(recipe.output_path) as folder:
        source = _legacy_source(plan.checkpoint, folder / "source")
        made = folder / "made"
        job = {
            "model": str(source),
            "output": str(made),
            "settings": backend.settings(recipe),
            "rows": rows.tokens.tolist(),
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        progress(
            Event(
                "quantize",
                message=f"{backend.name} {backend.version} in {python}; its library is archived upstream",
            )
        )
        said = _run(python, backend, folder / "job.json")
        _weights_alone(made)
        produced = time.perf_counter() - start
        quantization = _quantization(plan, backend, rows, made, python, said)
        seconds = {backend.name: round(said["seconds"], 3), "quantize": round(produced, 3)}
        return export(
            made, recipe.output_path, recipe.format, source=plan.checkpoint.path,
            tensor_parallel=recipe.tensor_parallel, target=recipe.target,
            progress=progress, quantization=quantization, seconds=seconds, command=command,
        )  # fmt: skip


def _quantization(
    plan: JobPlan, backend: Backend, rows: Rows, made: Path, python: Path, said: Mapping[str, Any]
) -> Quantization:
    """What the report says of the library's checkpoint ``made``; ``said``: the worker's last line."""
    recipe = plan.recipe
    errors: Mapping[str, float] = {}
    if rows.held_out is not None:
        errors = output_errors(made, plan.checkpoint.path, rows.held_out[:1], scaled=backend.method == "awq")
    compared = compare(made, plan.checkpoint.path).tensors
    ratios: Mapping[str, float | None] = {}
    if backend.method == "gptq":  # nothing was scaled: weights are comparable
        ratios = {t.name.removesuffix(".weight"): t.snr_db for t in compared}
    rest = [t for t in compared if t.name.removesuffix(".weight") not in plan.linears]
    return Quantization(
        method=recipe.method,
        methods=(recipe.method,),
        scheme=plan.scheme_dict(),
        target=recipe.target,
        settings=recipe.settings(),
        bits_per_weight=plan.bits_per_weight,
        calibration=rows.to_dict(),
        layers=tuple(
            LayerResult(
                name=name,
                method=backend.method,
                scheme=str(linear.scheme),
                error=errors.get(name),
                error_missing=None if name in errors else NOT_HELD_OUT,
                snr_db=None if (ratio := ratios.get(name)) is None else round(float(ratio), 2),
                tokens=rows.tokens.numel(),
            )
            for name, linear in plan.linears.items()
        ),
        tensors=TensorsAccount(
            quantized=tuple(f"{n}.weight" for n in plan.linears),
            copied=tuple(t.name for t in rest if t.equal),
            folded=tuple(t.name for t in rest if not t.equal),
        ),
        unquantized_linears=tuple(plan.unquantized),
        plain_in_vllm=plan.plain,
        backend={
            "name": backend.name,
            "python": str(python),
            **said["versions"],
            "archived": backend.archived,
            "notes": said["notes"],
        },
    )


def _environment() -> dict[str, str]:
    """A child's environment: without this package's paths, without a network."""
    own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return own | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A folder on the target's disk that is gone afterwards."""
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{output.name}.backend-", dir=output.absolute().parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _legacy_source(checkpoint: Checkpoint, folder: Path) -> Path:
    """The source under another roof: links to its files, and a config.json that transformers 4
    understands."""
    folder.mkdir()
    for file in checkpoint.path.iterdir():
        if file.is_file() and file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    (folder / "config.json").write_text(
        json.dumps(legacy_config(checkpoint.config), indent=2), encoding="utf-8"
    )
    return folder


def _weights_alone(made: Path) -> None:
    """Leaves the library's weights and what describes them: tokenizers and generation settings come from the
    source, byte for byte."""
    kept = {"config.json", "quantize_config.json", "quant_config.json"}
    for file in made.iterdir():
        if file.is_file() and file.name not in kept and ".safetensors" not in file.name:
            file.unlink()


def _run(python: Path, backend: Backend, job: Path) -> dict[str, Any]:
    """Runs the worker to its end; what it prints beside its result is kept for the error.

    Raises:
        QuantError: it failed.
    """
    log = job.with_suffix(".log")
    with log.open("w+", encoding="utf-8", errors="replace") as errors:
        command = [str(python), "-W", "ignore", str(backend.worker), str(job)]
        result: dict[str, Any] | None = None
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
            env=_environment(),
            cwd=job.parent,
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if line.startswith('{"versions"'):
                        with suppress(ValueError):  # half a line of a library that died
                            result = json.loads(line)
            except BaseException:
                process.kill()
                raise
        if process.returncode or result is None or not (job.parent / "made" / "config.json").is_file():
            errors.seek(0)
            last = [x.strip() for x in errors.read().replace("\r", "\n").splitlines() if x.strip()]
            raise QuantError(
                f"--backend {backend.name}: the library failed (status {process.returncode}): "
                f"{last[-1][:300] if last else 'it said nothing'}. "
                f"It is archived and will not be mended: use --backend native --method {backend.method}"
            )
    return result
