"""What torchrun says to the processes that it starts, in environment variables; and how ``--devices`` names
them. Free of torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from quant.errors import UsageError

#: What it tells each process, LOCAL_RANK besides.
_SEAT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Seat:
    """What torchrun says to a process: its number of how many, and its number on this machine."""

    rank: int
    size: int
    local: int


def seat() -> Seat | None:
    """The place that torchrun gave this process; None where it was not started by it.

    Raises:
        UsageError: variables of torchrun that are there in part, or are no numbers.
    """
    given = {name: os.environ[name] for name in _SEAT if name in os.environ}
    if not {"RANK", "WORLD_SIZE"} & given.keys():
        return None
    if missing := [name for name in _SEAT if name not in given]:
        raise UsageError(
            f"{', '.join(given)} is set and {', '.join(missing)} is not: torchrun sets all of them; start "
            "the command with torchrun, or unset them"
        )
    try:
        numbers = int(given["RANK"]), int(given["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", numbers[0]))
    except ValueError as error:
        raise UsageError(
            f"RANK is {given['RANK']!r} and WORLD_SIZE {given['WORLD_SIZE']!r}: numbers are needed, as "
            "torchrun sets them"
        ) from error
    if not 0 <= numbers[0] < numbers[1]:
        raise UsageError(
            f"RANK is {numbers[0]}: must be from 0 to {numbers[1] - 1}, one less than WORLD_SIZE"
        )
    if given["MASTER_PORT"] == "0":
        raise UsageError(
            "MASTER_PORT is 0, where no rank finds another: use torchrun --standalone, or name a port"
        )
    return Seat(*numbers, local) if numbers[1] > 1 else None


def follows() -> bool:
    """Whether another process of torchrun's, rank 0, is the one that writes and speaks."""
    place = seat()
    return place is not None and place.rank > 0


def device_names(devices: str) -> list[str]:
    """The devices that ``--devices`` names, as ``--device`` would.

    >>> device_names("0, 1"), device_names("cpu,cpu")
    (['cuda:0', 'cuda:1'], ['cpu', 'cpu'])
    """
    names = (name.strip() for name in devices.split(","))
    return [f"cuda:{name}" if name.isdecimal() else name for name in names]


def first_device(devices: str) -> str:
    """That of rank 0."""
    return device_names(devices)[0]
