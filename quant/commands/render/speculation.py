"""What ``quant-deploy speculate`` measured, as people read it. The same values that ``--json`` prints."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quant.commands.render.tables import Column, draw

if TYPE_CHECKING:
    from rich.console import Console


def speculation(console: Console, value: Mapping[str, Any], verbose: bool) -> None:
    for candidate in value["candidates"]:
        found, rows = candidate["acceptance"], candidate["rows"]
        console.print(candidate["name"], style="bold")
        if found is None:
            console.print(f"  {candidate['note']}", soft_wrap=True)
            continue
        console.print(
            f"  {found['num_accepted_tokens']} of {found['num_draft_tokens']} proposed tokens accepted "
            f"({found['acceptance_rate']:.1%}), {found['tokens_per_step']:.2f} tokens a step over "
            f"{found['tokens']} tokens",
            soft_wrap=True,
        )
        draw(
            console,
            [
                Column("  tokens guessed", [f"{int(r['k'])}" for r in rows], right=True),
                Column("tokens a step", [f"{r['tokens_per_step']:.2f}" for r in rows], right=True),
                Column("times as fast", [f"{r['speed_up']:.2f}" for r in rows], right=True),
            ],
        )
        if candidate["note"]:
            console.print(f"  {candidate['note']}", soft_wrap=True)
        if candidate["memory"]:
            memory = candidate["memory"]
            console.print(
                f"  KV cache: {memory['kv_tokens_with']:,} tokens with the draft, "
                f"{memory['kv_tokens_without']:,} without{'' if memory['fits'] else ': it does not fit'}",
                soft_wrap=True,
            )
        console.print()
    console.print(f"{value['reason']} (latencies: {value['latencies']})", soft_wrap=True)
    if proof := value.get("vllm"):
        guess = value.get("predicted")
        console.print(
            f"in vLLM: greedy text {'unchanged' if proof['same'] else 'CHANGED'} in "
            f"{proof['equal_texts']} of {proof['texts']} prompts, {proof['acceptance_rate']:.1%} accepted, "
            f"{proof['tokens_per_step']:.2f} tokens a step"
            + (
                f"; predicted {guess['acceptance_rate']:.1%} and {guess['tokens_per_step']:.2f}"
                if guess
                else ""
            ),
            soft_wrap=True,
        )
    if value["speculative_config"]:
        text = shlex.quote(json.dumps(value["speculative_config"]))
        path = shlex.quote(value["checkpoint"])
        console.print(
            f"quant-deploy serve -m {path} -- --speculative-config {text}", markup=False, soft_wrap=True
        )
    if verbose:
        keys = [k for k in value["expected_tokens"][0] if k != "acceptance"]
        columns = [Column("acceptance", [f"{r['acceptance']:.0%}" for r in value["expected_tokens"]])]
        columns += [
            Column(key, [f"{r[key]:.2f}" for r in value["expected_tokens"]], right=True) for key in keys
        ]
        console.print("\nTokens a step, expected:")
        draw(console, columns)
