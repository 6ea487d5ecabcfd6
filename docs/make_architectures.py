#!/usr/bin/env python3
"""Writes quant/vllm/architectures.json: the model classes that a release of vLLM has, and those that it runs
through transformers. Run with the Python of an environment that has that release:

    ENVIRONMENT/bin/python docs/make_architectures.py            writes the table
    ENVIRONMENT/bin/python docs/make_architectures.py --check    fails where it is not what vLLM says

vLLM looks a config's ``architectures`` up in its registry (`models/registry.py::_ModelRegistry`); of a class
that is not there it asks transformers whether its attention can be replaced
(`_ModelRegistry._try_resolve_transformers`), and of the rest it may know which release had it last.
Images it takes where transformers' processor says how many tokens each becomes
(`models/transformers/multimodal.py`).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parent.parent / "quant/vllm/architectures.json"
#: What the names of classes that write text end in.
WRITING = ("CausalLM", "ConditionalGeneration", "LMHeadModel")


def table() -> dict[str, Any]:
    """The facts of the vLLM and the transformers that are installed here."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import transformers
    import vllm
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from vllm.model_executor.models import registry

    kinds: dict[str, set[str]] = {}  # class → model types
    for key in dir(modeling_auto):
        if key.endswith("MAPPING_NAMES"):
            for kind, value in getattr(modeling_auto, key).items():
                for name in [value] if isinstance(value, str) else value:
                    kinds.setdefault(name, set()).add(kind)
    run, left, blind = [], [], []
    for name in sorted(n for n in kinds if n.endswith(WRITING) and n not in registry._VLLM_MODELS):
        model = getattr(transformers, name)
        runs = model.is_backend_compatible() or model._can_set_attn_implementation()
        (run if runs else left).append(name)
        processors = [PROCESSOR_MAPPING_NAMES.get(kind) for kind in kinds[name]]
        counting = [hasattr(getattr(transformers, p), "_get_num_multimodal_tokens") for p in processors if p]
        if runs and counting and not any(counting):
            blind.append(name)
    return {
        "vllm": vllm.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "built": sorted(registry._VLLM_MODELS),
        "through_transformers": run,
        "text_alone": blind,
        "not_through_transformers": left,
        "last_release": dict(sorted(registry._PREVIOUSLY_SUPPORTED_MODELS.items())),
        "plugins": dict(sorted(registry._OOT_SUPPORTED_MODELS.items())),
    }


def main() -> None:
    text = json.dumps(table(), indent=1) + "\n"
    if "--check" not in sys.argv[1:]:
        TABLE.write_text(text, encoding="utf-8")
    elif TABLE.read_text(encoding="utf-8") != text:
        raise SystemExit(
            f"{TABLE.name} is not what this vLLM says: run docs/make_architectures.py with its Python"
        )


if __name__ == "__main__":
    main()
