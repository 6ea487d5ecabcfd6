"""What is installed here and whether it fits together: Python and packages, GPUs and CUDA, vLLM, disk and
memory, the Hugging Face cache. Nothing heavy is imported: versions are read from what packages' installers
left."""

from __future__ import annotations

import ast
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from quant.errors import QuantError
from quant.hardware import Detection, Gpu, detect
from quant.units import format_size
from quant.vllm.releases import VLLM_VERSION, is_planned_release

#: Bytes below which memory or a disk is short for anything but small models.
_SHORT = 10 * 2**30
#: Packages that some commands work without, and what takes them.
_OPTIONAL = {"pyarrow": "calibration text in parquet", "matplotlib": "pictures as .png"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        state: ``ok``; ``note``: not here, and nothing needs it at once; ``warning``: works, not as it could;
            ``problem``: something will fail.
        found: what is there, in words.
        next: what to do about it, where something is to be done.
    """

    name: str
    state: Literal["ok", "note", "warning", "problem"]
    found: str
    next: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(
    vllm_python: str | Path | None = None,
    detection: Detection | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Finding]:
    """Looks at everything.

    Args:
        vllm_python: Python of the environment with vLLM; None: the variable QUANT_VLLM_PYTHON, or this one.
        detection: the GPUs, :func:`quant.hardware.detect` unless a test brings its own.
        environment: ``os.environ`` unless given.
    """
    environment = os.environ if environment is None else environment
    detection = detect() if detection is None else detection
    return [
        Finding("python", "ok", f"{sys.version.split()[0]} at {sys.executable}"),
        *_packages(),
        *_optional(),
        _torch(detection.gpus),
        *_gpus(detection),
        _vllm(vllm_python),
        *_room(detection),
        *_hub(environment),
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    """What this package requires, against what is installed."""
    try:
        required = requires("quant") or []
    except PackageNotFoundError:
        return [
            Finding(
                "quant",
                "note",
                "runs from a folder and is not installed, so what it requires is not checked",
                "pip install . in that folder puts quant and quant-deploy on the path",
            )
        ]
    from packaging.requirements import Requirement

    wrong, right = [], []
    for text in required:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        if installed is None:
            wrong.append((f"{requirement.name} is missing", text))
        elif not requirement.specifier.contains(installed, prereleases=True):
            wrong.append((f"{requirement.name} is {installed}, {requirement.specifier} is needed", text))
        else:
            right.append(f"{requirement.name} {installed}")
    if not wrong:
        return [Finding("packages", "ok", ", ".join(right))]
    names = " ".join(repr(text.partition(";")[0].strip()) for _, text in wrong)
    return [Finding("packages", "problem", "; ".join(w for w, _ in wrong), f"pip install {names}")]


def _optional() -> list[Finding]:
    missing = [f"{name} ({use})" for name, use in _OPTIONAL.items() if _version(name) is None]
    if not missing:
        return []
    return [Finding("extras", "note", f"not installed: {', '.join(missing)}", "pip install what you need")]


def _torch_build() -> tuple[str | None, str | None, str | None]:
    """torch's version, and the CUDA and ROCm releases that it was built with; read from its own file, since
    importing it takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None, None, None
    stated: dict[str, str | None] = {}
    try:
        tree = ast.parse((Path(spec.origin).parent / "version.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return _version("torch"), None, None
    for node in tree.body:
        target: ast.expr | None = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(node, ast.Assign):
            target = node.targets[0]
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
            stated[target.id] = None if value.value is None else str(value.value)
    return _version("torch") or stated.get("__version__"), stated.get("cuda"), stated.get("hip")


def _torch(gpus: tuple[Gpu, ...]) -> Finding:
    installed, cuda, hip = _torch_build()
    if installed is None:
        return Finding("torch", "problem", "not installed", "pip install torch")
    built = f"for CUDA {cuda}" if cuda else f"for ROCm {hip}" if hip else "for CPUs alone"
    words = f"{installed}, built {built}"
    if not gpus:
        return Finding("torch", "ok", words)
    if not cuda:
        return Finding(
            "torch",
            "warning",
            f"{words}, while NVIDIA GPUs are here ({len(gpus)}): jobs would run on the CPU",
            "install the CUDA build of torch (pytorch.org/get-started names the command)",
        )
    driver = _driver_cuda()
    if driver is not None and driver[0] < int(cuda.partition(".")[0]):
        return Finding(
            "torch",
            "problem",
            f"{words}, but the driver ({gpus[0].driver}) supports CUDA up to {driver[0]}.{driver[1]}",
            f"update the NVIDIA driver, or install a torch built for CUDA {driver[0]}",
        )
    return Finding("torch", "ok", words)


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA release that the driver supports."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            number = int(pynvml.nvmlSystemGetCudaDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # a look that fails tells nothing
        return None
    return number // 1000, number % 1000 // 10


def _gpus(detection: Detection) -> list[Finding]:
    if not detection.gpus:
        note = detection.note or "no GPU"
        return [
            Finding(
                "gpu",
                "note",
                note,
                "plan for one that is elsewhere with --gpu NAME (quant list gpus); quantizing works on CPUs",
            )
        ]
    findings = []
    for gpu in detection.gpus:
        warnings = gpu.health.warnings() if gpu.health is not None else []
        words = (
            f"{gpu.name}, {format_size(gpu.free_bytes)} of {format_size(gpu.total_bytes)} free, driver "
            f"{gpu.driver or 'unknown'}"
        )
        findings.append(
            Finding(f"gpu {gpu.index}", "warning" if warnings else "ok", "; ".join([words, *warnings]))
        )
    return findings


def _vllm(python: str | Path | None) -> Finding:
    from quant.serving.installation import PYTHON_VARIABLE, ServerError, default_python, find_vllm

    chosen = str(python or default_python())
    try:
        installation = find_vllm(chosen)
    except ServerError:
        return Finding(
            "vllm",
            "note",
            f"not in the environment of {chosen}",
            f"pip install 'vllm>={VLLM_VERSION}' in an environment of its own, and name its Python: export "
            f"{PYTHON_VARIABLE}=/path/to/bin/python, or --vllm-python",
        )
    except QuantError as error:
        return Finding("vllm", "problem", str(error), f"set {PYTHON_VARIABLE} or --vllm-python to it")
    installed = installation.version
    words = f"{installed} in the environment of {chosen}"
    if is_planned_release(installed):
        return Finding("vllm", "ok", words)
    return Finding(
        "vllm",
        "warning",
        f"{words}; plans and checks are for {VLLM_VERSION} unless told otherwise",
        f"name it: --vllm-version {'.'.join(installed.partition('+')[0].split('.')[:2])}",
    )


def _room(detection: Detection) -> list[Finding]:
    host = detection.host
    words = f"{format_size(host.ram_available_bytes)} of {format_size(host.ram_total_bytes)} free"
    findings = [Finding("memory", "ok" if host.ram_available_bytes >= _SHORT else "warning", words)]
    places = {"disk here": Path.cwd(), "disk for temporary files": Path(tempfile.gettempdir())}
    for name, place in places.items():
        free = shutil.disk_usage(place).free
        if not os.access(place, os.W_OK):
            findings.append(
                Finding(
                    name,
                    "warning",
                    f"{place}: cannot be written to",
                    "give an --output-path elsewhere, or set TMPDIR",
                )
            )
            continue
        findings.append(
            Finding(
                name,
                "ok" if free >= _SHORT else "warning",
                f"{place}: {format_size(free)} free",
                "" if free >= _SHORT else "an 8B model and its 4-bit copy take 22 GB",
            )
        )
    return findings


def _hub(environment: Mapping[str, str]) -> list[Finding]:
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE)
    models = sorted(place.glob("models--*")) if place.is_dir() else []
    above = place
    while not above.exists():
        above = above.parent
    findings = [
        Finding(
            "hub cache",
            "ok",
            f"{place}: {f'{len(models)} models' if len(models) != 1 else '1 model'}, "
            f"{format_size(shutil.disk_usage(above).free)} free"
            + ("" if place.is_dir() else "; the folder is made with the first download"),
        )
    ]
    if _truth(environment.get("HF_HUB_OFFLINE")) or _truth(environment.get("TRANSFORMERS_OFFLINE")):
        findings.append(
            Finding("hub", "note", "offline by HF_HUB_OFFLINE: models by Hub id come from the cache alone")
        )
    return findings


def _truth(value: str | None) -> bool:
    """As huggingface_hub reads a variable."""
    return (value or "").upper() in {"1", "ON", "YES", "TRUE"}
