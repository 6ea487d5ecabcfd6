"""A job as one page, and several outputs beside one another: HTML that needs nothing else, no network and no
script."""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quant.checkpoint.reader import Checkpoint
from quant.formats import find_format
from quant.hub import named
from quant.models.roles import block_of
from quant.report.charts import Curve, Options, colours, curves_chart, layers_chart, options_chart
from quant.report.contents import contents
from quant.report.value import Pruning, Quantization, Report, Teaching
from quant.units import format_seconds, format_size, mean_and_error
from quant.vllm.kernels import GPU_GENERATIONS, kernel_of, number_formats

PAGE = "quant_report.html"

_STYLE = """
:root { color-scheme: light dark; --line: #e2e2e2; --box: #f5f5f5; --quiet: #666; --ink: #222; --paper: #fff }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a3a3a; --box: #262626; --quiet: #a0a0a0; --ink: #ddd; --paper: #181818 }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1.5rem; max-width: 960px }
body { color: var(--ink); background: var(--paper) }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin-top: 2rem }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem }
.facts div { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem }
.facts b { display: block; font-size: 1.15rem; overflow-wrap: anywhere }
.facts span { color: var(--quiet); font-size: .85rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
.wide { overflow-x: auto } .muted { color: var(--quiet); overflow-wrap: anywhere }
td, th { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line) }
td { overflow-wrap: break-word; white-space: pre-wrap } td.n, th.n { text-align: right }
td.n, .tight td:first-child { white-space: nowrap }
pre { background: var(--box); padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere }
svg { width: 100%; min-width: 640px; height: auto; font: 12px ui-monospace, monospace; fill: currentColor }
text.point { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round }
.grid { stroke: var(--line) } .axis { fill: none; stroke: var(--ink) }
.key i { display: inline-block; width: .7em; height: .7em }
.key span { margin-right: 1.2em; white-space: nowrap }
"""


