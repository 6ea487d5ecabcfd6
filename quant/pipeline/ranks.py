"""Several processes at work on one job, each with a device of its own: ranks, in the words of
``torch.distributed``.

Every rank runs the same loop over the same blocks. What differs is which rows of the calibration text go
through them: a rank has some of the fixed parts of :mod:`quant.calibration.parts`, so that sums are those of
a single process bit for bit. Weights are solved by fixed slices of their rows, of which each rank has some.
All ranks know all results and go on with the same block; rank 0 alone keeps the journal. :data:`ALONE` is the
single process, whose exchanges are nothing.

Ranks are started by ``--devices`` (rank 0 is the command itself, :func:`started`), or by ``torchrun``, which
says in environment variables who is who (:mod:`quant.torchrun`). They talk through gloo, over the loopback
device or the network, with tensors in host memory: what is exchanged for a block are its sums and its codes,
a small part of what is computed for them.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import torch

from quant.accelerator import device_of
from quant.calibration.parts import A, Node, PartSums, Tree, own_parts, tree_nodes
from quant.calibration.statistics import Statistics
from quant.errors import QuantError, RankLost, UsageError
from quant.pipeline.memory import at_load
from quant.recipe import Recipe
from quant.torchrun import Seat, device_names, seat

T = TypeVar("T")

#: A rank that says nothing for so long is lost; one that ends is noticed at once.
_SILENCE = timedelta(hours=1)
#: What a rank has to find rank 0, and the seconds that one has to end when it is told to.
_START, _END = timedelta(minutes=5), 5.0
#: Exit status of a rank that has lost the others.
_LOST = 75
#: Linux's number for the signal that a process gets when the one that started it ends (prctl(2)).
_PDEATHSIG = 1


@dataclass(frozen=True)
class Ranks:
    """Which process this is of how many; the methods are what they say to each other. Those of a single
    process say nothing."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def own(self, count: int) -> range:
        """Of so many things in a row those that are this rank's: neighbours, and as many as any other has, or
        one less."""
        return own_parts(count, self.rank, self.size)

    def exchange(self, value: T) -> list[T]:
        """What every rank says, in their order; tensors come on this rank's device."""
        return [value]

    def told(self, value: T) -> T:
        """What rank 0 says; the other ranks' ``value`` is of no account."""
        return value

    def send(self, value: object, to: int) -> None:
        """Says something to one rank, that waits for it with :meth:`receive`."""
        raise NotImplementedError

    def receive(self, source: int) -> Any:
        """What a rank says to this one."""
        raise NotImplementedError

    def total(self, sums: PartSums[A], parts: int) -> Statistics:
        """The statistics of all ``parts``, of which each rank has summed its own."""
        return sums.finish()

    def total_for(self, rank: int, sums: PartSums[A], parts: int) -> Statistics | None:
        """:meth:`total` for one rank; None for the others, which let go of their sums."""
        return sums.finish()

    def largest(self, value: torch.Tensor | None) -> torch.Tensor | None:
        """Of each element the largest of all ranks."""
        return value

    def agree(self, facts: Mapping[str, Any]) -> None:
        """
        Raises:
            QuantError: the ranks' facts differ, so that they would not compute the same.
        """


#: The only rank.
ALONE = Ranks()


