"""What is in a checkpoint, from headers alone, but for vectors that its config.json has no place for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quant.checkpoint.reader import open_checkpoint
from quant.evaluation.agreement import file_problems
from quant.formats import find_format
from quant.formats.legacy import repaired
from quant.gguf.reading import types_of
from quant.models.adapter import adapter_for
from quant.models.place import decoder_list
from quant.models.roles import block_list, block_of
from quant.report.contents import contents
from quant.report.evidence import evidence_of
from quant.vllm.config import stated


def inspect(path: str | Path) -> dict[str, Any]:
    """Facts of a checkpoint directory: architecture, parameters by role (quantized ones counted as the
    weights they stand for), bytes by dtype, format and schemes; of an output of ``quant quantize``, the
    layers that lost most, from its report; and what config.json and the file say against each other.

    Raises:
        CheckpointError: it cannot be read.
    """
    checkpoint, _ = repaired(open_checkpoint(path))
    layers = find_format(checkpoint.config, checkpoint.tensors)
    decoder = decoder_list(checkpoint.tensors.values(), checkpoint.config)
    parameters = {role: part.weights for role, part in contents(checkpoint).items() if part.weights}
    dtypes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.nbytes
    schemes = layers.schemes if layers else {}
    gguf = checkpoint.metadata.get("format") == "gguf"
    if gguf:
        dtypes = types_of(checkpoint)
    adapter = adapter_for(checkpoint.config)
    blocks = {block_of(n) for n in checkpoint.tensors if decoder is not None and block_list(n) == decoder}
    architectures = checkpoint.config.get("architectures")
    return {
        "path": checkpoint.metadata["file"] if gguf else str(checkpoint.path),
        "model_type": checkpoint.config.get("model_type"),
        "architectures": [str(x) for x in architectures] if isinstance(architectures, list) else None,
        "adapter": adapter.name if adapter else None,
        "blocks": len(blocks),
        "parameters": sum(parameters.values()),
        "parameters_by_role": dict(sorted(parameters.items(), key=lambda x: -x[1])),
        "tensors": len(checkpoint.tensors),
        "total_bytes": checkpoint.nbytes,
        "bytes_by_dtype": dict(sorted(dtypes.items(), key=lambda x: -x[1])),
        "files": [{"name": f.name, "file_bytes": f.stat().st_size} for f in checkpoint.weight_files],
        "tied_head": bool(stated(checkpoint.config, "tie_word_embeddings")),
        "format": "gguf" if gguf else layers.format if layers else "plain",
        "schemes": schemes,
        "quantized_linears": len(schemes) and sum(schemes.values()),
        "disagreements": file_problems(checkpoint, layers),
        "worst_layers": evidence_of(checkpoint.path),
    }
