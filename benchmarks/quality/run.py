"""Train every method on every task with several seeds, and record how they run freely. Hours; a killed run continues.

    make quality          (or: python -m benchmarks.quality.run [--seeds 5] [--tasks wave ...] [--methods SFT BSS ...])
    python -m benchmarks.quality.run --stage confirmation [--tasks ...] [--methods ...]

Each finished run is a line of ``benchmarks/results/quality.jsonl``, or of the stage's file; what is there already is
not run again. Where a method has waited for the loss to settle until its last step, it has trained as SFT does, but for
the rounding of a lean loss, and so would others that wait: what was found is theirs, too (``same_as``). Several
processes may share a file: each takes runs that no other is at, and those of a killed process. A run that fails is
told, and the others go on. ``python -m benchmarks.quality.report`` makes tables, JSON and plots of it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from tools.real_parts import cache_dir

from .methods import ALL_METHODS, CANDIDATES, METHODS, Method, Setting, describe, measure
from .tasks import TASKS

RESULTS = Path(__file__).parent.parent / "results" / "quality.jsonl"


@dataclass(frozen=True)
class Stage:
    """A part of PLAN.md, whose file is ``quality_STAGE.jsonl``: stages share no seed. ``more`` are seeds of a task."""

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: range
    more: dict[str, range] = field(default_factory=dict)


CONFIRMED = ("BSS, p falls from 0.25, waits", "BSS + teacher-forced, waits", "BSS, p falls from 0.5, cooler, waits")
STAGES = {
    "selection": Stage(
        ("words", "wave", "cubic"),
        (
            "SFT",
            "BSS",
            *(name for name, method in CANDIDATES.items() if method.options.get("self_prob_warmup") is None),
        ),
        range(20, 22),
    ),
    "confirmation": Stage(
        ("words", "words-few", "wave", "cubic", "gsm_symbolic-short", "reverse", "gsm_symbolic-few"),
        (CONFIRMED[0], "SFT", *CONFIRMED[1:]),
        range(30, 35),
        {"cubic": range(30, 50)},
    ),
}
SETTINGS = {
    "wave": Setting(steps=700),
    "cubic": Setting(steps=700),
    "words": Setting(steps=1000),
    "words-few": Setting(steps=1000),
    "reverse": Setting(steps=300, rows=8, learning_rate=1e-3, lora_rank=16),
    "gsm_symbolic-short": Setting(steps=60, rows=8, learning_rate=1e-4),
    "gsm_symbolic-few": Setting(steps=300, rows=7, learning_rate=5e-4, lora_rank=16),
    "gsm_symbolic": Setting(steps=100, rows=4, learning_rate=1e-4),
}
"""Steps are such that SFT is good under references and worse by itself. From cheap to costly."""


def setting_of(task: str) -> Setting:
    """A variant (``wave-24``) has the setting of its task."""
    return SETTINGS.get(task) or SETTINGS[task.split("-")[0]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(ALL_METHODS))
    parser.add_argument(
        "--stage", choices=list(STAGES), help="its seeds in place of the next two, and its tasks, methods and file"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--steps-times", type=float, default=1.0, help="train for so many times the steps, as for SFT at equal cost"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--no-passes", action="store_true", help="don't count the passes that answers take: quicker")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # such small models are slower on more; run several processes instead
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    stage = STAGES[options.stage] if options.stage else Stage(tuple(SETTINGS), tuple(METHODS), seeds)
    output = options.output or (RESULTS.with_name(f"quality_{options.stage}.jsonl") if options.stage else RESULTS)
    output.parent.mkdir(exist_ok=True)
    runs = [
        (task, ALL_METHODS[method], seed)
        for task in options.tasks or stage.tasks
        for seed in stage.more.get(task, stage.seeds)
        for method in options.methods or stage.methods
        if ALL_METHODS[method].is_for(TASKS[task])
    ]
    failed = 0
    with tqdm(total=len(runs), desc="Runs") as bar:
        while runs:
            taken = []  # by other processes
            for run in runs:
                try:
                    mine = run_once(output, *run, times=options.steps_times, count_passes=not options.no_passes)
                except Exception:
                    failed, mine = failed + 1, True
                    tqdm.write(f"{run[0]}, {run[1].name}, seed {run[2]} failed:\n{traceback.format_exc()}")
                if mine:
                    bar.update()
                else:
                    taken.append(run)
            if len(taken) == len(runs):
                break  # they are at all that is left
            runs = taken
    return 1 if failed else 0


def run_once(
    output: Path, task: str, method: Method, seed: int, *, times: float = 1.0, count_passes: bool = True
) -> bool:
    """Train and record, unless that is done; False if another process is at it."""
    setting = setting_of(task)
    setting = replace(setting, steps=round(times * setting.steps))
    record = {"seed": seed, **describe(TASKS[task], method, setting)}
    key = key_of(record)
    if key not in {key_of(line) for line in read(output)}:
        with claimed(output, key) as is_mine:
            if not is_mine or any(is_claimed(output, key_of(other)) for other in may_turn_out_alike(record, method)):
                return False
            lines = read(output)
            if same := trained_alike(lines, record, method):
                append(output, record | same)
            elif key not in {key_of(line) for line in lines}:  # another has just done it
                started = time.perf_counter()
                measured = measure(TASKS[task], method, seed, setting, count_passes=count_passes)
                append(output, record | measured | {"seconds": round(time.perf_counter() - started, 1)})
                tqdm.write(f"{task}, {method.name}, seed {seed}: {measured['found']}")
    return True


def may_turn_out_alike(record: dict, method: Method) -> list[dict]:
    """The runs to wait for, if another process is at them: SFT for all that wait, and these for those before them."""
    if not (method.is_sft_until_it_mixes and (method.waits or not method.options["self_prob"])):
        return []
    waiting = [other for other in ALL_METHODS.values() if other.is_sft_until_it_mixes and other.waits]
    before = waiting[: waiting.index(method)] if method.waits else waiting
    return [record | {"method": asdict(other)} for other in before]


def trained_alike(lines: list[dict], record: dict, method: Method) -> dict[str, Any] | None:
    """What a finished run has found that was SFT to its end, if the run ``record`` of ``method`` would be the same."""
    plain = method.is_sft_until_it_mixes and (method.waits or not method.options["self_prob"])
    for line in lines if plain else ():
        other = ALL_METHODS.get(line["method"]["name"])
        is_alike = all(line.get(name) == value for name, value in record.items() if name != "method")
        if is_alike and other and other.is_sft_until_it_mixes and other.waits and not line["found"].get("self_prob", 1):
            return {"same_as": other.name} | {name: value for name, value in line.items() if name not in record}
    return None


@contextmanager
def claimed(output: Path, key: str) -> Iterator[bool]:
    """Whether the run ``key`` is this process's; the system gives it back when the process ends, however it does."""
    folder = cache_dir() / "quality" / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    name = folder / hashlib.sha256(f"{output.resolve()} {key}".encode()).hexdigest()[:24]
    with name.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        name.unlink(missing_ok=True)  # who has it open finds the run done


def is_claimed(output: Path, key: str) -> bool:
    """Whether another process is at the run ``key``."""
    with claimed(output, key) as is_mine:
        return not is_mine


def append(output: Path, line: dict[str, Any]) -> None:
    """Write a line at once, after what a killed process may have left of another."""
    with output.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def key_of(record: dict) -> str:
    """What tells runs from each other."""
    known = {name: record[name] for name in ("task", "seed", "setting", "test_rows")}
    method = {name: value for name, value in record["method"].items() if name != "needs"}
    return json.dumps(known | {"method": method}, sort_keys=True)


def read(file: Path) -> list[dict]:
    """Finished runs; half a line of a kill is none."""
    lines = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