class _Group(Ranks):
    """Ranks that talk through ``torch.distributed``; every method but the first three is called by all ranks
    at the same places of their work, or waits for the one that it is with."""

    def exchange(self, value: T) -> list[T]:
        import torch.distributed as distributed

        made: list[Any] = [None] * self.size
        with self._heard():
            distributed.all_gather_object(made, _packed(value))
        return [value if r == self.rank else _unpacked(x, self.device) for r, x in enumerate(made)]

    def told(self, value: T) -> T:
        import torch.distributed as distributed

        said: list[Any] = [_packed(value) if self.first else None]
        with self._heard():
            distributed.broadcast_object_list(said)
        made: T = value if self.first else _unpacked(said[0], self.device)
        return made

    def send(self, value: object, to: int) -> None:
        import torch.distributed as distributed

        with self._heard():
            distributed.send_object_list([_packed(value)], to)

    def receive(self, source: int) -> Any:
        import torch.distributed as distributed

        said: list[Any] = [None]
        with self._heard():
            distributed.recv_object_list(said, source)
        return _unpacked(said[0], self.device)

    def total(self, sums: PartSums[A], parts: int) -> Statistics:
        return self._spread(self._at_first(sums, parts) or sums.empty()).finish()

    def total_for(self, rank: int, sums: PartSums[A], parts: int) -> Statistics | None:
        whole = self._at_first(sums, parts)
        if rank == 0:
            return None if whole is None else whole.finish()
        if whole is not None:
            self._send_sums(whole, rank)
        return self._receive_sums(sums.empty(), 0).finish() if self.rank == rank else None

    def _at_first(self, sums: PartSums[A], parts: int) -> A | None:
        """The sums of all parts at rank 0; None at the others."""

        def add(left: Node[_Sum[A]], right: Node[_Sum[A]]) -> _Sum[A]:
            to, source = left.value, right.value
            if to.rank == source.rank:
                if to.sums is not None and source.sums is not None:
                    to.sums.merge(source.sums)
            elif self.rank == source.rank and source.sums is not None:
                self._send_sums(source.sums, to.rank)
            elif self.rank == to.rank and to.sums is not None:
                to.sums.merge(self._receive_sums(sums.empty(), source.rank))
            return to

        mine = {node.start: node.value for node in sums.nodes()}
        tree: Tree[_Sum[A]] = Tree(add)
        for rank in range(self.size):
            for start, size in tree_nodes(replace_rank(self, rank).own(parts)):
                tree.push(Node(start, size, _Sum(rank, mine.pop(start) if rank == self.rank else None)))
        return tree.whole().sums

    def _spread(self, whole: A) -> A:
        """What rank 0 has summed up, at every rank."""
        import torch.distributed as distributed

        state = whole.state()
        counts, shapes = self.told((whole.counts, {n: tuple(t.shape) for n, t in state.items()}))
        made = {}
        for name, shape in shapes.items():
            held = state[name].cpu() if self.first else torch.empty(shape)
            with self._heard():
                distributed.broadcast(held, 0)
            made[name] = state[name] if self.first else held.to(state[name].device)
        whole.restore(counts, made)
        return whole

    def _send_sums(self, sums: A, to: int) -> None:
        import torch.distributed as distributed

        state = sums.state()
        self.send((sums.counts, {n: tuple(t.shape) for n, t in state.items()}), to)
        for value in state.values():
            with self._heard():
                distributed.send(value.cpu(), to)

    def _receive_sums(self, empty: A, source: int) -> A:
        import torch.distributed as distributed

        counts, shapes = self.receive(source)
        state = empty.state()
        made = {}
        for name, shape in shapes.items():
            held = torch.empty(shape)
            with self._heard():
                distributed.recv(held, source)
            made[name] = held.to(state[name].device)
        empty.restore(counts, made)
        return empty

    def largest(self, value: torch.Tensor | None) -> torch.Tensor | None:
        if value is None:
            return None
        return torch.stack(self.exchange(value)).amax(0)

    def agree(self, facts: Mapping[str, Any]) -> None:
        for rank, other in enumerate(self.exchange(dict(facts))):
            if differ := [key for key in facts if facts[key] != other.get(key)]:
                key = differ[0]
                raise QuantError(
                    f"rank {self.rank} and rank {rank} differ in {key} ({facts[key]!r} and "
                    f"{other.get(key)!r}): ranks compute the same only on machines of one "
                    "kind, with the same files and threads"
                )

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """
        Raises:
            RankLost: another rank has ended.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RankLost(self.rank, self.size) from error


@dataclass(frozen=True)
class _Sum(Generic[A]):
    """A node's sum where this rank has it, and the rank that does."""

    rank: int
    sums: A | None


def replace_rank(ranks: Ranks, rank: int) -> Ranks:
    """Another rank of the same group, for what it owns."""
    return Ranks(rank, ranks.size)


