"""What was made, measured, checked and found in checkpoints."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.commands.render import table
from quant.commands.render.tables import Column, draw
from quant.hub import named
from quant.report.evidence import worst
from quant.report.value import REPORT, Pruning, Report
from quant.units import format_seconds, format_share, format_size, mean_and_error, two_digits

if TYPE_CHECKING:
    from rich.console import Console

    from quant.distillation.generate import Generated
    from quant.pipeline.gguf import GgufFile

_WORST = 5


def _checks(checks: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [(("✓ " if c["passed"] else "✗ ") + c["name"], c["detail"]) for c in checks]


def _worst(job: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The worst layers by both measures, and why one of them is not there."""
    rows = []
    if job["by_error"]:
        lines = [
            f"{x['name']}: {format_share(x['error'])}"
            + ("" if x["snr_db"] is None else f", {x['snr_db']:.2f} dB")
            for x in job["by_error"]
        ]
        rows.append(
            ("largest errors", "relative output error on held-out calibration rows\n" + "\n".join(lines))
        )
    elif job["error_missing"]:
        rows.append(("largest errors", f"not measured: {job['error_missing']}"))
    if job["by_snr"]:
        several = len({x["scheme"] for x in job["by_snr"]}) > 1
        lines = [
            f"{x['name']}: {x['snr_db']:.2f} dB" + (f", {x['scheme']}" if several else "")
            for x in job["by_snr"]
        ]
        rows.append(("lowest SNR", "signal-to-noise ratio of the weight\n" + "\n".join(lines)))
    return rows


