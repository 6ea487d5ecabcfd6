"""``quant batch``."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quant.commands.terminal import RUN_AGAIN, Output, Terminated, common_options
from quant.commands.types import PATH, Size
from quant.errors import QuantError, UsageError

if TYPE_CHECKING:
    from quant.batch.run import State


@click.command()
@click.argument("manifest", metavar="MANIFEST.yaml", type=PATH)
@click.option(
    "--executor",
    type=click.Choice(["local", "ray", "slurm", "kubernetes"]),
    default="local",
    show_default=True,
    help="Where jobs run: on this machine, or on a cluster whose machines share the manifest's folders.",
)
@click.option(
    "--address",
    metavar="HOST:PORT",
    show_default="RAY_ADDRESS, else a cluster of this machine for the time of the batch",
    help="--executor ray: a running cluster; auto for that of this machine.",
)
@click.option(
    "--submit-argument",
    metavar="WORD",
    multiple=True,
    help="--executor slurm, kubernetes: a further argument of sbatch or kubectl, such as --partition=gpu; "
    "repeatable.",
)
@click.option("--image", help="--executor kubernetes: the container image that has this program.")
@click.option(
    "--shared-claim",
    metavar="NAME",
    help="--executor kubernetes: the PersistentVolumeClaim that holds the folder above the manifest, the "
    "models and the outputs.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    show_default="as many as there are cores for the threads of a job, and one for each GPU",
    help="Most jobs at once.",
)
@click.option(
    "--max-memory",
    type=Size(),
    show_default="what is available at the start",
    help="Memory that the work may take, of all its processes together.",
)
@click.option(
    "--ledger",
    type=PATH,
    show_default="MANIFEST.batch beside the manifest",
    help="Folder of what is done and who does what; processes of several machines may share it.",
)
@click.option("--job", metavar="NAME", multiple=True, help="A job by its name; repeatable.")
@click.option(
    "--dry-run", is_flag=True, help="Check everything, predict bytes, memory and time, write nothing."
)
@common_options
def batch(
    out: Output,
    manifest: Path,
    executor: str,
    address: str | None,
    submit_argument: tuple[str, ...],
    image: str | None,
    shared_claim: str | None,
    jobs: int | None,
    max_memory: int | None,
    ledger: Path | None,
    job: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Run the jobs of a manifest: models by schemes, with recipes and gates. One failure never stops the
    rest, and the same command again goes on where it stopped. With --json one object a line, the summary
    last.

    \b
    quant batch configs/batch.yaml --dry-run
    quant batch nightly.yaml --jobs 2 --max-memory 100GiB
    """
    if address is not None and executor != "ray":
        raise UsageError("--address is a Ray cluster's: add --executor ray, or leave it out")
    if submit_argument and executor not in ("slurm", "kubernetes"):
        raise UsageError("--submit-argument is for --executor slurm or kubernetes: leave it out")
    if executor == "kubernetes" and not (image and shared_claim):
        raise UsageError("--executor kubernetes needs --image and --shared-claim")
    if executor != "kubernetes" and (image or shared_claim):
        raise UsageError("--image and --shared-claim are for --executor kubernetes: leave them out")
    from quant.batch.session import run_manifest
    from quant.commands.render import batch as render

    stop, lock = threading.Event(), threading.Lock()
    board = render.Board(out)
    with _asked_to_end(stop) as asked, board:

        def told(kind: str, state: State) -> None:
            if out.json:
                with lock:  # dry runs are told of by several threads
                    out.result({"event": kind, **state.to_dict()}, lambda console: None)
            board.told(kind, state)

        done = run_manifest(
            manifest,
            executor=executor,
            address=address,
            extra=submit_argument,
            image=image or "",
            claim=shared_claim or "",
            jobs=jobs,
            max_memory=max_memory,
            ledger=ledger,
            only=job,
            dry_run=dry_run,
            stop=stop,
            told=told,
            watched=board.watch,
        )
    value = {"event": "summary", **done.to_dict()}
    out.result(value, lambda console: render.summary(console, done, dry_run))
    if asked:
        raise KeyboardInterrupt if asked[0] == signal.SIGINT else Terminated
    if done.of("submitted") or done.of("elsewhere"):
        out.note("not all jobs have ended: the same command again says what became of them")
        raise click.exceptions.Exit(RUN_AGAIN)
    if failed := done.of("failed"):
        raise QuantError(f"{len(failed)} of {len(done.states)} jobs failed, for the reasons above")


@contextmanager
def _asked_to_end(stop: threading.Event) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM set ``stop``, so that jobs end with their work kept; the signals that came are in
    the list. A second one does not wait for them."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals are not this thread's
        yield asked
        return

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        stop.set()
        if len(asked) > 1:
            raise KeyboardInterrupt

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
