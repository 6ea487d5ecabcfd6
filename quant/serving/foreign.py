"""A server that somebody else started on this machine, told by its process id: its memory, and its end."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from quant.errors import UsageError
from quant.serving.process import resident_bytes


@dataclass(frozen=True)
class ForeignServer:
    """
    Attributes:
        process: its first process, which its supervisor would send SIGTERM; psutil tells it from another that
            is given its number later, which is never signalled.
    """

    process: psutil.Process

    @classmethod
    def that_serves(cls, pid: int, url: str) -> ForeignServer:
        """The process of that number, where it, or one that it started, is what answers at an address, so
        that nothing else is ended.

        Raises:
            UsageError: it is not there, cannot be looked into, or listens elsewhere.
        """
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            server = cls(psutil.Process(pid))
            ports = {p for member in server._members() for p in _listening(member)}
        except psutil.AccessDenied as error:
            raise UsageError(f"--pid is {pid}: that process is another user's") from error
        except psutil.NoSuchProcess as error:
            raise UsageError(f"--pid is {pid}: there is no such process") from error
        if port not in ports:
            said = ", ".join(map(str, sorted(ports))) or "no port"
            raise UsageError(f"--pid is {pid}: it listens on {said}, not on {port} of --url {url}")
        return server

    def _members(self) -> list[psutil.Process]:
        """
        Raises:
            psutil.NoSuchProcess: the first has ended.
        """
        return [self.process, *self.process.children(recursive=True)]

    @property
    def alive(self) -> bool:
        """Whether its first process runs."""
        try:
            return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    @property
    def resident_bytes(self) -> int:
        """Memory of all its processes together; pages that they share count in each."""
        try:
            return resident_bytes(self._members())
        except psutil.NoSuchProcess:
            return 0

    def ask_to_end(self, first_alone: bool = True) -> None:
        """Sends its first process SIGTERM and returns at once."""
        try:
            self.process.terminate()
        except psutil.NoSuchProcess:
            pass


def _listening(process: psutil.Process) -> set[int]:
    """The ports that a process listens on; none where it has ended meanwhile."""
    try:
        found = process.net_connections("inet")
    except psutil.NoSuchProcess:
        return set()
    return {c.laddr.port for c in found if c.status == psutil.CONN_LISTEN}
