"""What ``quant-deploy serve`` found, as people read it. The same values that ``--json`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quant.commands.render import table
from quant.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Console


def serving(console: Console, report: Mapping[str, Any]) -> None:
    completion, tokens = report["completion"], report["kv_cache_tokens"]
    table(
        console,
        "Ready",
        [
            ("model", f"{report['model']} at {report['url']}, vLLM {report['vllm_version']}"),
            ("loaded in", format_seconds(report["load_seconds"])),
            ("context", f"{report['max_model_len']:,} tokens"),
            ("KV cache", f"{tokens:,} tokens" if tokens is not None else "the log does not say"),
            ("completion", f"{completion['prompt']!r} → {completion['text']!r}"),
            (
                "speed",
                f"{completion['tokens_per_second']:.1f} tokens/s ({completion['tokens']} tokens, one "
                "request, the first one)",
            ),
        ],
    )
