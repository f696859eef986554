"""Work in other processes, and deaths in the middle of it.

The processes are forked from one that has imported everything once: importing takes seconds.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import torch.multiprocessing

WORLD = 2
_SERVED = multiprocessing.get_context("forkserver")
_SERVED.set_forkserver_preload(["torch", "torch.distributed", "pytest", "selfgen", "selfgen.cli.train", "helpers.cli"])


def in_ranks(function: Callable, folder: Path, *arguments, world: int = WORLD, limit: float | None = None) -> None:
    """Call ``function(rank, folder, ...)`` in processes that are connected by gloo; they meet in a file.

    With a ``limit`` in seconds, processes that wait for each other are ended after it, by an AssertionError.
    """
    context = torch.multiprocessing.start_processes(
        _rank, (world, function, folder, *arguments), nprocs=world, start_method="forkserver", join=False
    )
    deadline = time.monotonic() + (limit or math.inf)
    while not context.join(timeout=None if limit is None else 1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise AssertionError(f"the processes have not ended after {limit} s")


def _rank(rank: int, world: int, function: Callable, folder: Path, *arguments) -> None:
    _begin()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # not used, but asked for
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        function(rank, folder, *arguments)
    finally:
        dist.destroy_process_group()


def _begin() -> None:
    gc.freeze()  # as in conftest.py
    torch.set_num_threads(1)


def apart(function: Callable, *arguments, folder: Path):
    """The result of the call in a process of its own, in this folder."""
    with _SERVED.Pool(1, _enter, (str(folder),)) as pool:
        return pool.apply(function, arguments)


def _enter(folder: str) -> None:
    _begin()
    os.chdir(folder)
    sys.argv = ["pytest"]
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:  # as of a worker of pytest-xdist
        del os.environ[name]


def kill_command(arguments: list[str], when: Callable[[], bool]) -> None:
    """SIGKILL ``selfgen`` with these arguments as soon as ``when`` holds, which must be before it ends."""
    process = _SERVED.Process(target=_command, args=(arguments, str(datasets.config.HF_DATASETS_CACHE)))
    process.start()
    deadline = time.monotonic() + 120
    while not when():
        assert process.is_alive(), "the command ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def forked(function: Callable, *arguments) -> multiprocessing.process.BaseProcess:
    """The process of ``function(...)``, which has begun."""
    process = _SERVED.Process(target=function, args=arguments)
    process.start()
    return process


def begun(function: Callable, *arguments) -> multiprocessing.process.BaseProcess:
    """The process of ``function(ready, ...)``, once it has set the event ``ready``."""
    ready = _SERVED.Event()
    process = _SERVED.Process(target=function, args=(ready, *arguments), daemon=True)
    process.start()
    assert ready.wait(120)
    return process


def _command(arguments: list[str], cache: str) -> None:
    from selfgen.cli import main

    _begin()
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.exit(main(arguments))


class Killed(BaseException):
    """Nothing catches it."""


def kill_at(monkeypatch, target: str, call: int) -> None:
    """The process "dies" when ``target`` is called for this (0-based) time."""
    original, calls = pkgutil.resolve_name(target), count()

    def function(*args, **kwargs):
        if next(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(target, function)


def record_calls(monkeypatch, target: str) -> list[tuple]:
    """Positional arguments of every call of ``target`` from here on."""
    original, calls = pkgutil.resolve_name(target), []
    monkeypatch.setattr(target, lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
    return calls


def contents(folder: Path) -> dict[str, bytes]:
    """Each file below a folder, but for locks."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }
