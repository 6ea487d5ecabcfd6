"""``quant`` with the second device: what a user types, several commands after one another where each but the
first begins with ``--then``. ``SECOND_LIMIT``: bytes of memory that the device has."""

from __future__ import annotations

import os
import sys

from quantize import main as quant
from tests.device import second


def main(arguments: list[str]) -> int:
    """Exit status of the first command that fails, or 0."""
    second.inside.set_limit(int(os.environ.get("SECOND_LIMIT", second.MEMORY)))
    commands: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "--then":
            commands.append([])
        else:
            commands[-1].append(argument)
    for command in commands:
        try:
            quant(command)
        except SystemExit as end:
            if end.code:
                print(f"exit {end.code}: {' '.join(command)}", file=sys.stderr)
                return int(end.code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
