"""quant: from a Hugging Face checkpoint to a quantized model that vLLM serves.

Every command's work is a function here that returns a value. Names are imported when first used, so ``import
quant`` is free of torch.

>>> import quant
>>> recipe = quant.make_recipe({"model_path": "M", "output_path": "O", "method": "gptq"})
>>> report = quant.quantize(recipe)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

#: public name → module that defines it, with its name there where that is another
_EXPORTS: dict[str, str] = {
    "Destination": "quant.upload",
    "EngineRequest": "quant.planning.request",
    "GPTQQuantizer": "quant.quantizers",
    "Gpu": "quant.hardware",
    "HQQQuantizer": "quant.quantizers",
    "LlamaAdapter": "quant.models",
    "MemoryPlan": "quant.planning.memory",
    "MinMaxQuantizer": "quant.quantizers",
    "ModelRegistry": "quant.models",
    "ModelSpec": "quant.models.spec",
    "OutlierSuppressionRegistry": "quant.outlier_suppression",
    "QuantError": "quant.errors",
    "QuantizationManager": "quant.pipeline.manager",
    "QuantizerRegistry": "quant.quantizers",
    "QwenAdapter": "quant.models",
    "Recipe": "quant.recipe",
    "Recommendation": "quant.planning.recommendation",
    "Scheme": "quant.schemes",
    "WeightScheme": "quant.schemes",
    "detect": "quant.hardware",
    "evaluate": "quant.evaluation.quality",
    "export": "quant.pipeline.export",
    "find_model": "quant.catalog",
    "get_optimized_config": "quant.planning.recommendation",
    "inspect": "quant.evaluation.inspect",
    "make_recipe": "quant.recipe",
    "plan_job": "quant.jobs:plan",
    "quantize": "quant.jobs",
    "recommend": "quant.planning.recommendation",
    "push_to_hub": "quant.upload:upload",
    "reload": "quant.planning.recommendation",
    "resolve": "quant.jobs",
    "verify": "quant.evaluation.verify",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        module, _, attribute = _EXPORTS[name].partition(":")
        return getattr(importlib.import_module(module), attribute or name)
    raise AttributeError(f"module 'quant' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for completion and ``dir(quant)``; those not yet used are not imported."""
    return sorted({*globals(), *_EXPORTS} - {"Any", "annotations", "importlib"})
