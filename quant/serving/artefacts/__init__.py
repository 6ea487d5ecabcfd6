"""A deployment as a file that runs it elsewhere. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from quant.errors import one_of
from quant.serving.artefacts.base import Placement
from quant.serving.artefacts.kubernetes import (
    kserve,
    kubernetes,
    leaderworkerset,
    production_stack,
    ray_serve,
)
from quant.serving.artefacts.local import compose, shell, systemd
from quant.serving.artefacts.monitoring import alerts, dashboard, monitoring
from quant.serving.deployment import Deployment

ARTEFACTS: Mapping[str, Callable[[Deployment, Placement], str]] = {
    "shell": shell,
    "compose": compose,
    "systemd": systemd,
    "kubernetes": kubernetes,
    "leaderworkerset": leaderworkerset,
    "kserve": kserve,
    "ray-serve": ray_serve,
    "production-stack": production_stack,
    "monitoring": monitoring,
    "alerts": alerts,
    "dashboard": dashboard,
}


def artefact(deployment: Deployment, kind: str, placement: Placement | None = None) -> str:
    """The text of one artefact; ``kind`` is a key of :data:`ARTEFACTS`.

    Raises:
        UsageError: an unknown kind, or one that lacks what it takes of ``placement``.
    """
    if kind not in ARTEFACTS:
        raise one_of("--output", kind, list(ARTEFACTS))
    return ARTEFACTS[kind](deployment, placement or Placement())