@dataclass(frozen=True)
class _Stored:
    """A tensor's numbers on their way: pickle itself knows not all dtypes."""

    data: bytes
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Stored:
        flat = tensor.detach().cpu().contiguous().view(-1)
        return cls(flat.view(torch.uint8).numpy().tobytes(), tensor.dtype, tuple(tensor.shape))

    def tensor(self, device: torch.device | None) -> torch.Tensor:
        if not self.data:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        flat = torch.frombuffer(bytearray(self.data), dtype=torch.uint8)
        return flat.view(self.dtype).view(self.shape).to(device or "cpu")


def _changed(value: Any, kind: type, change: Callable[[Any], object]) -> Any:
    """The same with everything of a kind changed, in lists, tuples, dicts and dataclasses."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_changed(x, kind, change) for x in value)
    if isinstance(value, dict):
        return {k: _changed(x, kind, change) for k, x in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        made = {k: _changed(x, kind, change) for k, x in parts.items()}
        return replace(value, **made) if any(made[k] is not parts[k] for k in made) else value
    return value


def _packed(value: object) -> bytes:
    return pickle.dumps(_changed(value, torch.Tensor, _Stored.of))


def _unpacked(data: bytes, device: torch.device | None) -> Any:
    return _changed(pickle.loads(data), _Stored, lambda stored: stored.tensor(device))


# --- which ranks there are ----------------------------------------------------------------------------------


def devices_of(recipe: Recipe) -> list[torch.device]:
    """The device of each rank that ``--devices`` starts, or the one of ``--device``.

    Raises:
        UsageError: a device that is not here or stands twice, devices of several kinds, or ``--device``
            beside them.
    """
    if recipe.devices is None:
        return [device_of(recipe.device)]
    asked = f"--devices is {recipe.devices!r}"
    if recipe.device is not None:
        raise UsageError(f"{asked} and --device {recipe.device!r}: give one of the two")
    if seat() is not None:
        raise UsageError(f"{asked} under torchrun, which starts a process for each device: leave it out")
    names = device_names(recipe.devices)
    if not all(names):
        raise UsageError(f"{asked}: name devices between commas, such as 0,1 or cpu,cpu")
    try:
        devices = [device_of(name) for name in names]
    except UsageError as error:
        raise UsageError(str(error).replace("--device is", f"{asked}:", 1)) from error
    kinds = dict.fromkeys(d.type for d in devices)
    if len(kinds) > 1:
        raise UsageError(f"{asked}: {' and '.join(kinds)} round differently; all must be of one kind")
    if kinds.keys() != {"cpu"}:
        devices = [torch.device(d.type, d.index or 0) for d in devices]
        if twice := [str(d) for i, d in enumerate(devices) if d in devices[:i]]:
            raise UsageError(f"{asked}: {twice[0]} stands twice; each rank needs a device of its own")
    return devices


def asked_ranks(recipe: Recipe) -> int:
    """How many processes a job is divided among."""
    place = seat()
    return place.size if place is not None else len(devices_of(recipe))


def ranks_beside(recipe: Recipe) -> int:
    """How many of them share the memory of one machine."""
    place = seat()
    return asked_ranks(recipe) if place is None else int(os.environ.get("LOCAL_WORLD_SIZE", place.size))


def _own_device(recipe: Recipe, place: Seat) -> torch.device:
    """The device of a rank that torchrun started."""
    device = device_of(recipe.device)
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise UsageError(
            f"--device is {recipe.device!r} under torchrun: every rank would take it; name the kind alone"
        )
    return device_of(f"{device.type}:{place.local}")


# --- ranks that run -----------------------------------------------------------------------------------------


@contextmanager
def started(recipe: Recipe, helper: Callable[..., object], *given: object) -> Iterator[Ranks]:
    """The ranks of a job while it runs: this process's place among those of torchrun; or rank 0 of those that
    are started here, each of which calls ``helper(ranks, *given)``, and end with it.

    Raises:
        RankLost: a rank ended before its work was done.
    """
    place = seat()
    if place is not None:
        devices_of(recipe)
        with _joined(place.rank, place.size, _own_device(recipe, place)) as ranks:
            yield ranks
        return
    devices = devices_of(recipe)
    if len(devices) == 1:
        yield replace(ALONE, device=devices[0])
        return
    store, threads = _store(len(devices)), _threads(devices)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    context, helpers, words = multiprocessing.get_context("spawn"), [], []
    for rank, device in enumerate(devices[1:], 1):
        ear, mouth = context.Pipe(duplex=False)
        about = (os.getpid(), rank, len(devices), device, store.port, threads, mouth)
        name = f"rank {rank} ({device})"
        helpers.append(context.Process(target=_help, args=(*about, helper, given), name=name, daemon=True))
        words.append(ear)
    try:
        with at_load():
            for process in helpers:
                process.start()
        _wait_for(helpers, store)
        with _joined(0, len(devices), devices[0], store) as ranks:
            yield ranks
        for process in helpers:
            process.join(_END)
    except RankLost as error:
        raise _explained(error, helpers, words) from error
    finally:
        torch.set_num_threads(before)
        for process in helpers:
            if process.is_alive():
                process.terminate()
        for process in helpers:
            process.join(_END)
            if process.is_alive():
                process.kill()
                process.join()


def _threads(devices: Sequence[torch.device]) -> int:
    """Threads of each rank: on CPUs they share the cores, unless OMP_NUM_THREADS says how many each has."""
    threads = torch.get_num_threads()
    if devices[0].type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return threads
    return max(1, threads // len(devices))


def _explained(error: RankLost, helpers: Sequence[Any], words: Sequence[Connection]) -> RankLost:
    """The same with the ranks that have ended and what they said last; one that has lost the others itself
    says nothing."""
    deadline = time.monotonic() + _END
    while time.monotonic() < deadline and all(p.is_alive() for p in helpers):
        time.sleep(0.05)
    ended = []
    for process, said in zip(helpers, words, strict=True):
        if process.exitcode == _LOST or process.exitcode is None:
            continue
        last = said.recv() if process.exitcode > 0 and said.poll() else ""
        ended.append(f"{process.name} ended {last and 'with: '}{last or _how(process.exitcode)}")
    return RankLost(error.rank, error.size, "; ".join(ended))


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"


@contextmanager
def _joined(rank: int, size: int, device: torch.device, store: Any = None) -> Iterator[Ranks]:
    """This process among the others; ``store``: where they find each other; None: as torchrun's environment
    says."""
    import torch.distributed as distributed

    try:
        if store is None:
            distributed.init_process_group("gloo", rank=rank, world_size=size, timeout=_SILENCE)
        else:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_SILENCE)
    except (RuntimeError, ValueError) as error:
        raise RankLost(rank, size) from error
    try:
        yield _Group(rank, size, device)
    finally:
        distributed.destroy_process_group()


def _store(size: int, port: int = 0) -> Any:
    """Where ranks of this machine find each other: made by rank 0, at a free port, or found at its port."""
    import torch.distributed as distributed

    first = port == 0
    return distributed.TCPStore("127.0.0.1", port, size, first, _START, wait_for_workers=False)


def _wait_for(helpers: Sequence[Any], store: Any) -> None:
    """Returns when all ranks are there.

    Raises:
        RankLost: one has ended before.
    """
    size = len(helpers) + 1
    while not store.check([_here(rank) for rank in range(1, size)]):
        if any(p.exitcode is not None for p in helpers):
            raise RankLost(0, size)
        time.sleep(0.02)


def _here(rank: int) -> str:
    """The key by which a rank says that it is there."""
    return f"rank {rank}"


def _help(
    parent: int,
    rank: int,
    size: int,
    device: torch.device,
    port: int,
    threads: int,
    words: Connection,
    helper: Callable[..., object],
    given: Sequence[object],
) -> None:
    """A process that :func:`started` starts."""
    _end_with(parent)
    # Ctrl-C goes to every process of a terminal; rank 0 ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    try:
        store = _store(size, port)
        store.set(_here(rank), "")
        with _joined(rank, size, device, store) as ranks:
            helper(ranks, *given)
    except RankLost:  # which rank 0 tells, or it is rank 0 that has ended
        os._exit(_LOST)
    except (QuantError, OSError, MemoryError) as error:
        words.send(str(error) or type(error).__name__)
        os._exit(1)


def _end_with(parent: int) -> None:
    """Has the system end this process when ``parent`` ends, in whatever way."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os._exit(1)
