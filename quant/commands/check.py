"""``quant-deploy check``."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quant.commands import options
from quant.commands.bench import endpoint_of, endpoint_options
from quant.commands.terminal import Output, common_options
from quant.commands.types import MODEL, PATH
from quant.errors import UsageError, VerificationFailed

if TYPE_CHECKING:
    from quant.progress import Progress
    from quant.serving.check.value import CheckReport

GROUPS = ("fidelity", "performance", "resources", "security", "operation")


@click.command()
@click.option("--url", help="Endpoint, such as http://127.0.0.1:8000; without --pid it is never stopped.")
@click.option(
    "--checkpoint",
    type=MODEL,
    help="What it should serve. Without --url vLLM is started on it; its end and new start are checked too.",
)
@click.option("--api-key", metavar="KEY", help="The key itself; --api-key-env keeps it out of process lists.")
@endpoint_options
@options.check_profile
@click.option("--only", type=click.Choice(GROUPS), multiple=True, help="Walk this group alone; repeatable.")
@click.option(
    "--soak", metavar="DURATION", help="Load for so long, such as 10m, and see whether memory grows."
)
@click.option(
    "--log", type=PATH, help="Log of the server: which kernels it chose, and whether prompts are in it."
)
@click.option(
    "--pid",
    type=click.IntRange(2),
    help="Process of the server at --url on this machine: it is ENDED at the last, to see how it ends.",
)
@click.option("--gateway", metavar="URL", help="Address that must limit the rate (429).")
@click.option(
    "--probes",
    type=PATH,
    help="Prompts for a filter: .jsonl of {'prompt', 'blocked': true} or {'prompt', 'absent': PATTERN}.",
)
@click.option("--output", type=PATH, help="File to write: the JSON report.")
@options.vllm_python
@options.start_timeout
@options.exact_activations
@options.gpu
@common_options
@click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_ARGUMENTS...]")
def check(
    out: Output,
    url: str | None,
    checkpoint: Path | None,
    profile: str,
    output: Path | None,
    extra: tuple[str, ...],
    **given: Any,
) -> None:
    """The production checklist, measured at an endpoint: does it compute with the checkpoint it should serve,
    fast enough, guarded, and to be operated. Exit status 4 on a FAIL.

    \b
    quant-deploy check --url http://127.0.0.1:8000 --checkpoint out/Llama-3.1-8B-W4A16
    quant-deploy check --checkpoint out/Llama-3.1-8B-W4A16 --profile batch --soak 10m
    """
    if url is None and checkpoint is None:
        raise UsageError("give --url of an endpoint, or --checkpoint to start vLLM on")
    if url is not None and extra:
        raise UsageError(f"{extra[0]!r} is for a vLLM that is started here: leave --url out, or it")
    if url is None and given["pid"] is not None:
        raise UsageError("--pid is of a server that runs: give its --url; the one started here has its own")
    if url is None and given["log"] is not None:
        raise UsageError("--log is of a server that runs: give its --url; the one started here has its own")
    if given["api_key"] is not None and given["api_key_env"] is not None:
        raise UsageError("--api-key and --api-key-env both name the key: give one of them")
    _writable(output)
    with out.progress("starting") as progress:  # what is imported takes seconds on a busy machine
        from quant.commands.render import check as render
        from quant.serving.bench import without_nan

        report = _measured(out, url, checkpoint, profile, extra, given, progress)
    value = without_nan(report.to_dict())
    if output is not None:
        output.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        value["output"] = str(output)
    out.result(value, lambda console: render.check(console, value))
    if not report.passed:
        failed = [f.name for f in report.findings if f.status == "FAIL"]
        raise VerificationFailed(f"{report.url}: {len(failed)} FAIL: {', '.join(failed)}")


def _measured(
    out: Output, url: str | None, checkpoint: Path | None, profile: str, extra: tuple[str, ...],
    given: dict[str, Any], progress: Progress,
) -> CheckReport:  # fmt: skip
    """The checks of a running endpoint, or of a vLLM that is started on a checkpoint."""
    from quant.serving.check.profile import parse_duration, read_profile
    from quant.serving.check.run import CheckRequest, check_checkpoint, check_endpoint
    from quant.serving.client import sound_key

    request = CheckRequest(
        read_profile(profile), checkpoint, given["log"], given["gateway"], given["probes"],
        None if given["soak"] is None else parse_duration(given["soak"], "--soak"),
        given["gpu"], given["only"], given["pid"],
    )  # fmt: skip
    endpoint = endpoint_of(url or "http://127.0.0.1", given)
    if given["api_key"]:
        endpoint = replace(endpoint, api_key=sound_key(given["api_key"], "--api-key"))
    if url is not None:
        return check_endpoint(endpoint, request, progress=progress)
    from quant.serving.deployment import DeploymentRequest, plan

    assert checkpoint is not None
    asked = DeploymentRequest(
        gpu=given["gpu"], port=0, name=given["model"], api_key_env=given["api_key_env"], extra=extra
    )
    return check_checkpoint(
        plan(checkpoint, asked),
        request,
        endpoint,
        python=given["vllm_python"],
        timeout=given["timeout"],
        exact=given["exact_activations"],
        log=lambda line: out.details([line]),
        progress=progress,
    )


def _writable(path: Path | None) -> None:
    """
    Raises:
        UsageError: the report could not be written there.
    """
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"--output is {str(path)!r}: give a file in a folder that can be written to")
