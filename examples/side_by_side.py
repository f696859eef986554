"""Functions that run in processes of their own at the same time, and tell how far they are.

If one fails or is killed, the others are stopped. All end with the process that started them, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

Tell = Callable[[Any], None]
_LEAST = 5.0  # seconds that a process has to end before it is killed


class Failed(RuntimeError):
    """One of the functions raised an exception, or its process was ended; the message says which, and how."""


def side_by_side(work: Mapping[str, Callable[[Tell], Any]], told: Callable[[str, Any], None]) -> dict[str, Any]:
    """The result of each function, by its name.

    Args:
        work: functions that can be pickled. Each gets a function that takes what it has to tell.
        told: gets the name of a function, and what that tells.

    Raises:
        Failed: with the traceback of the first function that failed.
    """
    context = multiprocessing.get_context("spawn")  # safe with threads, and on every system
    processes = []
    running: dict[Connection, tuple[str, Any]] = {}
    results: dict[str, Any] = {}
    try:
        with _children_ignore_interrupts():
            for name, function in work.items():
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(function, theirs), daemon=True)
                process.start()
                theirs.close()  # so that the pipe ends with the process
                processes.append(process)
                running[ours] = name, process
        while running:
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                name, process = running[pipe]
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    process.join()
                    raise Failed(f"{name} ended before it was done: {_how(process.exitcode)}") from None
                if kind == "failed":
                    raise Failed(f"{name} failed:\n{value}")
                if kind == "told":
                    told(name, value)
                else:
                    results[name] = value
                    del running[pipe]
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            process.join(_LEAST)
            if process.is_alive():
                process.kill()
    return {name: results[name] for name in work}


@contextmanager
def _children_ignore_interrupts() -> Iterator[None]:
    """Ctrl-C goes to all processes of a terminal; it is for the one that ends the others."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which processes that are started now inherit
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _how(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit status {exit_code}"
    return f"{signal.Signals(-exit_code).name} (was there too little memory?)"


def _child(function: Callable[[Tell], Any], pipe: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = function(lambda message: pipe.send(("told", message)))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
        sys.exit(1)
    pipe.send(("result", result))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
