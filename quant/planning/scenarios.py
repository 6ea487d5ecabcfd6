"""Scenario profiles: what a use asks of a server, from ``configs/scenarios/*.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from quant.data import config_path
from quant.errors import UsageError, one_of
from quant.models.spec import ModelSpec
from quant.planning.request import EngineRequest

#: model sizes that a scenario tells apart, by parameters: small below 8e9, large from 34e9
SIZES = ((8e9, "small"), (34e9, "medium"), (float("inf"), "large"))


@dataclass(frozen=True)
class Scenario:
    """One use. ``objective``: ``quality`` takes the most precise scheme that fits, ``throughput`` and
    ``latency`` the fastest one whose expected loss stays within ``max_loss_percent``. ``defaults`` are engine
    arguments, ``sizes`` those that differ by the model's size."""

    name: str
    title: str
    objective: str = "quality"
    max_loss_percent: float = 4.0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: a profile for one model and GPU: what it is checked with
    example: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def request(self, spec: ModelSpec, given: EngineRequest) -> EngineRequest:
        """The request with the scenario's arguments where the user gave none."""
        size = next(name for limit, name in SIZES if spec.parameters < limit)
        wanted = {**self.defaults, **self.sizes.get(size, {})}
        blank = EngineRequest()
        changes = {k: v for k, v in wanted.items() if getattr(given, k) == getattr(blank, k)}
        if "context" in changes:
            changes["context"] = min(changes["context"], spec.max_context)
        if given.max_num_seqs is not None and "concurrency" in changes:
            changes["concurrency"] = min(changes["concurrency"], given.max_num_seqs)
        return replace(given, **changes)


def scenario_names(profiles: bool = False) -> list[str]:
    """The scenarios of ``--scenario``; with ``profiles`` also the worked profiles of one GPU."""
    folder = config_path("scenarios")
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    return [n for n in names if profiles or not n.startswith("l40s-")]


def load_scenario(name: str) -> Scenario:
    """A scenario by name.

    Raises:
        UsageError: no such scenario, or a file with keys that nothing reads.
    """
    known = scenario_names(profiles=True)
    if name not in known:
        raise one_of("--scenario", name, known)
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    path = config_path(f"scenarios/{name}.yaml")
    raw = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    allowed = {f.name for f in fields(Scenario)} - {"name"}
    arguments = {f.name for f in fields(EngineRequest)}
    unknown = [k for k in raw if k not in allowed]
    for part in (raw.get("defaults") or {}, *(raw.get("sizes") or {}).values()):
        unknown += [k for k in part if k not in arguments]
    if unknown:
        raise UsageError(
            f"{path}: {', '.join(unknown)}: no such key; known: {', '.join(sorted(allowed | arguments))}"
        )
    return Scenario(name=name, **raw)