def _source(source: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What the source was, where it is quantized already, and what that costs."""
    if source is None:
        return []
    if "schemes" not in source:
        return [("source", "\n".join(source["notes"]))]
    schemes = ", ".join(f"{n} × {s}" for s, n in source["schemes"].items())
    lines = [f"already quantized: {source['quant_method']}, {schemes}"]
    if source["rounded_anew"]:
        lines.append(
            f"{source['rounded_anew']} of its tensors are rounded a second time: errors are against its "
            "values, and what these lost against their own source comes on top"
        )
    if source["kept"]:
        lines.append(f"{len(source['kept'])} linears keep its codes")
    if wide := source["dequantized"]:
        lines.append(
            f"{len(wide)} of its tensors are stored in 16 bits now: {', '.join(wide[:_WORST])}"
            f"{', …' if len(wide) > _WORST else ''}; --keep-quantized leaves them as they are"
        )
    return [("source", "\n".join([*lines, *source.get("notes", [])]))]


def quantization(console: Console, report: Report, measured: Mapping[str, Any] | None = None) -> None:
    """The last lines of ``quant quantize``: what was made, how well, what went otherwise.

    Args:
        measured: its evaluation, where there is one.
    """
    from quant.report.page import PAGE

    job = report.quantization
    assert job is not None
    schemes = dict.fromkeys(x.scheme for x in job.layers)
    scaled_alone = job.methods == ("none",)
    rows = [
        ("output", report.output_path),
        ("report", str(Path(report.output_path) / PAGE)),
        (
            "scheme",
            f"{', '.join(schemes)}; {' and '.join(job.methods)}, {report.format}, "
            f"{job.bits_per_weight} bits per weight",
        ),
        *([("by layers", "\n".join(job.allocation["notes"]))] if job.allocation else []),
        ("size", f"{format_size(report.source_bytes)} → {format_size(report.output_bytes)} of tensors"),
        *_source(job.source),
        *_costs(report.pruning),
        ("time", format_seconds(report.seconds["total"])),
        (
            "peak memory",
            format_size(report.peak_rss_bytes)
            + (f", GPU {format_size(job.peak_gpu_bytes)}" if job.peak_gpu_bytes else ""),
        ),
        (
            "tensors",
            f"{len(job.tensors.quantized)} {'rewritten' if scaled_alone or job.prunes else 'quantized'}, "
            f"{len(job.tensors.copied)} copied, {len(job.tensors.folded)} with scaling folded in, "
            f"{len(job.tensors.dropped)} dropped",
        ),
    ]
    if backend := job.backend:
        version = f"{backend['name']} {backend[backend['name']]}, archived upstream {backend['archived']}"
        rows.append(("backend", "\n".join([version, *backend["notes"]])))
    # scaling alone rounds nothing; that its function is the source's is said below
    if not scaled_alone:
        rows += _worst(worst(job.layers, _WORST))
        rows.append(("fallbacks", "\n".join(map(_fallback, job.kinds_of_fallbacks)) or "none"))
    notes = list(dict.fromkeys(f"{x.name}: {n}" for x in job.layers for n in x.notes))
    if notes:
        more = f"\nand {len(notes) - _WORST} more in {REPORT}" if len(notes) > _WORST else ""
        rows.append(("notes", "\n".join(notes[:_WORST]) + more))
    if job.calibration and (passed_over := job.calibration.get("notes")):
        rows.append(("text", "\n".join(passed_over)))
    left = [n for n in job.unquantized_linears if n != "lm_head"]
    if left:
        more = f" and {len(left) - _WORST} more in {REPORT}" if len(left) > _WORST else ""
        rows.append(("unquantized", f"{len(left)} linears: {', '.join(left[:_WORST])}{more}"))
    for why in dict.fromkeys(job.plain_in_vllm.values()):
        those = [n for n, reason in job.plain_in_vllm.items() if reason == why]
        rows.append(("16 bits in vLLM", f"{len(those)} linears ({those[0]}, …): {why}"))
    if folds := job.folds.values():
        names = ", ".join(sorted({f.suppressor for f in folds}))
        low, high = min(f.factors[0] for f in folds), max(f.factors[1] for f in folds)
        how = (
            "every factor is 1, which changes nothing"
            + (": they are powers of two, and 1 is the nearest for all of them" if scaled_alone else "")
            if low == high == 1
            else f"divided by factors from {low:.3g} to {high:.3g}"
        )
        rows.append(("scaling", f"{names}: inputs of {len(folds)} groups of linears, {how}"))
    if report.side_files_dropped:
        rows.append(("left out", "\n".join(f"{d['file']}: {d['reason']}" for d in report.side_files_dropped)))
    if same := job.function:
        rows.append(
            (
                "function",
                f"KL to source {same['kl']:.2g} nats per token, logits differ by {same['difference']:.2g} "
                "of the largest at most",
            )
        )
    rows += _checks(report.verify["checks"])
    if report.serve_command is None:
        rows.append(
            ("serve", "with another engine: this was made for --target other, and vLLM may refuse it")
        )
    table(console, "Scaled" if scaled_alone else "Pruned" if job.prunes else "Quantized", rows)
    if measured is not None:
        console.print()
        evaluation(console, measured)
    else:
        measure = ["quant", "evaluate", report.output_path, "--against", named(report.source_path), "--save"]
        console.print(f"measure it: {shlex.join(measure)}", soft_wrap=True, markup=False)
    _serve(console, report)


def _serve(console: Console, report: Report) -> None:
    """The last line: a command to copy, so it is in no table, where it would be broken by the width."""
    if report.serve_command is not None:
        console.print(f"serve it: {report.serve_command}", soft_wrap=True, markup=False)


def prediction(console: Console, value: Mapping[str, Any]) -> None:
    """``--dry-run``: what the job would make and take."""
    table(
        console,
        "Dry run: nothing was written",
        [
            ("scheme", f"{value['scheme']['name']}, {value['method']}, {value['format']}"),
            ("linears", f"{value['linears']} to quantize"),
            (
                "output",
                f"{format_size(value['output_bytes'])} of tensors (source "
                f"{format_size(value['source_bytes'])}), {format_size(value['side_files_bytes'])} of side "
                "files",
            ),
            *_source(value.get("source_quantization")),
            *_chosen_among(value.get("allocation")),
            *_ranks(value.get("ranks")),
            *_cost(value),
        ],
    )


def _fallback(kind: tuple[list[str], str]) -> str:
    """The layers of which a sentence, but for its numbers, is said, and the sentence."""
    names, said = kind
    more = f" and {len(names) - _WORST} more in {REPORT}" if len(names) > _WORST else ""
    return f"{', '.join(names[:_WORST])}{more}: {said}"


def _chosen_among(value: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What schemes will be chosen among layer by layer; all else is of one scheme for all layers."""
    if value is None:
        return []
    return [
        (
            "by layers",
            f"{value['target']}: a scheme for each of {value['layers']} layers of vLLM\n"
            f"among {', '.join(value['candidates'])}\n"
            f"{value['reachable'][0]} to {value['reachable'][1]} can be reached\n"
            f"{format_seconds(value['seconds'])} of the time and {format_size(value['scratch_bytes'])} of "
            "disk are for the choice; memory is predicted for one scheme for all",
        )
    ]


def _ranks(value: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What several processes will divide; what is predicted is for one alone."""
    if value is None:
        return []
    devices = f" on {', '.join(value['devices'])}" if value["devices"] else ""
    return [
        (
            "ranks",
            f"{value['count']}{devices}: {value['divided']} are divided\n"
            "memory is that of each; time is that of one rank alone",
        )
    ]


#: What is said of a time that no trial has shown.
_COUNTED = ", by a count of the work: trying one block would take longer than this answer may"


def _placement(value: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What a budget makes of a job."""
    if value is None:
        return []
    if value["workers"]:
        return [("budget", f"{value['workers']} tensors are worked on at once")]
    fewer = value["batch_rows"] < value["usual_rows"]
    rows = f"{value['batch_rows']} rows go through a block together"
    return [
        (
            "budget",
            rows + (f" instead of {value['usual_rows']}: sums may end in other bits" if fewer else ""),
        ),
        (
            "activations",
            f"{format_size(value['waiting_bytes'])} wait at once, up to "
            f"{format_size(value['resident_bytes'])} where they are computed, "
            f"{format_size(value['spilled_bytes'])} on disk",
        ),
    ]


def _cost(value: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a job takes, where it is known: nothing is predicted for another program."""
    if "seconds" not in value:
        return [("memory, time", f"not predicted: {value['backend']} does the work")]
    return [
        *_placement(value.get("placement")),
        ("scratch", format_size(value["scratch_bytes"])),
        (
            "peak memory",
            f"about {format_size(value['peak_rss_bytes'])}, {format_size(value['available_bytes'])} are "
            "available"
            + (f"; GPU about {format_size(value['peak_gpu_bytes'])}" if value["peak_gpu_bytes"] else ""),
        ),
        ("time", f"about {format_seconds(value['seconds'])}{'' if value['tried'] else _COUNTED}"),
    ]


def export(console: Console, report: Report) -> None:
    done = report.conversion
    assert done is not None
    rows = [
        ("output", report.output_path),
        ("format", f"{done.source_format} → {report.format}, {done.linears} quantized linears"),
        ("size", f"{format_size(report.source_bytes)} → {format_size(report.output_bytes)} of tensors"),
        (
            "scales",
            f"rounded to the model's dtype in {len(done.scales_rounded)} linears"
            if done.scales_rounded
            else "carried over exactly",
        ),
    ]
    if snr := done.requantized.values():
        rows.append(
            (
                "rounded anew",
                f"{len(snr)} linears in activation order, {min(snr):.1f} to {max(snr):.1f} dB against the "
                "checkpoint",
            )
        )
    if done.repairs:
        rows.append(("repaired", "\n".join(done.repairs)))
    if done.kv_cache_scales:
        rows.append(("KV cache", f"{done.kv_cache_scales} scales carried over"))
    left = [f"{d['file']}: {d['reason']}" for d in report.side_files_dropped]
    reasons = [d["reason"] for d in done.tensors_dropped]
    left += [f"{reasons.count(r)} tensors: {r}" for r in dict.fromkeys(reasons)]
    if left:
        rows.append(("left out", "\n".join(left)))
    table(console, "Exported", rows + _checks(report.verify["checks"]))
    _serve(console, report)


def _costs(done: Pruning | None) -> list[tuple[str, str]]:
    """Of a recipe that prunes first, what is left and what each step cost."""
    if done is None:
        return []
    lines, before = [], 0.0
    for cost in done.costs:
        lines.append(f"{cost['step']}: {cost['kl'] - before:+.4g}, {cost['kl']:.4g} in all")
        before = cost["kl"]
    return [*done.summary, ("KL to the source", "\n".join([*lines, "nats per token, step by step"]))]


def pruning(console: Console, report: Report) -> None:
    """The last lines of ``quant prune`` where blocks are left out or made narrower."""
    done = report.pruning
    assert done is not None
    rows = [("output", report.output_path), *done.summary]
    for before, width in zip([None, *done.widths], done.widths, strict=False):
        cost = width["kl"] - (before["kl"] if before else 0.0)
        rows.append(
            (
                f"KL of {width['called']}",
                f"{cost:.4g} nats per token, {width['kl']:.4g} in all, on rows held out",
            )
        )
    units = {"kl": "nats per token of KL to the source without it", "angle": "half turns"}
    for step in done.steps:
        importance, block = step["importance"], step["dropped"]
        least = sorted(importance, key=lambda i: importance[i])[:_WORST]
        shown = ", ".join(f"{i}: {importance[i]:.4g}" for i in least)
        rows.append((f"block {block}", f"{units[done.measure]}; the least of {len(importance)}: {shown}"))
    rows.append(
        ("size", f"{format_size(report.source_bytes)} → {format_size(report.output_bytes)} of tensors")
    )
    _made(console, "Pruned", rows, report, report.source_path)


def gguf_file(console: Console, made: GgufFile) -> None:
    types = ", ".join(f"{n} × {t}" for t, n in sorted(made.tensors.items(), key=lambda x: -x[1]))
    rows = [
        ("output", made.path),
        ("level", f"{made.level}, architecture {made.architecture}"),
        ("tensors", types),
        ("size", f"{format_size(made.source_bytes)} of tensors → {format_size(made.file_bytes)}"),
    ]
    if made.exact:
        rows.append(("exact", f"codes of {made.exact} linears stored as they are, not rounded anew"))
    if made.notes:
        rows.append(("notes", "\n".join(made.notes)))
    if made.dropped:
        reasons = list(made.dropped.values())
        left = [f"{reasons.count(r)} tensors: {r}" for r in dict.fromkeys(reasons)]
        rows.append(("left out", "\n".join(left)))
    table(console, "Exported", rows)
    console.print(f"llama-server --model {shlex.quote(made.path)}", soft_wrap=True, markup=False)


def teaching(console: Console, report: Report) -> None:
    """The last lines of ``quant distill``."""
    done = report.teaching
    assert done is not None and done.before is not None and done.after is not None
    best = min(done.judged, key=lambda pair: pair[1])[0]
    share = f", {1 - done.after / done.before:.0%} less" if done.before > 0 else ""
    rows = [
        ("output", report.output_path),
        ("teacher", done.teacher),
        (
            "trained",
            f"{'all weights' if done.trained == 'weights' else 'norms and scales'}: {len(done.changed)} "
            f"tensors are others now; {done.steps} steps on {done.rows} rows",
        ),
        (
            "held-out KL",
            f"{done.before:.5f} → {done.after:.5f} nats per token{share} (step {best}, {len(done.judged)} "
            "judgements)",
        ),
        ("size", f"{format_size(report.output_bytes)} of tensors, as before"),
    ]
    _made(console, "Distilled", rows, report, done.teacher)


def _made(
    console: Console, title: str, rows: Sequence[tuple[str, str]], report: Report, against: str
) -> None:
    """What became of a checkpoint, what it took, its checks, and what to do with it next."""
    took = [
        ("time", format_seconds(report.seconds["total"])),
        ("peak memory", format_size(report.peak_rss_bytes)),
    ]
    table(console, title, [*rows, *took, *_checks(report.verify["checks"])])
    measure = ["quant", "evaluate", report.output_path, "--against", named(against), "--save"]
    console.print(f"measure it: {shlex.join(measure)}", soft_wrap=True, markup=False)
    _serve(console, report)


def generated(console: Console, made: Generated) -> None:
    """The last lines of ``quant distill --generate``."""
    rows = [
        ("output", str(made.output)),
        ("answered by", made.model),
        ("rows", f"{made.rows} of {made.asked} answers, {made.tokens} tokens generated"),
        *((f"left out: {why}", str(count)) for why, count in sorted(made.dropped.items())),
    ]
    table(console, "Generated", rows)
    console.print(
        f"train with it: --calibration-dataset {shlex.quote(str(made.output))}", soft_wrap=True, markup=False
    )


def verification(console: Console, value: Mapping[str, Any]) -> None:
    rows = _checks(value["checks"])
    if "tensors" in value:
        different = value["tensors"]["different"]
        snr = [t["snr_db"] for t in different if t["snr_db"] is not None]
        rows.append(
            (
                "against source",
                f"{value['tensors']['equal']} tensors equal, {len(different)} differ"
                + (f" ({min(snr):.1f} to {max(snr):.1f} dB)" if snr else "")
                + (
                    f", the scaling folded into {len(value['tensors']['scaled'])} taken out"
                    if value["tensors"]["scaled"]
                    else ""
                ),
            )
        )
    if "vllm" in value:
        rows.append((("✓ " if value["vllm"]["passed"] else "✗ ") + "in vLLM", value["vllm"]["detail"]))
    table(console, f"{value['path']}: {'passed' if value['passed'] else 'FAILED'}", rows)


def evaluation(console: Console, value: Mapping[str, Any]) -> None:
    """Of values that were kept before there were more of them, those that are there."""
    rows = [
        ("text", f"{Path(value['text']).name}, {value['chunks']} chunks, {value['tokens']:,} tokens"),
        ("perplexity", mean_and_error(value["perplexity"], ".4f")),
        *([("activations", value["activations"])] if value["activations"] else []),
    ]
    if value["against"]:
        rows += [
            ("source's", mean_and_error(value["source_perplexity"], ".4f")),
            ("rise", f"{value['perplexity_increase']:+.2%}{_loss(value)}"),
            ("KL to source", f"{mean_and_error(value['kl'], '.5f')} nats per token{_interval(value['kl'])}"),
            *_tail(value),
            ("top-1 agreement", mean_and_error(value["top1"], ".2%")),
        ]
        if value.get("top5"):
            rows.append(("top-5 agreement", mean_and_error(value["top5"], ".2%")))
    table(console, named(value["path"]), rows)
    if value.get("served"):
        _as_served(console, value["served"])
    _evaluated_parts(console, "domain", value.get("domains") or ())
    if value.get("worst_domain"):
        worst = next(d for d in value["domains"] if d["name"] == value["worst_domain"])
        console.print(f"worst: {worst['name']}, KL {mean_and_error(worst['kl'], '.5f')}", markup=False)
    _evaluated_parts(console, "tokens before", value.get("positions") or ())
    if value.get("tasks"):
        _tasks(console, value["tasks"])


def _tasks(console: Console, value: Mapping[str, Any]) -> None:
    """What lm-eval judged."""
    rows = [
        (name, task["documents"], metric, m)
        for name, task in value["tasks"].items()
        for metric, m in task["metrics"].items()
    ]
    console.print()
    console.print(f"lm-eval {value['version']}", markup=False)
    columns = [
        Column("task", [f"{name}, {count} documents" for name, count, _, _ in rows]),
        Column("metric", [metric for _, _, metric, _ in rows]),
        Column("value", [_with_error(m["value"], m["standard_error"]) for *_, m in rows], 0, True),
        Column("source's", [_with_error(m["source"], None) for *_, m in rows], 1, True),
        Column("difference", [mean_and_error(m["difference"], ".4f") for *_, m in rows], 0, True),
    ]
    draw(console, columns)


def _with_error(value: float | None, error: float | None) -> str:
    return mean_and_error(None if value is None else {"mean": value, "standard_error": error}, ".4f")


def _as_served(console: Console, served: Mapping[str, Any]) -> None:
    """What a server computes, under what our own run does."""
    rows = [
        ("tokens", f"{served['chunks']} chunks, {served['tokens']:,} tokens"),
        ("perplexity", f"{served['perplexity']:.4f}"),
        ("from our own run", f"{served['distance']:.4f} nats (root mean square)"),
    ]
    if served["kl_at_least"]:
        rows += [
            ("loss to source", f"{mean_and_error(served['loss'], '.5f')} nats per token"),
            (
                "KL to source",
                f"at least {mean_and_error(served['kl_at_least'], '.5f')} nats per token, from the "
                f"{served['width']} likeliest tokens ({served['told']:.1%} of the probability)",
            ),
            (
                "",
                f"our own run: {mean_and_error(served['own_kl_at_least'], '.5f')} of the same, "
                f"{mean_and_error(served['own_kl'], '.5f')} over the whole vocabulary",
            ),
            ("top-1 agreement", mean_and_error(served["top1"], ".2%")),
        ]
    console.print()
    table(console, f"as served by {served['url'] or 'vLLM'}", rows)
    if served["domains"]:
        parts = served["domains"]
        console.print()
        columns = [
            Column("domain, served", [p["name"] for p in parts]),
            Column("perplexity", [f"{p['perplexity']:.4f}" for p in parts], 0, True),
            Column("KL, at least", [mean_and_error(p["kl_at_least"], ".5f") for p in parts], 0, True),
            Column("our own run's", [mean_and_error(p["own_kl_at_least"], ".5f") for p in parts], 1, True),
            Column("top-1", [mean_and_error(p["top1"], ".2%") for p in parts], 1, True),
        ]
        draw(console, columns)


def _loss(value: Mapping[str, Any]) -> str:
    loss = value.get("loss")
    if not loss:
        return ""
    sign = "+" if loss["mean"] >= 0 else ""
    return f" ({sign}{mean_and_error(loss, '.5f')} nats per token)"


def _interval(value: Mapping[str, Any]) -> str:
    ends = value.get("interval")
    if not ends:
        return ""
    low, high = (two_digits(end, 5) for end in ends)
    return f"\n95 % of chunks' means: {low} to {high}"


def _tail(value: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The tokens that lost most."""
    if not value.get("kl_p99"):
        return []
    p99 = mean_and_error(value["kl_p99"], ".4f")
    return [("KL of a token", f"P99 {p99}, largest {two_digits(value['kl_max'], 3)}")]


def _evaluated_parts(console: Console, heading: str, parts: Sequence[Mapping[str, Any]]) -> None:
    """Domains, or positions, a row each."""
    if not parts:
        return
    console.print()
    judged = parts[0]["kl"] is not None
    columns = [
        Column(heading, [p["name"] for p in parts]),
        Column("tokens", [f"{p['tokens']:,}" for p in parts], 3, True),
        Column(
            "perplexity", [mean_and_error(p["perplexity"], ".2f") for p in parts], 2 if judged else 0, True
        ),
    ]
    if judged:
        columns[2:2] = [
            Column("KL, nats per token", [mean_and_error(p["kl"], ".5f") for p in parts], 0, True),
            Column("P99", [two_digits(p["kl_p99"]["mean"], 4) for p in parts], 0, True),
            Column("largest", [two_digits(p["kl_max"], 3) for p in parts], 1, True),
            Column("top-1", [mean_and_error(p["top1"], ".2%") for p in parts], 0, True),
            Column("top-5", [mean_and_error(p["top5"], ".2%") for p in parts], 4, True),
        ]
        rises = [f"{p['perplexity_increase']:+.2%}" for p in parts]
        columns.append(Column("rise", rises, 1, True))
    draw(console, columns)


def comparison(console: Console, values: Sequence[Mapping[str, Any]]) -> None:
    """Several evaluations against one source: a row each."""
    first = values[0]
    against = f" against {first['against']}" if first["against"] else ""
    console.print(
        f"{first['text']}, {first['chunks']} chunks, {first['tokens']:,} tokens{against}", markup=False
    )

    rows = [
        {
            "path": v["path"],
            "scheme": v["scheme"],
            "bits": v["bits_per_weight"],
            "bytes": v["total_bytes"],
            **v,
        }
        for v in values
    ]
    if first["source_perplexity"]:
        source = {"path": str(first["against"]), "scheme": "source", "bits": None, "bytes": None}
        rows.insert(0, source | {"perplexity": first["source_perplexity"], "kl": None, "top1": None})
    draw(
        console,
        [
            Column("path", [r["path"] for r in rows]),
            Column("scheme", [r["scheme"] for r in rows], 2),
            Column("bits/weight", ["-" if r["bits"] is None else f"{r['bits']:.3f}" for r in rows], 3, True),
            Column("size", ["-" if r["bytes"] is None else format_size(r["bytes"]) for r in rows], 4, True),
            Column("perplexity", [mean_and_error(r["perplexity"], ".4f") for r in rows], 0, True),
            Column("KL, nats per token", [mean_and_error(r["kl"], ".5f") for r in rows], 0, True),
            Column("worst domain", [_worst_domain(r) for r in rows], 1),
            Column("top-1", [mean_and_error(r["top1"], ".2%") for r in rows], 1, True),
        ],
    )


def _worst_domain(value: Mapping[str, Any]) -> str:
    found = next((d for d in value.get("domains") or () if d["name"] == value["worst_domain"]), None)
    return f"{found['name']} {found['kl']['mean']:.5f}" if found else "-"


def inspection(console: Console, value: Mapping[str, Any]) -> None:
    schemes = ", ".join(f"{n} × {s}" for s, n in value["schemes"].items()) or "none"
    architectures = ", ".join(value["architectures"] or ["no architecture named"])
    table(
        console,
        named(value["path"]),
        [
            (
                "model",
                f"{value['model_type']} ({architectures}), {value['blocks']} blocks, adapter: "
                f"{value['adapter'] or 'none, generic'}",
            ),
            (
                "parameters",
                f"{value['parameters']:,}: "
                + ", ".join(f"{r} {n:,}" for r, n in value["parameters_by_role"].items()),
            ),
            (
                "bytes",
                f"{format_size(value['total_bytes'])}: "
                + ", ".join(f"{d} {format_size(n)}" for d, n in value["bytes_by_dtype"].items()),
            ),
            ("files", f"{len(value['files'])}, {value['tensors']} tensors"),
            ("head", "tied to the embedding" if value["tied_head"] else "its own"),
            ("format", value["format"]),
            ("schemes", schemes),
            *(("config.json", f"does not belong to the file: {x}") for x in value["disagreements"]),
            *(_worst(value["worst_layers"]) if value["worst_layers"] else []),
        ],
    )


def outputs(console: Console, values: Sequence[Mapping[str, Any]]) -> None:
    """Several outputs, a row each."""

    def cells(key: str) -> list[str]:
        return [str(v[key]) for v in values]

    errors = ["-" if (e := v["worst_error"]) is None else format_share(e) for v in values]
    draw(
        console,
        [
            Column("output", cells("path")),
            Column("scheme", cells("scheme")),
            Column("method", cells("method"), 1),
            Column("bits", [f"{b:.3f}" if (b := v["bits_per_weight"]) else "-" for v in values], 0, True),
            Column("size", [format_size(v["total_bytes"]) for v in values], 0, True),
            Column("KL, nats", [mean_and_error(v["kl"], ".5f") for v in values], 0, True),
            Column("top-1", [mean_and_error(v["top1"], ".2%") for v in values], 2, True),
            Column("worst layer", errors, 3, True),
            Column("made in", [format_seconds(v["seconds"] or 0) for v in values], 4, True),
        ],
    )
