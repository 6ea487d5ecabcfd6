"""A server that somebody else started on this machine, told by its process id: its memory, and its end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from quant.errors import UsageError


@dataclass(frozen=True)
class ForeignServer:
    """
    Attributes:
        pid: its first process, which its supervisor would send SIGTERM.
    """

    pid: int

    def demand_serves(self, url: str) -> None:
        """Whether that process, or one that it started, is what answers at an address, so that nothing else
        is ended.

        Raises:
            UsageError: it is not there, cannot be looked into, or listens elsewhere.
        """
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            members = list(self._members())
            ports = {
                c.laddr.port
                for member in members
                for c in member.net_connections("inet")
                if c.status == psutil.CONN_LISTEN
            }
        except psutil.AccessDenied as error:
            raise UsageError(f"--pid is {self.pid}: that process is another user's") from error
        if not members:
            raise UsageError(f"--pid is {self.pid}: there is no such process")
        if port not in ports:
            said = ", ".join(map(str, sorted(ports))) or "no port"
            raise UsageError(f"--pid is {self.pid}: it listens on {said}, not on {port} of --url {url}")

    def _members(self) -> Iterator[psutil.Process]:
        try:
            first = psutil.Process(self.pid)
            yield first
            yield from first.children(recursive=True)
        except psutil.NoSuchProcess:
            return

    @property
    def alive(self) -> bool:
        """Whether its first process runs."""
        try:
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    @property
    def resident_bytes(self) -> int:
        """Memory of all its processes together; pages that they share count in each."""
        total = 0
        for member in self._members():
            try:
                total += member.memory_info().rss
            except psutil.NoSuchProcess:
                pass
        return total

    def ask_to_end(self, first_alone: bool = True) -> None:
        """Sends its first process SIGTERM and returns at once."""
        try:
            psutil.Process(self.pid).terminate()
        except psutil.NoSuchProcess:
            pass