def document(title: str, body: Sequence[str], style: str = "") -> str:
    """One HTML file."""
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}{style}</style>\n"
        + "\n".join(body)
        + "\n</html>\n"
    )


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), tight: bool = False
) -> str:
    """``numbers``: columns that are aligned to the right; ``tight``: the first is not broken. Cells are text,
    not HTML."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return (
            "<tr>"
            + "".join(
                f"<{tag}{' class=n' if i in numbers else ''}>{html.escape(c)}</{tag}>"
                for i, c in enumerate(cells)
            )
            + "</tr>"
        )

    head = [line("th", heads)] if any(heads) else []
    kind = "wide tight" if tight else "wide"
    return (
        f'<div class="{kind}"><table>' + "\n".join([*head, *(line("td", r) for r in rows)]) + "</table></div>"
    )


def page(report: Report, checkpoint: Checkpoint, evaluation: Mapping[str, Any] | None) -> str:
    """The page of one output.

    Args:
        checkpoint: the output; its headers are read.
        evaluation: what ``quant evaluate --save`` measured, or None.
    """
    job = report.quantization
    name = Path(report.output_path).name
    body = [
        f"<h1>{html.escape(name)}</h1>",
        f"<p class=muted>from {html.escape(named(report.source_path))}</p>",
    ]
    body.append(_facts(report, evaluation))
    if job is not None:
        body += _errors(job)
    if job is not None and job.allocation is not None:
        body += _allocation(job.allocation)
    if report.pruning is not None:
        body += _blocks(report.pruning)
    if report.teaching is not None:
        body += _teaching(report.teaching)
    body += ["<h2>Bits and bytes</h2>", _roles(checkpoint)]
    body += _quality(report, evaluation)
    body += _kernels(checkpoint)
    if job is not None:
        body += _fallbacks(job)
    body += ["<h2>Time</h2>", _times(report)]
    body += _commands(report)
    return document(f"{name}: what quant made", body)


def _facts(report: Report, evaluation: Mapping[str, Any] | None) -> str:
    job = report.quantization
    facts = [("size", f"{format_size(report.source_bytes)} → {format_size(report.output_bytes)}")]
    if job is not None:
        facts.append(("scheme", str(job.scheme.get("name", "?"))))
        facts.append(("method", " and ".join(job.methods)))
        if job.bits_per_weight is not None:
            facts.append(("bits per weight", f"{job.bits_per_weight:g}"))
    if (cut := report.pruning) is not None:
        facts += cut.summary
    facts.append(("format", report.format))
    kl = (evaluation or {}).get("kl")
    facts.append(("KL to the source, nats", mean_and_error(kl, ".5f") if kl else "not measured"))
    facts.append(("time", format_seconds(report.seconds.get("total", 0.0))))
    facts.append(("peak memory", format_size(report.peak_rss_bytes)))
    cells = (f"<div><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>" for k, v in facts)
    return f"<div class=facts>{''.join(cells)}</div>"


def _errors(job: Quantization) -> list[str]:
    """The error of each layer as a plot, the worst as a table."""

    def known(key: str) -> list[tuple[int, str, float]]:
        return [
            (block, x.name, value)
            for x in job.layers
            if (value := getattr(x, key)) is not None
            and math.isfinite(value)
            and (block := block_of(f"{x.name}.weight")) is not None
        ]

    errors = [v for v in known("error") if v[2] > 0]
    ratios = known("snr_db")
    if not errors and not ratios:
        return []
    values = errors or ratios
    axis = "relative output error" if errors else "signal-to-noise ratio, dB"
    kinds = colours([n.rpartition(".")[2] for _, n, _ in values])
    key = "".join(f'<span><i style="background:{c}"></i> {html.escape(k)}</span>' for k, c in kinds.items())
    said = (
        "‖y' - y‖² / ‖y‖² of each layer's output on calibration rows that were held out"
        if errors
        else "of each layer's weights; output errors were not measured, for no calibration text was used"
    )
    worst = sorted(values, key=lambda v: v[2], reverse=bool(errors))[:10]
    shown = [[n, f"{v:.3%}" if errors else f"{v:.2f} dB"] for _, n, v in worst]
    return [
        "<h2>Error by layer</h2>",
        f"<p class=muted>{html.escape(said)}</p>",
        f"<div class=wide>{layers_chart(values, axis, kinds, bool(errors))}</div>",
        f"<p class=key>{key}</p>",
        f"<details><summary>the {len(worst)} worst</summary>{table(['layer', axis], shown, [1])}</details>",
    ]


#: What a number of each measure of blocks is.
_MEASURES = {
    "kl": "KL divergence of the model without the block to the whole one, nats per token",
    "angle": "by how much the block turns the hidden states, half turns",
}


def _blocks(cut: Pruning) -> list[str]:
    """What each step of a recipe cost, what it cost to make blocks narrower, and what each decoder block
    counted for when one went, as a table with a column for each that did."""
    body = []
    if cut.costs:
        rows = [[str(c.get("step")), f"{c.get('kl') or 0.0:.5f}"] for c in cut.costs]
        body += ["<h2>Steps</h2>", table(["behind", "KL to the source, nats per token"], rows, range(1, 2))]
    if cut.widths:
        rows = [
            [str(w.get("called")), str(w.get("before")), str(w.get("after")), f"{w.get('kl') or 0.0:.5f}"]
            for w in cut.widths
        ]
        heads = ["units", "in a block before", "now", "KL to the source then, nats per token"]
        body += ["<h2>Narrower blocks</h2>", table(heads, rows, range(1, len(heads)))]
    return body + (_left_out(cut) if cut.dropped else [])


def _left_out(cut: Pruning) -> list[str]:
    said = f"Left out: {', '.join(map(str, cut.dropped))}."
    if not cut.steps:
        return ["<h2>Blocks</h2>", f"<p>{html.escape(said)} They were named, not measured.</p>"]
    heads = ["block", *(f"step {n}: {step.get('dropped')} goes" for n, step in enumerate(cut.steps, 1))]
    found = [step.get("importance") or {} for step in cut.steps]
    rows = [
        [str(b), *(f"{x:.4g}" if isinstance(x := f.get(str(b)), (int, float)) else "gone" for f in found)]
        for b in range(cut.blocks)
    ]
    return [
        "<h2>Blocks</h2>",
        f"<p>{html.escape(said)}</p>",
        f"<p class=muted>{html.escape(_MEASURES.get(cut.measure, ''))}; measured anew after each</p>",
        table(heads, rows, range(1, len(heads))),
    ]


def _teaching(done: Teaching) -> list[str]:
    """The held-out KL over the steps as a curve, and what was trained."""
    if done.before is None or done.after is None:
        return []
    told = (done.before, done.after)
    # a student like its teacher may have been measured a rounding below zero
    points = tuple((float(step), max(kl, 0.0), f"{kl:.4f}" if kl in told else "") for step, kl in done.judged)
    curve = Curve("held-out rows", "#0072b2", points)
    said = (
        f"Taught by {Path(done.teacher).name}: {len(done.changed)} tensors are others now. KL divergence to "
        f"it on rows that were held out: {done.before:.5f} nats per token before, {done.after:.5f} after."
    )
    return [
        "<h2>Distillation</h2>",
        f"<p>{html.escape(said)}</p>",
        f"<div class=wide>{curves_chart([curve], 'steps', 'KL, nats per token')}</div>",
    ]


def _allocation(chosen: Mapping[str, Any]) -> list[str]:
    """How schemes were chosen layer by layer: a picture of what each layer loses by its bits, and a table."""
    layers = [x for x in chosen.get("layers") or [] if isinstance(x, dict) and x.get("choices")]
    if not layers:
        return []
    drawn = [
        Options(
            x["name"],
            tuple((c["bits"], c["nats"]) for c in x["choices"] if c["nats"] > 0),
            (x["bits"], x["nats"]) if (x["nats"] or 0) > 0 else None,
        )
        for x in layers
    ]
    drawn = [x for x in drawn if x.points]
    kinds = colours([x.name.rpartition(".")[2] for x in drawn])
    key = "".join(f'<span><i style="background:{c}"></i> {html.escape(k)}</span>' for k, c in kinds.items())
    rows = [
        [
            x["name"],
            x["scheme"],
            f"{x['bits']:.3f}",
            "" if x["nats"] is None else f"{x['nats']:.3g}",
            ", ".join(f"{c['scheme']}: {c['nats']:.3g}" for c in x["choices"] if c["nats"] > 0),
        ]
        for x in layers
    ]
    facts = [
        ["sum over layers", f"{chosen['summed']:.4g}"],
        ["predicted", f"{chosen['predicted']:.4g}"],
        ["measured on held-out rows", mean_and_error(chosen["measured"], ".5f")],
    ]
    if uniform := chosen.get("uniform"):
        facts.append(
            [f"{uniform['scheme']} for all layers, measured", mean_and_error(uniform["measured"], ".5f")]
        )
    picture = options_chart(drawn, "bits per weight", "nats per token", kinds) if drawn else ""
    said = "".join(f"<p class=muted>{html.escape(str(n))}</p>" for n in chosen.get("notes") or [])
    return [
        "<h2>Bits by layer</h2>",
        said,
        table(["KL to the source, nats per token", ""], facts, [1]),
        "<p class=muted>what each layer would lose in each scheme, and what it got</p>",
        f"<div class=wide>{picture}</div>",
        f"<p class=key>{key}</p>",
        f"<details><summary>{len(rows)} layers</summary>"
        + table(["layer", "scheme", "bits", "nats", "might have been"], rows, [2, 3])
        + "</details>",
    ]


def _roles(checkpoint: Checkpoint) -> str:
    shares = sorted(contents(checkpoint).items(), key=lambda x: -x[1].stored)
    total = sum(part.stored for _, part in shares) or 1
    rows = [
        [
            role.replace("_", " "),
            f"{part.weights:,}",
            format_size(part.stored),
            f"{part.stored / total:.1%}",
            f"{8 * part.stored / part.weights:.2f}" if part.weights else "",
        ]
        for role, part in shares
    ]
    return table(["what", "weights", "bytes", "share", "bits per weight"], rows, [1, 2, 3, 4])


def _quality(report: Report, evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None:
        command = shlex.join(
            ["quant", "evaluate", report.output_path, "--against", named(report.source_path), "--save"]
        )
        return ["<h2>Quality</h2>", "<p>Not measured. This measures it and puts it here:</p>", _pre(command)]
    text = Path(str(evaluation["text"])).name
    rows = [["text", f"{text}, {evaluation['chunks']} chunks, {evaluation['tokens']:,} tokens"]]
    for key, words, form in (
        ("kl", "KL divergence to the source, nats per token", ".5f"),
        ("kl_p99", "of one token in a hundred at least", ".4f"),
        ("top1", "same most likely token", ".2%"),
        ("top5", "of the five most likely, those in common", ".2%"),
        ("perplexity", "perplexity", ".4f"),
        ("source_perplexity", "the source's", ".4f"),
    ):
        if evaluation.get(key):
            rows.append([words, mean_and_error(evaluation[key], form)])
    return [
        "<h2>Quality</h2>",
        table(["", ""], rows),
        *_measured_parts("domain", evaluation.get("domains") or (), evaluation.get("worst_domain")),
        *_measured_parts("tokens before", evaluation.get("positions") or ()),
        *_tasks(evaluation.get("tasks")),
        "<p class=muted>± one standard error over chunks</p>",
    ]


def _tasks(value: Mapping[str, Any] | None) -> list[str]:
    """What lm-eval judged, a row for each metric."""
    if not value:
        return []
    rows = []
    for name, task in value["tasks"].items():
        for metric, m in task["metrics"].items():
            own = {"mean": m["value"], "standard_error": m["standard_error"]}
            source = None if m["source"] is None else {"mean": m["source"]}
            cells = [mean_and_error(x, ".4f") for x in (own, source, m["difference"])]
            rows.append([f"{name}, {task['documents']} documents", metric, *cells])
    head = [f"task of lm-eval {value['version']}", "metric", "value", "the source's", "difference"]
    return [table(head, rows, [2, 3, 4])]


def _measured_parts(heading: str, parts: Sequence[Mapping[str, Any]], worst: str | None = None) -> list[str]:
    """Domains or positions, a row each."""
    parts = [p for p in parts if p.get("kl")]
    if not parts:
        return []
    rows = [
        [
            f"{p['name']}{', the worst' if p['name'] == worst else ''}",
            mean_and_error(p["kl"], ".5f"),
            mean_and_error(p["top1"], ".2%"),
            f"{p['perplexity_increase']:+.2%}",
        ]
        for p in parts
    ]
    return [table([heading, "KL, nats per token", "same most likely token", "rise"], rows, [1, 2, 3])]


_STATES = {
    "native": "computes in this format",
    "weight-only": "unpacks the weights on the way",
    "no": "does not load it",
}


def _kernels(checkpoint: Checkpoint) -> list[str]:
    """How vLLM computes the checkpoint's schemes on each generation of GPUs."""
    layers = find_format(checkpoint.config, checkpoint.tensors)
    schemes = list(dict.fromkeys(x.scheme for x in layers.linears.values())) if layers is not None else []
    if not schemes:
        return []
    parts: dict[tuple[str, str], list[str]] = {}
    for s in schemes:
        for level, gpus in GPU_GENERATIONS.items():
            state = _STATES[number_formats("cuda", level).get(kernel_of(s), "no")]
            parts.setdefault((str(s), state), []).append(gpus)
    rows = [[scheme, state, "; ".join(gpus)] for (scheme, state), gpus in parts.items()]
    return ["<h2>In vLLM</h2>", table(["scheme", "vLLM", "on"], rows)]


