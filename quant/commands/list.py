"""``quant list``."""

from __future__ import annotations

import click

from quant.commands.terminal import Output, common_options

#: As :data:`quant.listing.KINDS` has them, which is imported when one is listed.
KINDS = ("schemes", "methods", "formats", "models", "gpus", "scenarios", "engines")


@click.command("list")
@click.argument("kind", type=click.Choice(KINDS), required=False)
@click.argument("pattern", default="")
@common_options
def list_(out: Output, kind: str | None, pattern: str) -> None:
    """What there is to choose from: schemes, methods, formats, models, gpus, scenarios or engines. PATTERN:
    part of the names to show. Without KIND, how many there are of each.

    \b
    quant list schemes
    quant list models qwen3
    """
    from quant.commands.render import lists
    from quant.listing import KINDS as rows
    from quant.listing import listing

    if kind is None:
        counts = {name: len(listing(name)) for name in KINDS}
        out.result(counts, lambda console: lists.kinds(console, counts, {k: v[1] for k, v in rows.items()}))
        return
    items = listing(kind, pattern)
    out.result({"kind": kind, "items": items}, lambda console: lists.items(console, kind, items))
