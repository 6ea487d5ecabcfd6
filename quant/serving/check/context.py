"""What every check is given: the endpoint, what is known of it, and a way to ask it that always ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from quant.errors import clipped, first_line
from quant.progress import Event, Progress, silent
from quant.serving.check.profile import Profile
from quant.serving.check.value import Skip, Unexpected
from quant.serving.client import KINDS, Endpoint, fetch, said_by, transport_kind

if TYPE_CHECKING:
    import httpx2 as httpx

    from quant.hardware import Gpu
    from quant.serving.foreign import ForeignServer
    from quant.serving.process import Server

T = TypeVar("T")
#: Bytes at the beginning of a log in which the start is told.
_START_OF_LOG = 8 << 20


@dataclass(frozen=True)
class Reply:
    """An answer of any status; ``value`` is its JSON, None where it is none."""

    route: str
    status: int
    value: Any
    text: str

    @property
    def refused(self) -> bool:
        """Whether the request was refused as a client's mistake."""
        return 400 <= self.status < 500

    def __str__(self) -> str:
        return f"{self.route} answered {self.status}: {said_by(self.text[:2000])}"

    def object(self) -> dict[str, Any]:
        """The JSON object of a good answer.

        Raises:
            Unexpected: another status, or no JSON object.
        """
        if self.status != 200:
            raise Unexpected(str(self))
        if not isinstance(self.value, dict):
            raise Unexpected(f"{self.route} answered no JSON object: {clipped(self.text[:200])}")
        return self.value

    def choice(self) -> dict[str, Any]:
        """The first choice of a completion.

        Raises:
            Unexpected: there is none.
        """
        choices = self.object().get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise Unexpected(f"{self.route} answered without choices: {clipped(self.value)}")
        return choices[0]

    def content(self) -> str:
        """The text of the first choice, of a completion or of a chat."""
        choice = self.choice()
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else choice.get("text")
        return text if isinstance(text, str) else ""

    def prompt_tokens(self) -> int:
        """How many tokens the endpoint counted in the prompt.

        Raises:
            Skip: it does not count.
        """
        usage = self.object().get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if not isinstance(counted, int):
            raise Skip("the endpoint does not count tokens (usage)")
        return counted


@dataclass
class Context:
    """
    Attributes:
        endpoint: with the model's name.
        length: longest context that the endpoint takes, in tokens; None where it does not say.
        checkpoint: what the endpoint should serve.
        server: the vLLM that was started for the check; None where the endpoint is another's, which is never
            stopped.
        foreign: another's server of this machine that may be ended; it is not started again.
        started: seconds that it may take to start.
        log: the log of another's server; ``start_of_log`` are the first lines of that, or of our server's.
        gateway: address in front of the endpoint that limits the rate.
        probes: file of prompts that a filter must stop.
        soak: seconds of load for the slope of memory.
        gpu: name of the GPU that it was planned for; None: those here, where the endpoint is.
    """

    endpoint: Endpoint
    client: httpx.AsyncClient
    profile: Profile
    length: int | None = None
    checkpoint: Path | None = None
    server: Server | None = None
    started: float = 600.0
    log: Path | None = None
    start_of_log: Sequence[str] = ()
    gateway: str | None = None
    probes: Path | None = None
    soak: float | None = None
    gpu: str | None = None
    foreign: ForeignServer | None = None
    progress: Progress = silent
    facts: dict[str, Any] = field(default_factory=dict)

    def say(self, phase: str, done: float = 0, total: float = 0) -> None:
        self.progress(Event(phase, done, total))

    @property
    def held(self) -> Server | ForeignServer | None:
        """The server whose processes are known here."""
        return self.server if self.server is not None else self.foreign

    def needs_checkpoint(self) -> Path:
        """
        Raises:
            Skip: none is given.
        """
        if self.checkpoint is None:
            raise Skip("no --checkpoint is given to compare with")
        return self.checkpoint

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's.

        Raises:
            Skip: there is no checkpoint, or no tokenizer in it that can be loaded here.
        """
        from quant.errors import CheckpointError
        from quant.offline import load_tokenizer

        try:
            return load_tokenizer(self.needs_checkpoint())
        except CheckpointError as error:
            raise Skip(str(error)) from error

    @property
    def gpus(self) -> list[Gpu]:
        """The GPUs that the endpoint was planned for: those named, else those of this machine where it runs
        here; a CPU where its log says so; empty where they are not known."""
        from quant.hardware import cpu_device, detect, named_gpu
        from quant.vllm.log import on_cpu

        if self.gpu is not None:
            return [named_gpu(self.gpu)]
        if on_cpu(self.start_of_log):
            return [cpu_device()]
        return list(detect().gpus) if self.endpoint.local else []

    async def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        base: str | None = None,
        client: httpx.AsyncClient | None = None,
        limit: float | None = None,
    ) -> Reply:
        """One request and its whole answer.

        Args:
            body: sent as JSON; ``content``: sent as it is.
            base: address instead of the endpoint's.
            client: another one, such as without the key.
            limit: seconds until the whole answer must be there; None: those of the endpoint's ``stall``.

        Raises:
            Unexpected: no answer within ``limit``, or none at all; with what to do.
        """
        sent = {"content-type": "application/json"} if content is not None else {}
        limit = self.endpoint.stall if limit is None else limit
        url = (base or self.endpoint.url) + path
        try:
            response, text = await fetch(
                client or self.client, method, url, limit,
                json=body, content=content, headers={**sent, **(headers or {})},
            )  # fmt: skip
        except asyncio.TimeoutError as error:
            raise Unexpected(f"{path} was not answered within {limit:g} s: {KINDS['timeout']}") from error
        except Exception as error:  # whatever a transport raises
            kind = transport_kind(error)
            raise Unexpected(f"{path}: {kind}: {first_line(error)}: {KINDS[kind]}") from error
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        return Reply(path, response.status_code, value, text)

    async def complete(self, prompt: Any, tokens: int = 1, **more: Any) -> Reply:
        """A greedy completion that is not streamed."""
        body = {"model": self.endpoint.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        return await self.send("POST", "/v1/completions", body | more)

    async def chat(self, messages: Sequence[Mapping[str, Any]], tokens: int = 1, **more: Any) -> Reply:
        """A greedy answer of a chat that is not streamed."""
        body = {
            "model": self.endpoint.model,
            "messages": list(messages),
            "max_tokens": tokens,
            "temperature": 0,
        }
        return await self.send("POST", "/v1/chat/completions", body | more)


def first_lines(path: Path) -> list[str]:
    """The beginning of a server's log, in which its start is told.

    Raises:
        Skip: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(_START_OF_LOG).decode(errors="replace").splitlines()
    except OSError as error:
        raise Skip(f"--log is {str(path)!r}: {error.strerror}") from error


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of work done at once; the first that fails ends the others."""
    tasks = [asyncio.create_task(w) for w in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
