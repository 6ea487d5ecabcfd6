"""Ends a server whose starter is gone; run as a program of its own, with the standard library alone.

A starter that is killed by SIGKILL (the kernel's out-of-memory killer among others) cannot stop what it
started. The kernel can send one signal for it (``PR_SET_PDEATHSIG``, Linux alone), but a vLLM that is still
loading may take SIGTERM and hang. So this process stands beside the server. Its arguments are the number of
the server's process group and the seconds between asking and killing; standard input is a pipe that the
starter holds. A byte there says that the server was ended in order; the pipe's end without one, that the
starter is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import time


def end_group(group: int, grace: float) -> None:
    """SIGTERM to a process group, SIGKILL to what is left of it after ``grace`` seconds. Does nothing where
    the group is gone."""
    try:
        os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)
    except OSError:  # nobody is left
        pass


def main() -> None:
    # a service manager sends them to everybody: the starter acts, this waits
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if not sys.stdin.buffer.read():
        end_group(int(sys.argv[1]), float(sys.argv[2]))


if __name__ == "__main__":
    main()
