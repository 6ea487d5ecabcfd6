"""quant: from a Hugging Face checkpoint to a quantized model that vLLM serves.

Every command's work is a function here that returns a value. Names are imported when first used, so ``import quant`` is free of torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

#: public name → module that defines it
_EXPORTS: dict[str, str] = {
    "EngineRequest": "quant.planning.memory",
    "Gpu": "quant.hardware",
    "MemoryPlan": "quant.planning.memory",
    "ModelSpec": "quant.architectures",
    "QuantError": "quant.errors",
    "Scheme": "quant.schemes",
    "Recommendation": "quant.planning.recommendation",
    "WeightScheme": "quant.schemes",
    "detect": "quant.hardware",
    "find_model": "quant.catalog",
    "get_optimized_config": "quant.planning.recommendation",
    "recommend": "quant.planning.recommendation",
    "reload": "quant.planning.recommendation",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'quant' has no attribute {name!r}")
