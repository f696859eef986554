"""Runs sections one after the other, each in a process group of its own that is killed at its limit."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from . import results, summary

LEAST = 3.0  # seconds, below which no section is begun
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
LOG_LINES = 12  # of a failed section that are shown


class Section(NamedTuple):
    """``call`` is a module, or ``module:function``, whose function (by default ``run``) takes a ``Lab``."""

    name: str
    call: str
    seconds: float  # its share of the time, and its limit where nothing else is asked for


class MixedError(ValueError):
    """The folder holds results of something else."""


def run_sections(
    sections: Sequence[Section],
    folder: Path,
    *,
    chosen: Sequence[str] = (),
    seconds: float | None = None,
    rehearsal: bool = False,
    again: bool = False,
    command: str = "",
) -> int:
    """Run the ``chosen`` sections (all by default) that are not done yet, in order; 1 if one of them is not done after.

    Together they take ``seconds``; what one leaves goes to the next ones. With ``again``, those that are done are run
    again, and what they had is dropped.

    Raises:
        MixedError: another process uses the folder, or it holds what other code or a rehearsal has measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = {"sections": [section.name for section in sections], "rehearsal": rehearsal, "source": results.source()}
    with _alone(folder):
        _check(folder, run, start_over=again and not chosen)
        (folder / results.RUN).write_text(json.dumps({**run, "command": command}, indent=1) + "\n")
        wanted = [section for section in sections if not chosen or section.name in chosen]
        if again:
            for section in wanted:
                results.file_of(folder, section.name).unlink(missing_ok=True)
        todo = [one for one in wanted if results.read(results.file_of(folder, one.name)).state not in results.DONE]
        for section in wanted:
            if section not in todo:
                print(f"==> {section.name}: is done already (--again runs it again)", flush=True)
        about = {"machine": results.machine(), "versions": results.versions(), "command": command, **run}
        del about["sections"]
        deadline = time.monotonic() + (sum(section.seconds for section in todo) if seconds is None else seconds)
        for place, section in enumerate(todo):
            left = deadline - time.monotonic()
            if left < LEAST:
                print(f"==> {section.name}: no time is left for it", flush=True)
                continue
            try:
                _run(section, folder, left * section.seconds / sum(one.seconds for one in todo[place:]), about)
            finally:
                (folder / summary.FILE).write_text(summary.of(folder))  # so that an end from outside leaves one, too
        (folder / summary.FILE).write_text(summary.of(folder))
        return int(any(results.read(results.file_of(folder, one.name)).state not in results.DONE for one in wanted))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of ``folder``. Not by ``selfgen.files``, as importing that takes seconds of the device."""
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MixedError(f"another run writes to {folder}: wait for it, or give another --output") from None
        yield


def _check(folder: Path, run: dict, *, start_over: bool) -> None:
    try:
        before = json.loads((folder / results.RUN).read_text())
    except (OSError, ValueError):
        return
    if start_over or all(before.get(name) == run[name] for name in ("rehearsal", "source")):
        return
    what = "a rehearsal" if before.get("rehearsal") else "other code"
    raise MixedError(
        f"{folder} holds results of {what}: give another --output, or --again without --section to drop them all"
    )


def _run(section: Section, folder: Path, limit: float, about: dict) -> None:
    """Run one section; its file says how it ended, whatever happened."""
    file, log = results.file_of(folder, section.name), folder / f"{section.name}.log"
    print(f"==> {section.name}, at most {limit:.0f} s", flush=True)
    results.append(file, "begin", section=section.name, limit_s=limit, at=time.strftime("%Y-%m-%d %H:%M:%S"), **about)
    what = {"section": section.name, "call": section.call, "folder": str(folder), "limit_s": limit}
    what |= {"rehearsal": about["rehearsal"], "parent": os.getpid()}
    started, state = time.monotonic(), {"state": "cut off", "reason": "the run was stopped from outside"}
    paths = [str(results.ROOT), os.environ.get("PYTHONPATH")]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.child", json.dumps(what)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own
            env=os.environ | OFFLINE | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        try:
            code = process.wait(limit)
            state = {"state": "failed", "reason": f"its process ended with {code}, without a word"}
        except subprocess.TimeoutExpired:
            state["reason"] = f"it took longer than its {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and all that it has left
            process.wait()
            if not results.read(file).end:
                results.append(file, "end", **state, seconds=time.monotonic() - started)
    found = results.read(file)
    reason = f": {found.end['reason']}" if found.end.get("reason") else ""
    print(f"    {found.state} after {time.monotonic() - started:.0f} s, {len(found.rows)} rows{reason}", flush=True)
    if found.state == "failed":
        print("\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:]), flush=True)
