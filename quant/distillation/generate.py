"""Text for a student, made by its teacher: an OpenAI-compatible endpoint answers seed tasks, and what is too
short, repeats itself or was said before is left out.

Answers are kept raw, one line each as they come, beside the output; a run that was killed, or whose endpoint
died, asks for the missing ones alone. Filters are applied to all of them at the end, in the order of the
tasks, so that what comes out does not depend on which answer came first.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.checkpoint.writer import write_text
from quant.errors import DiskFull, InUse, QuantError, UsageError
from quant.progress import Event, Progress, silent
from quant.serving.client import KINDS, Endpoint, EndpointError, Prompt, Trace, ask, resolve
from quant.serving.prompts import read_prompts

#: Words of a run by which answers are told to be alike.
_RUN = 8
#: Share of an answer's runs that others had before, from which on it is a near copy; and share of its own
#: runs that differ, below which it repeats itself.
_COPIED, _DIFFERENT = 0.8, 0.3
#: Seconds between two attempts at a request; and requests in a row that fail after all of theirs, after which
#: the endpoint counts as gone.
_PAUSES = (0.5, 2.0)
_IN_A_ROW = 3
#: Failures that will be the same next time, whatever is asked; and that of one request, as where a task is
#: beyond the endpoint's context.
_FINAL, _REFUSED = frozenset({"401", "404", "3xx", "tls", "no stream", "miscounted"}), "4xx"
#: Refusals in a row after which a run ends, or that share of the answers that came before, where it is more:
#: of many tasks some in a row may be too long. And those whose reasons are told one by one.
_REFUSALS, _REFUSED_SHARE, _TOLD = 10, 0.1, 3


@dataclass(frozen=True)
class Generation:
    """What is asked, and what of the answers stays.

    Attributes:
        tasks: file of seed tasks, one a line: text, or JSON with ``prompt`` or ``messages``.
        answers: to each task.
        concurrency: requests at a time.
        max_tokens: of an answer.
        temperature, seed: of the sampling; each answer has a seed of its own.
        shortest: characters below which an answer is left out.
    """

    tasks: Path
    answers: int = 1
    concurrency: int = 8
    max_tokens: int = 512
    temperature: float = 0.7
    seed: int = 0
    shortest: int = 20

    def __post_init__(self) -> None:
        for name, least, most in (
            ("answers", 1, 10_000),
            ("concurrency", 1, 4096),
            ("max_tokens", 1, 1 << 20),
            ("shortest", 1, 1 << 20),
            ("seed", 0, 2**62),
        ):
            if not least <= getattr(self, name) <= most:
                named = name.replace("_", "-")
                raise UsageError(f"--{named} is {getattr(self, name)}: a number from {least} to {most}")
        if not 0 <= self.temperature <= 2:
            raise UsageError(f"--sampling-temperature is {self.temperature}: a number from 0 to 2")
        if self.answers > 1 and not self.temperature:
            raise UsageError(
                "--answers asks for several of one task: --sampling-temperature 0 makes them alike"
            )


@dataclass(frozen=True)
class Generated:
    """What was made: where, ``rows`` that stayed of ``asked``, why others did not, and tokens that the
    endpoint generated for all of them."""

    output: Path
    model: str
    asked: int
    rows: int
    dropped: Mapping[str, int]
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "output": str(self.output), "dropped": dict(self.dropped)}


def generate(
    how: Generation, endpoint: Endpoint, output: str | Path, progress: Progress = silent, fresh: bool = False
) -> Generated:
    """Writes JSON lines with what the endpoint answers to the tasks, each with where it is from.

    Raises:
        UsageError: the tasks or the output cannot be used, or unfinished work was begun otherwise.
        EndpointError: the endpoint does not answer, or ceased to: what came is kept.
        QuantError: no answer stays.
    """
    output = Path(output)
    if output.exists() or output.is_symlink():
        raise UsageError(f"--output-path is {str(output)!r}: it is there already: name another file")
    if not output.parent.is_dir():
        raise UsageError(f"--output-path is {str(output)!r}: the folder {output.parent} is not there")
    tasks = read_prompts(how.tasks, "--generate")
    endpoint, raw = asyncio.run(_asked(how, endpoint, tasks, output, progress, fresh))
    dropped: Counter[str] = Counter()
    rows = [json.dumps(row, ensure_ascii=False) for row in _kept(tasks, raw, how, endpoint, dropped)]
    tokens = sum(int(r["tokens"]) for r in raw.values())
    if not rows:
        said = ", ".join(f"{n} {why}" for why, n in dropped.items())
        raise QuantError(
            f"{output}: none of {len(raw)} answers stays ({said}): ask for more --max-tokens or less "
            f"--shortest; the answers are in {_beside(output)}"
        )
    write_text(output, "\n".join(rows) + "\n")
    _beside(output).unlink()
    return Generated(output, endpoint.model, len(tasks) * how.answers, len(rows), dict(dropped), tokens)


def _beside(output: Path) -> Path:
    return output.with_name(output.name + ".answers")


class _Answers:
    """The answers that are there, and the file that keeps each at once; its first line says how they were
    asked for."""

    def __init__(self, file: Path, head: Mapping[str, Any], fresh: bool):
        self.file, self.found = file, dict[tuple[int, int], dict[str, Any]]()
        with suppress(FileNotFoundError):
            if fresh:
                file.unlink()
        self._stream = file.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._stream.close()
            raise InUse(
                f"{file}: another run is at work on it: wait for it, or name another output"
            ) from None
        try:
            size = self._read(head)
        except UsageError:
            self._stream.close()
            raise
        self._stream.truncate(size)
        if not size:
            self._line(head)

    def _read(self, head: Mapping[str, Any]) -> int:
        """Takes over whole lines; returns how many bytes they are."""
        data = self.file.read_bytes()
        size = data.rfind(b"\n") + 1  # a line that a kill cut off is asked for again
        lines = data[:size].splitlines()
        try:
            first, *rest = [json.loads(line) for line in lines] or [None]
            found = {(int(r["task"]), int(r["answer"])): r for r in rest if isinstance(r["text"], str)}
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{self.file}: holds something else than answers: --fresh starts over") from None
        if first is None:
            return 0
        if first != head:
            changed = [k for k in head if not isinstance(first, dict) or first.get(k) != head[k]]
            raise UsageError(
                f"{self.file}: unfinished answers were asked for otherwise ({', '.join(changed)}): give "
                "the same again, or --fresh to start over"
            )
        self.found = found
        return size

    @property
    def refused(self) -> int:
        """How many of them are refusals."""
        return sum("refused" in row for row in self.found.values())

    def add(self, row: dict[str, Any]) -> None:
        self._line(row)
        self.found[row["task"], row["answer"]] = row

    def _line(self, value: Mapping[str, Any]) -> None:
        try:
            self._stream.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise DiskFull(
                f"{self.file}: cannot be written ({error.strerror or error}): free some room and run the "
                "same command again: the answers so far are kept"
            ) from error

    def close(self) -> None:
        with suppress(OSError):
            self._stream.close()


async def _asked(
    how: Generation,
    endpoint: Endpoint,
    tasks: Sequence[str | tuple[Any, ...]],
    output: Path,
    progress: Progress,
    fresh: bool,
) -> tuple[Endpoint, dict[tuple[int, int], dict[str, Any]]]:
    """Every answer by task and number, asked for or found."""
    async with endpoint.client(how.concurrency) as client:
        endpoint = await resolve(client, endpoint)
        if not endpoint.chat and any(isinstance(task, tuple) for task in tasks):
            raise UsageError("--generate holds messages: give --chat to send them to /v1/chat/completions")
        head = {
            "tasks": hashlib.sha256(json.dumps(tasks, sort_keys=True).encode()).hexdigest(),
            "model": endpoint.model,
            "chat": endpoint.chat,
            "answers": how.answers,
            "max_tokens": how.max_tokens,
            "sampling_temperature": how.temperature,
            "seed": how.seed,
        }
        answers = _Answers(_beside(output), head, fresh)
        wanted = [(t, a) for t in range(len(tasks)) for a in range(how.answers)]
        missing = [place for place in wanted if place not in answers.found]
        if answers.found:
            progress(Event("answers", message=f"{len(answers.found)} of {len(wanted)} answers are there"))
        try:
            answered = len(answers.found) - answers.refused
            async for place, trace in _each(client, endpoint, how, tasks, missing, answered):
                row = {"task": place[0], "answer": place[1]}
                if trace.error == _REFUSED:
                    answers.add({**row, "text": "", "tokens": 0, "refused": trace.detail})
                    if answers.refused <= _TOLD:
                        said = f"task {place[0]} is left out: {trace.detail}"
                        progress(Event("answers", message=said, warning=True))
                else:
                    answers.add({**row, "text": trace.text, "tokens": trace.output_tokens})
                progress(Event("answers", len(answers.found), len(wanted)))
        except EndpointError as error:
            raise EndpointError(
                f"{error}. {len(answers.found)} of {len(wanted)} answers came"
                f"{f' ({answers.refused} refused)' if answers.refused else ''} and are kept in "
                f"{answers.file}: run the same command again for the others"
                f"{'; --fresh asks for all of them again' if answers.refused else ''}",
                error.kind,
            ) from error
        finally:
            answers.close()
        return endpoint, answers.found


async def _each(
    client: Any,
    endpoint: Endpoint,
    how: Generation,
    tasks: Sequence[str | tuple[Any, ...]],
    missing: Sequence[tuple[int, int]],
    answered: int,
) -> AsyncIterator[tuple[tuple[int, int], Trace]]:
    """The missing answers as they come, and the refusals of single tasks among them.

    Args:
        answered: how many of these tasks the endpoint has answered before. Until it has one, refusals say
            nothing of single tasks.

    Raises:
        EndpointError: some failed: after all others came, or at once where one would fail again, several in
            a row did, or many in a row were refused.
    """
    waiting, running = iter(missing), set[asyncio.Task[tuple[tuple[int, int], Trace]]]()
    failed: list[Trace] = []  # all of them
    refused: list[tuple[tuple[int, int], Trace]] = []  # before the first answer
    in_a_row, refusals, fatal = 0, 0, False

    async def one(place: tuple[int, int]) -> tuple[tuple[int, int], Trace]:
        prompt = Prompt(tasks[place[0]], 0, how.max_tokens)
        # distinct for each task and answer, and the same whenever it is asked for
        sampling = {"temperature": how.temperature, "seed": how.seed + place[0] * how.answers + place[1]}
        for pause in (*_PAUSES, None):
            trace = await ask(client, endpoint, prompt, sampling=sampling)
            if trace.error in ("", "empty", _REFUSED, *_FINAL) or pause is None:
                break
            await asyncio.sleep(pause)
        return place, trace

    try:
        while not fatal:
            while len(running) < how.concurrency and (place := next(waiting, None)) is not None:
                running.add(asyncio.ensure_future(one(place)))
            if not running:
                break
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                place, trace = task.result()
                if trace.error in ("", "empty"):
                    in_a_row, refusals, answered = 0, 0, answered + 1
                    for one_refused in refused:
                        yield one_refused
                    refused.clear()
                    yield place, trace
                    continue
                if trace.error == _REFUSED:
                    refusals += 1
                    if answered:
                        yield place, trace
                    else:
                        refused.append((place, trace))
                    if refusals >= max(_REFUSALS, _REFUSED_SHARE * answered):
                        failed, fatal = [*failed, trace], True
                    continue
                failed.append(trace)
                in_a_row += 1
                fatal = fatal or trace.error in _FINAL or in_a_row >= _IN_A_ROW
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    if failed or refused:
        last = failed[-1] if failed else refused[-1][1]
        raise EndpointError(f"{endpoint.url}: {last.detail}: {KINDS[last.error]}", last.error)


def _kept(
    tasks: Sequence[str | tuple[Any, ...]],
    raw: Mapping[tuple[int, int], Mapping[str, Any]],
    how: Generation,
    endpoint: Endpoint,
    dropped: Counter[str],
) -> Iterator[dict[str, Any]]:
    """The rows that stay, in the order of the tasks; others are counted by why they do not."""
    seen, runs = set[str](), set[int]()
    for (number, answer), row in sorted(raw.items()):
        text, task = str(row["text"]), tasks[number]
        why = "refused" if "refused" in row else fault(text, task, how.shortest, seen, runs)
        if why:
            dropped[why] += 1
            continue
        if isinstance(task, tuple) or endpoint.chat:
            asked = list(task) if isinstance(task, tuple) else [{"role": "user", "content": task}]
            said: dict[str, Any] = {"messages": [*asked, {"role": "assistant", "content": text.strip()}]}
        else:
            said = {"text": task + text}
        yield said | {
            "made_by": {
                "model": endpoint.model,
                "task": number,
                "answer": answer,
                "temperature": how.temperature,
                "tokens": row["tokens"],
            }
        }


def fault(text: str, task: str | tuple[Any, ...], shortest: int, seen: set[str], runs: set[int]) -> str:
    """Why an answer is left out; empty of a good one, which is remembered in ``seen``, normalized texts, and
    ``runs``, hashes of runs of words."""
    words = re.findall(r"\w+", text.lower())
    plain = " ".join(words)
    asked = task if isinstance(task, str) else str(task[-1].get("content", ""))
    if len(text.strip()) < shortest:
        return "too short"
    if not words or "\N{REPLACEMENT CHARACTER}" in text:
        return "not text"
    if plain == " ".join(re.findall(r"\w+", asked.lower())):
        return "the task repeated"
    own = list(_runs(words))
    if len(own) > _RUN and len(set(own)) < _DIFFERENT * len(own):
        return "repeating itself"
    if plain in seen:
        return "said before"
    if len(own) > _RUN and sum(r in runs for r in set(own)) >= _COPIED * len(set(own)):
        return "nearly said before"
    seen.add(plain)
    runs.update(own)
    return ""


def _runs(words: Sequence[str]) -> Iterable[int]:
    """A hash of each run of words that stand beside one another, the same in every process."""
    for first in range(len(words) - _RUN + 1):
        line = " ".join(words[first : first + _RUN]).encode()
        yield int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "big")
