"""What there is to choose from: schemes, methods, formats, models, GPUs, scenarios."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from quant import defaults
from quant.errors import one_of

if TYPE_CHECKING:
    from quant.formats import Format

#: One thing of a list: ``name``, ``about``, and facts of its kind.
Item = dict[str, Any]


def _schemes() -> list[Item]:
    from quant.schemes import SchemeRegistry

    return [
        {
            "name": row.name,
            "about": row.title or str(row.scheme).partition(" (")[2].rstrip(")"),
            "weight_bits": row.scheme.weights.bits,
            "activation_bits": row.scheme.activations.bits if row.scheme.activations else 16,
            "methods": list(row.methods),
            "needs": dict(row.needs),
            "suits": dict(row.suits),
            "recommended": row.rank is not None,
            "vllm": bool(row.methods),
        }
        for row in SchemeRegistry
    ]


def _methods() -> list[Item]:
    from importlib.metadata import entry_points

    own = [
        {
            "name": name,
            "about": row.about,
            "calibration": row.calibration,
            "source": row.source,
            "scheme": _scheme_of(name),
        }
        for name, row in defaults.METHODS.items()
    ]
    # what other packages declare is named, and imported when a job asks for it
    return own + [
        {"name": p.name, "about": f"of {p.value}", "calibration": None, "source": None, "scheme": None}
        for p in entry_points(group="quant.quantizers")
    ]


def _scheme_of(method: str) -> str:
    from quant.schemes import default_scheme

    return "none" if method in defaults.UNROUNDED else default_scheme(method)


def _formats() -> list[Item]:
    import sys

    from quant.formats import FormatRegistry

    def about(form: Format) -> str:
        """The first sentence that its class or its module says of it, without its name in front."""
        texts = (type(form).__doc__, sys.modules[type(form).__module__].__doc__)
        text = " ".join(next((t for t in texts if t), "").replace("`", "").split())
        return re.split(r"\.(?:\s|$)", text.removeprefix(f"{form.name}: "))[0]

    return [
        {
            "name": form.name,
            "about": about(form),
            "quant_method": form.quant_method,
            "kv_cache_scales": form.kv_cache,
        }
        for form in FormatRegistry
    ]


def _models() -> list[Item]:
    from quant.catalog import catalogue
    from quant.vllm.config import block_count
    from quant.vllm.context import context_length

    return [
        {
            "name": name,
            "about": "",
            "type": row["config"].get("model_type"),
            "layers": block_count(row["config"]),
            "context": context_length(row["config"]),
            "source": row["source"],
        }
        for name, row in sorted(catalogue().items(), key=lambda pair: pair[0].lower())
    ]


def _gpus() -> list[Item]:
    from quant.hardware import gpu_names, named_gpu
    from quant.vllm.kernels import formats_of

    return [
        {
            "name": gpu.name,
            "about": "",
            "memory_bytes": gpu.total_bytes,
            "capability": ".".join(map(str, gpu.capability)) if gpu.capability else gpu.architecture,
            "bandwidth_bytes_per_second": gpu.bandwidth,
            "native": [number for number, state in formats_of(gpu).items() if state == "native"],
            "kind": gpu.kind,
        }
        for gpu in map(named_gpu, gpu_names())
    ]


def _scenarios() -> list[Item]:
    from quant.planning.scenarios import load_scenario, scenario_names

    return [
        {
            "name": profile.name,
            "about": profile.title,
            "objective": profile.objective,
            "defaults": dict(profile.defaults),
        }
        for profile in map(load_scenario, scenario_names(profiles=True))
    ]


def _engines() -> list[Item]:
    from quant.engines import ENGINES

    def level(capability: tuple[int, int] | None) -> str | None:
        return ".".join(map(str, capability)) if capability else None

    return [
        {
            "name": engine.name,
            "about": engine.about,
            "release": engine.release,
            "images": engine.published,
            "reads": [
                {
                    "format": read.format,
                    "schemes": list(read.schemes),
                    "capability": level(read.least),
                    "until": level(read.end),
                    "platforms": list(read.platforms),
                }
                for read in engine.reads
            ]
            or [
                {
                    "format": engine.otherwise,
                    "schemes": [],
                    "capability": None,
                    "until": None,
                    "platforms": list(engine.images),
                }
            ],
        }
        for engine in ENGINES.values()
    ]


#: Kind → what it lists, and what takes one.
KINDS: dict[str, tuple[Callable[[], list[Item]], str]] = {
    "schemes": (_schemes, "numbers that weights and inputs become: quantize and recommend --scheme"),
    "methods": (_methods, "how weights are rounded: quantize --method"),
    "formats": (_formats, "how the result is stored: quantize and export-vllm --format"),
    "models": (_models, "known by name: recommend --model"),
    "gpus": (_gpus, "known by name: detect, recommend and quantize --gpu"),
    "scenarios": (_scenarios, "uses and their engine arguments: recommend --scenario"),
    "engines": (_engines, "what serves, and what each reads: quant-deploy plan --engine"),
}


def listing(kind: str, pattern: str = "") -> list[Item]:
    """The things of one kind, without importing torch.

    Args:
        kind: a key of :data:`KINDS`.
        pattern: part of the name that begins a word of it, or any part where none does, whatever the case and
            the marks between; those whose names lack it are left out.

    Raises:
        UsageError: no such kind.

    >>> [x["name"] for x in listing("formats", "PL")]
    ['plain']
    >>> [x["name"] for x in listing("gpus", "l4")]
    ['L4', 'L40', 'L40S-48GB']
    """
    if kind not in KINDS:
        raise one_of("kind", kind, list(KINDS))
    items = KINDS[kind][0]()
    found = [item for item in items if _begins(pattern, item["name"])]
    return found or [item for item in items if _plain(pattern) in _plain(item["name"])]


def _begins(pattern: str, name: str) -> bool:
    """Whether a word of a name, or a number in it, begins so: ``L4`` is not in ``Blackwell-48``."""
    words = [m.start() for m in re.finditer(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)]
    return any(_plain(name[start:]).startswith(_plain(pattern)) for start in words)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
