"""What ``quant-deploy serve`` found, as people read it. The same values that ``--json`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quant.commands.render import table
from quant.engines import ENGINES
from quant.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Console


def serving(console: Console, report: Mapping[str, Any]) -> None:
    completion, length = report["completion"], report["max_model_len"]
    cache = [("KV cache", _tokens(report["kv_cache_tokens"]))] if "kv_cache_tokens" in report else []
    version = report.get("vllm_version") or report.get("engine_version")
    program = f"{ENGINES[report['engine']].title} {version}".rstrip()
    table(
        console,
        "Ready",
        [
            ("model", f"{report['model']} at {report['url']}, {program}"),
            ("loaded in", format_seconds(report["load_seconds"])),
            ("context", _tokens(length)),
            *cache,
            ("completion", f"{completion['prompt']!r} → {completion['text']!r}"),
            (
                "speed",
                f"{completion['tokens_per_second']:.1f} tokens/s ({completion['tokens']} tokens, one "
                "request, the first one)",
            ),
        ],
    )


def _tokens(number: int | None) -> str:
    return f"{number:,} tokens" if number is not None else "the server does not say"
