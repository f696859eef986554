"""Train every method on every task with several seeds, and record how they run freely. Hours; a killed run continues.

    make quality          (or: python -m benchmarks.quality.run [--seeds 5] [--tasks wave ...] [--methods SFT BSS ...])

Each finished run is a line of ``benchmarks/results/quality.jsonl``; what is there already is not run again.
``python -m benchmarks.quality.report`` makes tables, JSON and plots of it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .methods import ABLATIONS, METHODS, Setting, describe, measure
from .tasks import TASKS

RESULTS = Path(__file__).parent.parent / "results" / "quality.jsonl"
SETTINGS = {
    "wave": Setting(steps=700),
    "cubic": Setting(steps=700),
    "words": Setting(steps=1000),
    "words-few": Setting(steps=1000),
    "sort": Setting(steps=200, rows=8, learning_rate=5e-4, lora_rank=16),
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
    parser.add_argument("--tasks", nargs="+", default=list(SETTINGS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=[*METHODS, *ABLATIONS])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # such small models are slower on more; run several processes with other seeds instead
    runs = [
        (task, (METHODS | ABLATIONS)[method], seed)
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for task in options.tasks
        for method in options.methods
    ]
    done = {key_of(line) for line in read(options.output)}
    options.output.parent.mkdir(exist_ok=True)
    for task, method, seed in tqdm(runs, desc="Runs"):
        setting = setting_of(task)
        record = {"seed": seed, **describe(TASKS[task], method, setting)}
        if key_of(record) in done:
            continue
        started = time.perf_counter()
        found = measure(TASKS[task], method, seed, setting)
        line = record | found | {"seconds": round(time.perf_counter() - started, 1)}
        with options.output.open("a") as file:  # a line at once: processes may share the file
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        tqdm.write(f"{task}, {method.name}, seed {seed}: {found['found']}")
    return 0


def key_of(record: dict) -> str:
    return json.dumps(
        {name: record[name] for name in ("task", "seed", "method", "setting", "test_rows")}, sort_keys=True
    )


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