def _fallbacks(job: Quantization) -> list[str]:
    lines = [[n, f] for n, f in job.fallbacks.items()]
    notes = [[x.name, n] for x in job.layers for n in x.notes]
    why = {**job.plain_in_vllm, **job.left}
    left = [[n, why.get(n, "left as it is")] for n in job.unquantized_linears]
    out = ["<h2>What went otherwise</h2>"]
    if not lines and not notes:
        out.append("<p>Nothing: no layer fell back to another method.</p>")
    for words, rows in (("fell back", lines), ("notes", notes), ("unquantized", left)):
        if rows:
            more = table(["layer", words], rows)
            out.append(
                f"<details{' open' if rows is lines else ''}><summary>{words}: {len(rows)}</summary>"
                f"{more}</details>"
            )
    return out


#: Phases that are parts of ``quantize``.
_PARTS = ("embed", "replay", "load", "statistics", "solve", "forward", "write")


def _times(report: Report) -> str:
    known = {k: format_seconds(v) for k, v in report.seconds.items() if v >= 0.05}
    inside = [[f"    of it {k}", known[k]] for k in _PARTS if k in known and "quantize" in known]
    rows = []
    for k, v in known.items():
        if k != "total" and (k not in _PARTS or not inside):
            rows += [[k, v], *(inside if k == "quantize" else [])]
    return table(
        ["phase", "time"], [*rows, ["in all", format_seconds(report.seconds.get("total", 0.0))]], [1]
    )


def _pre(command: str) -> str:
    return f"<pre>{html.escape(command)}</pre>"


def _commands(report: Report) -> list[str]:
    made = report.provenance
    out = ["<h2>Commands</h2>"]
    if made.command:
        out += ["<p>made by</p>", _pre(shlex.join(made.command))]
    if report.serve_command is not None:
        out += ["<p>serve it</p>", _pre(report.serve_command)]
    verify = shlex.join(["quant", "verify", report.output_path, "--source", named(report.source_path)])
    out += ["<p>check it</p>", _pre(verify)]
    versions = f"quant {made.quant}, torch {made.torch}, transformers {made.transformers}"
    where = "; ".join([versions, made.machine, made.date])
    return [*out, f"<p class=muted>{html.escape(where)}</p>"]
