"""A deployment as a file that runs it elsewhere. No torch."""

from __future__ import annotations

import math
import re
from importlib import import_module
from typing import TYPE_CHECKING

from quant.errors import UsageError, one_of
from quant.serving.artefacts.base import Placement

if TYPE_CHECKING:
    from quant.serving.deployment import Deployment

__all__ = ["KINDS", "Placement", "artefact"]

#: Kind → the module that writes it, by a function of that name; each is imported when it is first asked for.
_HOMES = {
    "shell": "local",
    "compose": "local",
    "systemd": "local",
    "kubernetes": "kubernetes",
    "leaderworkerset": "stacks",
    "kserve": "stacks",
    "ray-serve": "ray",
    "ray-service": "ray",
    "production-stack": "stacks",
    "monitoring": "monitoring",
    "alerts": "monitoring",
    "dashboard": "monitoring",
    "modelfile": "ollama",
}
KINDS = tuple(_HOMES)
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
#: What of a placement only some kinds have a use for.
_CLUSTER = ("kubernetes", "leaderworkerset", "kserve", "ray-service", "production-stack")
_TAKES = {
    "--claim": _CLUSTER,
    "--claim-path": _CLUSTER,
    "--nodes": ("leaderworkerset", "ray-service"),
    "--price-per-hour": ("dashboard", "monitoring"),
}


def artefact(deployment: Deployment, kind: str, placement: Placement | None = None) -> str:
    """The text of one artefact; ``kind`` is one of :data:`KINDS`.

    Raises:
        UsageError: an unknown kind, one that the engine has not, or one that lacks what it takes of
            ``placement``.
    """
    if kind not in KINDS:
        raise one_of("--output", kind, KINDS)
    known = deployment.engine.kinds
    if kind == "modelfile" and kind not in (known or ()):
        raise UsageError(f"--output {kind} is of Ollama alone, not of {deployment.engine.title}")
    if known is not None and kind not in known:
        raise UsageError(
            f"--output {kind} is of vLLM alone: for {deployment.engine.title} there are {', '.join(known)}"
        )
    placement = placement or Placement()
    given = {
        "--claim": placement.claim is not None,
        "--claim-path": bool(placement.path),
        "--nodes": placement.nodes > 1,
        "--price-per-hour": placement.price is not None,
    }
    for option, kinds in _TAKES.items():
        if given[option] and kind not in kinds:
            raise UsageError(f"{option} has no use in --output {kind}: it is for {', '.join(kinds)}")
    if placement.claim is not None and not _NAME.fullmatch(placement.claim):
        raise UsageError(
            f"--claim is {placement.claim!r}: Kubernetes names are small letters, digits, dashes and dots"
        )
    if ".." in placement.path.split("/"):
        raise UsageError(f"--claim-path is {placement.path!r}: a path inside the claim is needed, without ..")
    if placement.price is not None and not math.isfinite(placement.price):
        raise UsageError(f"--price-per-hour is {placement.price}: a sum of money is needed")
    if placement.path and placement.claim is None:
        raise UsageError("--claim-path is where in a claim the checkpoint lies: give --claim NAME too")
    home = import_module(f"quant.serving.artefacts.{_HOMES[kind]}")
    text: str = getattr(home, kind.replace("-", "_"))(deployment, placement)
    return text
