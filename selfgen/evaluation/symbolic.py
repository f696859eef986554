"""Answers compared by the package ``math-verify``, which knows roots, sets, intervals and equations.

It runs in a process of its own: some of what a model writes, such as 9^(9^9), it would compute for hours, and only an
end of the process stops that, in any thread and on any system.
"""

from __future__ import annotations

import atexit
import json
import re
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue

from .forms import first_problem

TIME_LIMIT = 0.7  # seconds for a pair, the start of the process aside
_LONGEST = 20_000  # characters
_START_LIMIT = 120.0  # seconds until the process has imported what it needs


class Undecided(RuntimeError):
    """Two texts could not be compared in time."""


def has_math_verify() -> bool:
    return find_spec("math_verify") is not None


def symbolic_match(answer: str, reference: str) -> bool:
    """Whether the package ``math-verify`` finds the same value in both: also of roots, intervals, sets and equations.

    It compares decimal fractions in six digits, and takes 50% for 0.5 and for 50. What it can't decide within a second,
    and texts of more than 20,000 characters, count as different.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        return decide(answer, reference)
    except Undecided:
        return False


def decide(answer: str, reference: str) -> bool:
    """As `symbolic_match`, but it raises Undecided where that takes more than TIME_LIMIT."""
    if not has_math_verify():
        raise ImportError("symbolic_match needs math-verify: pip install 'selfgen[eval]'")
    return _PROCESS.same(_to_parse(reference), _to_parse(answer))


def _to_parse(text: str) -> str:
    """What follows ``####`` on its line, else all that is said of the first problem: math-verify knows neither."""
    part = first_problem(text)
    marked = re.search(r"####\s*([^\w\n]*[\d\\][^\n]*)", part)
    return marked[1] if marked else part


class _Process:
    """math-verify's process; it starts when it is needed, and again after one that had to be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # one pair at a time
        self._running: subprocess.Popen[str] | None = None
        self._lines: SimpleQueue[str] = SimpleQueue()
        atexit.register(self.end)

    def same(self, *texts: str) -> bool:
        if any(len(text) > _LONGEST for text in texts):
            raise Undecided(f"a text has more than {_LONGEST} characters")
        with self._lock:
            process = self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(f"{json.dumps(texts)}\n")
                process.stdin.flush()
            except OSError as error:  # it was killed just now
                self.end()
                raise Undecided(f"math-verify's process is gone ({error})") from error
            return bool(json.loads(self._line(TIME_LIMIT)))

    def _start(self) -> subprocess.Popen[str]:
        if self._running is None or self._running.poll() is not None:
            script = str(Path(__file__).with_name("math_verify_process.py"))
            self._lines = SimpleQueue()
            self._running = subprocess.Popen(  # -P: the folder of the script is not where it imports from
                [sys.executable, "-P", script],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
            )  # fmt: skip
            threading.Thread(target=_read, args=(self._running, self._lines), daemon=True).start()
            self._line(_START_LIMIT)
        return self._running

    def _line(self, limit: float) -> str:
        """The next line that the process writes; Undecided, and the end of the process, if there is none in time."""
        try:
            line = self._lines.get(timeout=limit)
        except Empty:
            line = ""
        if not line:
            self.end()
            raise Undecided(f"math-verify has not finished within {limit:g} s")
        return line

    def end(self) -> None:
        process, self._running = self._running, None
        if process is not None:
            process.kill()
            process.wait()


def _read(process: subprocess.Popen[str], lines: SimpleQueue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put("")  # it has ended


_PROCESS = _Process()
