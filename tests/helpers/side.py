"""What processes of `examples.side_by_side` do in tests; importing this takes no time."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from examples.side_by_side import side_by_side


def counts(to, tell):
    for number in range(to):
        tell(number)
    return to


def fails(tell):
    raise ValueError("no luck")


def ends(tell):
    os._exit(3)


def killed(tell):
    os.kill(os.getpid(), 9)


def waits(tell):
    tell(os.getpid())
    time.sleep(60)


if __name__ == "__main__":  # two that wait, until this process is ended; their ids are written to a file
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore, tests included
    file = Path(sys.argv[1])

    def told(name, pid):
        with file.open("a") as lines:
            lines.write(f"{pid}\n")

    side_by_side({"one": waits, "other": waits}, told)
