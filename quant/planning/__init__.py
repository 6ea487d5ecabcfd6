"""What a GPU really gives a model in vLLM, and which scheme to take. Names are imported when first used."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "EngineRequest": "quant.planning.request",
    "MemoryPlan": "quant.planning.memory",
    "Recommendation": "quant.planning.recommendation",
    "checkpoint_bytes": "quant.planning.storage",
    "get_optimized_config": "quant.planning.recommendation",
    "plan": "quant.planning.memory",
    "recommend": "quant.planning.recommendation",
    "reload": "quant.planning.recommendation",
    "serve_command": "quant.planning.recommendation",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'quant.planning' has no attribute {name!r}")
