"""Sections of a GPU run that end as real ones may: well, late, badly, or not at all. They import nothing large."""

from __future__ import annotations

import os
import subprocess
import sys
import time


def fine(lab):
    for place in range(3):
        lab.row("fine", {"place": place}, value=place / 3)
    lab.note("a note")


def hang(lab):
    """Writes a row, starts a process that writes its id, and never ends."""
    lab.row("hang", {"place": 0}, value=1)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    child = subprocess.Popen(["sleep", "600"])
    (lab.folder / "pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)


def fail(lab):
    lab.row("fail", {"place": 0}, value=1)
    raise ValueError("this kernel is wrong")


def crash(lab):
    lab.row("crash", {"place": 0}, value=1)
    os._exit(7)


def absent(lab):
    lab.skip("there is no such tool")
