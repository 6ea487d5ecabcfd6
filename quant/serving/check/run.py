"""Walks the checklist."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quant import defaults
from quant.checkpoint.reader import open_checkpoint
from quant.errors import QuantError, UsageError, clipped, first_line
from quant.evaluation.agreement import demand_agreement
from quant.progress import Event, Progress, silent
from quant.serving.check import fidelity, operation, performance, resources, security
from quant.serving.check.context import Context, first_lines
from quant.serving.check.profile import Profile
from quant.serving.check.value import Check, CheckReport, Finding, Skip, Unexpected
from quant.serving.client import Endpoint, EndpointError, endpoint_url, resolve
from quant.serving.deployment import Deployment
from quant.serving.foreign import ForeignServer
from quant.serving.process import Interrupted, Server, running
from quant.units import format_seconds

#: Groups in the order in which they are walked: what may end the server comes last.
GROUPS: dict[str, Sequence[Check]] = {
    "fidelity": fidelity.CHECKS,
    "performance": performance.CHECKS,
    "resources": resources.CHECKS,
    "security": security.CHECKS,
    "operation": operation.CHECKS,
}
#: What an endpoint that answers may say instead of its models, for which there is a report and no error: kind
#: of failure → group and name of what has failed.
_REFUSALS = {
    "401": ("security", "the right key is taken"),
    "429": ("security", "the list of models"),
    "4xx": ("operation", "the list of models"),
    "5xx": ("operation", "the list of models"),
    "timeout": ("operation", "the list of models"),
}


@dataclass(frozen=True)
class CheckRequest:
    """What is checked; see :class:`quant.serving.check.context.Context`.

    Attributes:
        groups: those to walk; empty: all.
        pid: process of the endpoint's server on this machine, which is ended at the last.
    """

    profile: Profile = field(default_factory=Profile)
    checkpoint: Path | None = None
    log: Path | None = None
    gateway: str | None = None
    probes: Path | None = None
    soak: float | None = None
    gpu: str | None = None
    groups: tuple[str, ...] = ()
    pid: int | None = None

    def prepare(self) -> None:
        """Looks at the files that are named, before anything is asked.

        Raises:
            UsageError: one cannot be read, or is not what it must be.
            Problems: the checkpoint's file is not what its config.json says: nothing can be compared with it.
        """
        if self.checkpoint is not None:
            demand_agreement(open_checkpoint(self.checkpoint), build=False)
        if self.log is not None:
            try:
                first_lines(self.log)
            except Skip as error:
                raise UsageError(str(error)) from error
        if self.probes is not None:
            security.read_probes(self.probes)
        if self.gateway is not None:
            endpoint_url(self.gateway, "--gateway")


def check_endpoint(endpoint: Endpoint, request: CheckRequest, *, progress: Progress = silent) -> CheckReport:
    """Checks an endpoint, which is left as it is, unless its process is named.

    Raises:
        EndpointError: there is none, or not an OpenAI-compatible one, or it lacks the model asked for.
        UsageError: see :meth:`CheckRequest.prepare`.
    """
    request.prepare()
    foreign = None
    if request.pid is not None:
        if not endpoint.local:
            raise UsageError(f"--pid is {request.pid}: --url {endpoint.url} is another machine's")
        foreign = ForeignServer.that_serves(request.pid, endpoint.url)
    lines = first_lines(request.log) if request.log is not None else []
    return asyncio.run(_check(endpoint, request, progress, start_of_log=lines, foreign=foreign))


def check_checkpoint(
    deployment: Deployment,
    request: CheckRequest,
    endpoint: Endpoint,
    *,
    python: str | Path | None = None,
    timeout: float = defaults.START_TIMEOUT,
    exact: bool = False,
    log: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> CheckReport:
    """Starts vLLM on a checkpoint with a key, checks it, which ends and starts it once more, and stops it.

    Args:
        endpoint: how it is asked; its address, model and key are the server's.
        python, timeout, exact, log: see :func:`quant.serving.process.running`.

    Raises:
        ServerError: it did not start.
        UsageError: see :meth:`CheckRequest.prepare`.
        Interrupted: a signal arrived.
    """
    request.prepare()
    key = endpoint.api_key or (None if deployment.api_key_env else secrets.token_urlsafe(24))
    with running(deployment, python=python, timeout=timeout, exact=exact, api_key=key, log=log) as (
        server,
        installation,
    ):
        at = replace(endpoint, url=server.url, model=server.name, api_key=server.api_key)
        facts = {
            "vllm_version": installation.version,
            "command": server.command,
            "load_seconds": round(server.load_seconds, 2),
        }
        lines = list(server.lines)  # later ones push them out
        return asyncio.run(_check(at, request, progress, lines, server, timeout, facts))


async def _check(
    endpoint: Endpoint,
    request: CheckRequest,
    progress: Progress,
    start_of_log: Sequence[str] = (),
    server: Server | None = None,
    started: float = defaults.START_TIMEOUT,
    facts: dict[str, Any] | None = None,
    foreign: ForeignServer | None = None,
) -> CheckReport:
    begun = time.monotonic()
    profile = request.profile
    gateway = None if request.gateway is None else endpoint_url(request.gateway, "--gateway")
    async with endpoint.client() as client:
        context = Context(
            endpoint, client, profile, None, request.checkpoint, server, started, request.log, start_of_log,
            gateway, request.probes, request.soak, request.gpu,
            foreign, progress, dict(facts or {}),
        )  # fmt: skip
        progress(Event("asking for the model", detail=endpoint.url))
        refusal = await _reach(context)
        findings = []
        for group, rows in GROUPS.items():
            if request.groups and group not in request.groups:
                continue
            for row in rows:
                if refusal is not None:
                    skipped = Finding(row.name, "SKIP", f"{refusal.name}: it was refused", group=group)
                    own = (refusal.group, refusal.name) == (group, row.name)
                    findings += [] if own else [skipped]
                    continue
                progress(Event(row.name))
                findings += [replace(f, group=group) for f in await _walk(context, row)]
                if server is not None and server.interrupted is not None:
                    raise Interrupted("interrupted: the server has been stopped")
    context.facts |= {"max_model_len": context.length, "seconds": round(time.monotonic() - begun, 2)}
    return CheckReport(
        context.endpoint.url,
        context.endpoint.model,
        profile.model_dump(),
        tuple([refusal] if refusal else []) + tuple(findings),
        context.facts,
    )


async def _reach(context: Context) -> Finding | None:
    """Fills in the model and its length.

    Returns:
        what has failed, where the endpoint is there and refuses to tell.

    Raises:
        EndpointError: see :func:`check_endpoint`.
    """
    endpoint = context.endpoint
    try:
        context.endpoint = await asyncio.wait_for(resolve(context.client, endpoint), 2 * endpoint.stall)
        listed = (await context.send("GET", "/v1/models")).object()
    except asyncio.TimeoutError:
        error: QuantError = EndpointError(f"{endpoint.url}/v1/models does not end its answer", "timeout")
    except Unexpected as failed:
        error = EndpointError(str(failed), "5xx")
    except EndpointError as failed:
        error = failed
    else:
        mine = [m for m in listed["data"] if isinstance(m, dict) and m.get("id") == context.endpoint.model]
        length = mine[0].get("max_model_len") if mine else None
        context.length = length if isinstance(length, int) and length > 0 else None
        return None
    kind = getattr(error, "kind", "")
    if kind not in _REFUSALS:
        raise error
    group, name = _REFUSALS[kind]
    return Finding(name, "FAIL", str(error), todo="nothing else can be checked until it answers", group=group)


async def _of(row: Check, context: Context) -> Sequence[Finding]:
    return await row.run(context)


async def _walk(context: Context, row: Check) -> Sequence[Finding]:
    """One row: whatever the endpoint answers, a finding, and an end in time."""
    seconds = row.seconds(context)
    try:
        return await asyncio.wait_for(_of(row, context), seconds if math.isfinite(seconds) else None)
    except Skip as reason:
        return [Finding(row.name, "SKIP", str(reason))]
    except asyncio.TimeoutError:
        text = f"no end within {format_seconds(seconds)}"
        return [Finding(row.name, "FAIL", text, todo="the endpoint is overloaded or hangs: see its log")]
    except QuantError as error:
        return [Finding(row.name, "FAIL", str(error).splitlines()[0], todo="see the endpoint's log")]
    except Exception as error:  # an answer of a kind that nobody thought of is the endpoint's fault
        text = f"the answer is not understood: {type(error).__name__}: {clipped(first_line(error))}"
        return [Finding(row.name, "FAIL", text, todo="see what answers at that address")]
