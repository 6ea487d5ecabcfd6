"""``quant evaluate``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quant import defaults
from quant.commands import options
from quant.commands.terminal import Output, common_options
from quant.commands.types import MODEL, PATH, TokenCount
from quant.errors import Problems, QuantError, UsageError

if TYPE_CHECKING:
    from quant.evaluation.tasks import TaskRequest


@click.command()
@click.argument("paths", metavar="[PATH]...", type=MODEL, nargs=-1)
@options.model_path(required=False)
@options.against("KL divergence and top-1 agreement")
@click.option("--text", type=PATH, show_default="the bundled wikitext-2 test", help="Text to evaluate on.")
@click.option(
    "--domains",
    is_flag=True,
    help="Measure on bundled texts of five domains instead, one by one: prose, code, Chinese, maths, chat.",
)
@click.option(
    "--long-context",
    is_flag=True,
    help=f"Chunks that reach positions beyond {defaults.LONG_POSITION:,} where the model's context does; KL "
    "by position.",
)
@click.option(
    "--length",
    type=TokenCount(8),
    show_default=f"the smaller of {defaults.EVALUATION_LENGTH} and the model's; --long-context: of "
    f"{defaults.LONG_LENGTH}",
    help="Tokens a chunk.",
)
@click.option(
    "--chunks",
    type=click.IntRange(2),
    show_default=f"{defaults.EVALUATION_CHUNKS}; --domains: {defaults.DOMAIN_CHUNKS} of each; "
    f"--long-context: {defaults.LONG_CHUNKS}",
    help="Chunks.",
)
@click.option(
    "--max-perplexity-increase",
    type=float,
    help="Exit status 4 when perplexity rises by more than this share (0.05 is 5 %).",
)
@click.option(
    "--plot",
    type=PATH,
    help="Picture of bits per weight against KL: a .html file, or a .png (takes matplotlib).",
)
@click.option(
    "--save",
    is_flag=True,
    help="Keep the numbers in the checkpoint's folder, and renew its page and model card with them.",
)
@click.option(
    "--tasks",
    metavar="NAME,…",
    help="Tasks of lm-eval to run too, such as arc_easy,piqa: those that score answers.",
)
@click.option("--tasks-path", type=PATH, help="--tasks: folder with tasks of your own (YAML).")
@click.option(
    "--tasks-python",
    type=PATH,
    show_default="this one",
    help="--tasks: Python of an environment with lm-eval, as python -m quant.evaluation.task_environment "
    "DIR makes one.",
)
@click.option("--limit", type=click.IntRange(2), help="--tasks: documents of each, the first ones.")
@click.option("--few-shot", type=click.IntRange(0), help="--tasks: examples before each document.")
@options.device
@options.vllm("serve the checkpoint there and measure what the server computes")
@click.option(
    "--url", help="Endpoint, such as http://127.0.0.1:8000, of a vLLM that serves the checkpoint already."
)
@click.option(
    "--top-logprobs",
    "width",
    type=click.IntRange(1, 1000),
    default=20,
    show_default=True,
    help="--vllm, --url: likeliest tokens that the server tells at each position; an endpoint tells 20 where "
    "it was not started with more.",
)
@options.served_model
@options.api_key_env
@options.certificates
@options.stall
@common_options
def evaluate(
    out: Output,
    paths: tuple[Path, ...],
    model_path: Path | None,
    against: Path | None,
    max_perplexity_increase: float | None,
    plot: Path | None,
    save: bool,
    **given: Any,
) -> None:
    """Perplexity with its standard error; against a source, KL divergence and top-1 agreement. Several
    checkpoints make one table.

    \b
    quant evaluate out/Llama-3.1-8B-W4A16 --against models/Llama-3.1-8B
    quant evaluate out/a out/b out/c --against models/Llama-3.1-8B --plot quality.html
    quant evaluate out/Llama-3.1-8B-W4A16 --against models/Llama-3.1-8B --vllm .venv-vllm/bin/python
    quant evaluate out/Llama-3.1-8B-W4A16 --against models/Llama-3.1-8B --tasks arc_easy,piqa
    """
    measured = {k: given[k] for k in ("text", "length", "chunks", "domains", "long_context", "device")}
    served, tasks = _server_of(given), _tasks_of(given)
    if max_perplexity_increase is not None and not -1 <= max_perplexity_increase < math.inf:
        raise UsageError(
            f"--max-perplexity-increase is {max_perplexity_increase}: a finite share is needed, such as "
            "0.05 for 5 %"
        )
    if max_perplexity_increase is not None and against is None:
        raise UsageError(
            "--max-perplexity-increase needs --against: the checkpoint whose perplexity it is compared with"
        )
    length = measured["length"]
    if measured["long_context"] and length is not None and length <= defaults.LONG_POSITION:
        raise UsageError(
            f"--length is {length}: --long-context is for positions beyond {defaults.LONG_POSITION:,}: give "
            "a longer one, or leave one of the two out"
        )
    if plot is not None:
        from quant.report.pictures import check_plot

        if against is None:
            raise UsageError("--plot needs --against: it draws the KL divergence from that checkpoint")
        check_plot(plot)
    if len(paths) < 2 and plot is None:
        one = options.the_one(paths[0] if paths else None, model_path)
        _demand_reports([one] if save else [])
        _one(out, one, against, max_perplexity_increase, measured, save, served, tasks)
        return
    if served or tasks:
        raise UsageError("--vllm, --url and --tasks measure one checkpoint, without --plot: give one")
    several = [*paths, *([model_path] if model_path else [])] or [options.the_one(None, None)]
    _demand_reports(several if save else [])
    _several(out, several, against, max_perplexity_increase, plot, measured, save)


def _server_of(given: dict[str, Any]) -> dict[str, Any]:
    """What answers for the checkpoint, as arguments of :func:`quant.serving.served.evaluate_served`; none
    where nothing does."""
    names = {
        "width": "--top-logprobs", "model": "--served-model", "api_key_env": "--api-key-env", "ca": "--ca",
        "insecure": "--insecure", "stall": "--stall",
    }  # fmt: skip
    python, url = given["vllm_python"], given["url"]
    own = options.given({name: given[name] for name in names})
    if python is not None and url is not None:
        raise UsageError("--vllm starts a server and --url names one that runs: give one of them")
    if url is None:
        wrong = [names[n] for n in own if python is None or n != "width"]
        if wrong:
            needed = "--url" if python is not None else "--vllm or --url"
            raise UsageError(f"{wrong[0]} is for a server that is asked: give {needed} too, or leave it out")
        return {} if python is None else {"python": python, "width": given["width"]}
    from quant.commands.bench import endpoint_of

    return {"endpoint": endpoint_of(url, {**given, "chat": False}), "width": given["width"]}


def _tasks_of(given: dict[str, Any]) -> TaskRequest | None:
    """What --tasks asks for, checked as far as can be without running it."""
    if given["tasks"] is None:
        names = {"tasks_path": "--tasks-path", "tasks_python": "--tasks-python", "limit": "--limit",
                 "few_shot": "--few-shot"}  # fmt: skip
        if own := options.given({name: given[name] for name in names}):
            raise UsageError(f"{names[next(iter(own))]} is for --tasks: give it too, or leave this out")
        return None
    if given["vllm_python"] is not None or given["url"] is not None:
        raise UsageError("--tasks are run here, not by a server: leave --vllm and --url out, or --tasks")
    from quant.evaluation.tasks import TaskRequest

    request = TaskRequest(
        tuple(name.strip() for name in given["tasks"].split(",")),
        given["tasks_path"],
        given["tasks_python"],
        given["limit"],
        given["few_shot"],
    )
    request.check()
    return request


def _demand_reports(paths: list[Path]) -> None:
    """Refuses what the numbers cannot be kept beside, before minutes are spent on them."""
    from quant.report.files import savable

    if problems := [p for path in paths if (p := savable(path))]:
        raise Problems(problems)


def _save(out: Output, path: str | Path, value: dict[str, Any]) -> None:
    from quant.report.files import save_evaluation

    written = save_evaluation(path, value)
    out.note(f"kept in {', '.join(map(str, written))}")


def _one(
    out: Output,
    path: Path,
    against: Path | None,
    most: float | None,
    measured: dict[str, Any],
    save: bool,
    served: dict[str, Any],
    tasks: TaskRequest | None,
) -> None:
    from quant.commands.render import results

    with out.progress() as progress:
        if served:
            from quant.serving.served import evaluate_served

            result, answers = evaluate_served(
                path,
                against=against,
                progress=progress,
                log=lambda line: out.details([line]),
                **measured,
                **served,
            )
            value = {**result.to_dict(), "served": answers}
        else:
            from quant.evaluation.quality import evaluate as measure  # brings torch, which takes seconds

            result = measure(path, against=against, progress=progress, **measured)
            value = result.to_dict()
        if tasks is not None:
            from quant.evaluation.tasks import run_tasks

            value["tasks"] = run_tasks(
                path, tasks, against=against, device=measured["device"], progress=progress
            )
    out.result(value, lambda console: results.evaluation(console, value))
    if save:
        _save(out, path, value)
    result.demand(most)


def _several(
    out: Output,
    paths: list[Path],
    against: Path | None,
    most: float | None,
    plot: Path | None,
    measured: dict[str, Any],
    save: bool,
) -> None:
    """Each checkpoint's numbers as they are known, with ``--json`` one object a line; what fails does not
    stop the others."""
    from quant.commands.render import results
    from quant.report.pictures import plot as draw

    done, failures = [], []

    def failed(path: str, error: QuantError) -> None:
        failures.append(str(error) if path in str(error) else f"{path}: {error}")
        if out.json:
            out.result({"path": path, "error": str(error), "exit_code": error.exit_code}, lambda c: None)

    with out.progress() as progress:
        from quant.evaluation.comparison import compare_outputs, demand  # brings torch

        for one in compare_outputs(paths, against=against, progress=progress, failed=failed, **measured):
            done.append(one)
            if out.json:
                out.result(one.to_dict(), lambda c: None)
            if save:
                _save(out, one.evaluation.path, one.evaluation.to_dict())
    if done and not out.json:
        values = [one.to_dict() for one in done]
        out.result(values, lambda console: results.comparison(console, values))
    if done and plot is not None:
        draw(plot, [one.to_dict() for one in done])
        out.note(f"{plot}: bits per weight against KL divergence of {len(done)} checkpoints")
    if failures:
        raise Problems(failures)
    demand(done, most)
