"""Changes of a config with 1,024 positions, overrides, the context that is asked for, and the longest that
vLLM derives."""

from __future__ import annotations

from typing import Any

_THETA = {"rope_theta": 10000.0}

CONTEXTS: list[tuple[dict[str, Any], dict[str, Any], int | None, int]] = [
    ({}, {}, None, 1024),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, {}, None, 4096),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {}, None, 2048),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}},
        {},
        None,
        1024,
    ),
    ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, **_THETA}}, {}, None, 4096),
    ({"model_max_length": 4096}, {}, None, 4096),
    ({"seq_length": 512}, {}, None, 512),
    ({}, {"rope_scaling": {"rope_type": "linear", "factor": 4}}, 4096, 4096),
    ({}, {"rope_parameters": {"rope_type": "linear", "factor": 4, **_THETA}}, 4096, 4096),
    ({}, {"max_position_embeddings": 4096}, 4096, 4096),
]
