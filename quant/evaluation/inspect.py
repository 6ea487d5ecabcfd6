"""What is in a checkpoint, from headers alone."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from quant.checkpoint.reader import open_checkpoint
from quant.formats import find_format
from quant.formats.legacy import repaired
from quant.formats.reading import quantized_tensors
from quant.models.adapter import adapter_for
from quant.models.place import decoder_list
from quant.models.roles import block_list, block_of, role_of
from quant.report.evidence import evidence_of
from quant.vllm.config import block_count, stated


def inspect(path: str | Path) -> dict[str, Any]:
    """Facts of a checkpoint directory: architecture, parameters by role (quantized ones counted as the
    weights they stand for), bytes by dtype, format and schemes; of an output of ``quant quantize``, the
    layers that lost most, from its report.

    Raises:
        CheckpointError: it cannot be read.
    """
    checkpoint, _ = repaired(open_checkpoint(path))
    layers = find_format(checkpoint.config, checkpoint.tensors)
    count = block_count(checkpoint.config)
    decoder = decoder_list(checkpoint.tensors.values(), checkpoint.config)
    parameters: dict[str, int] = {}
    dtypes: dict[str, int] = {}
    parts = set() if layers is None else quantized_tensors(checkpoint, layers).keys()
    for name, info in checkpoint.tensors.items():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.nbytes
        if name in parts:
            continue
        role = role_of(name, count, decoder)
        parameters[role] = parameters.get(role, 0) + info.numel
    linears = layers.linears.values() if layers else []
    for linear in linears:
        role = role_of(f"{linear.name}.weight", count, decoder)
        parameters[role] = parameters.get(role, 0) + linear.n * linear.k
    for stack in layers.stacks.values() if layers else []:
        role = role_of(stack.name, count, decoder)
        parameters[role] = parameters.get(role, 0) + prod(stack.shape)
    schemes = layers.schemes if layers else {}
    adapter = adapter_for(checkpoint.config)
    blocks = {block_of(n) for n in checkpoint.tensors if decoder is not None and block_list(n) == decoder}
    architectures = checkpoint.config.get("architectures")
    return {
        "path": str(checkpoint.path),
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
        "format": layers.format if layers else "plain",
        "schemes": schemes,
        "quantized_linears": len(schemes) and sum(schemes.values()),
        "worst_layers": evidence_of(checkpoint.path),
    }
