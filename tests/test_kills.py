"""SIGKILL at any moment, in every command: the same command line then ends at the bytes of a run that nothing stopped.

A run is a process of its own, forked from one that has imported everything. It is killed with all that it started: at a
random time, at a random change of its files (as seen from outside: in the middle of a write, too), or at a random call
by which it opens, renames or removes a file of its own, of which each has its turn.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pytest
import torch
from helpers.cli import flags, save_model
from helpers.data import write_jsonl
from helpers.processes import forked

WORDS = "abcdefgh"
TRAIN = {
    "model": "model",
    "dataset": "train.jsonl",
    "output_dir": "out",
    "max_steps": 6,
    "save_steps": 2,
    "save_total_limit": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 2,
    "max_length": 32,
    "self_prob": 0.5,
    "token_budget": 32,
    "balance": 4,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "resume_from_checkpoint": "last",
}
ROUNDS = {"method": "bash", "rounds": 2, "shard_rows": 4, "max_steps": 3, "save_steps": 1, "eval_split": "train[:4]"}
WRITTEN = {name: value for name, value in TRAIN.items() if name != "dataset"} | {"method": "bash", "contexts": "contexts"}
COMMON = {"model": "model", "dataset": "train.jsonl", "max_length": 32, "use_cpu": True}
CONTEXTS = COMMON | {"output_dir": "out", "self_prob": 0.5, "shard_rows": 4, "token_budget": 32, "balance": 4}
ANSWERS = COMMON | {"output_file": "out/answers.jsonl", "chunk_rows": 3, "max_new_tokens": 8, "temperature": 1.0}
EVAL = COMMON | {"output_dir": "out", "batch_size": 1, "max_new_tokens": 8, "temperature": 1.0}

COMMANDS: dict[str, list[str]] = {
    "bss": ["train", *flags(TRAIN), "--eval_split", "train[:4]"],
    "rac": ["train", *flags(TRAIN | {"method": "rac", "max_new_tokens": 4})],
    "rounds": ["train", *flags(TRAIN | ROUNDS)],
    "contexts": ["contexts", *flags(CONTEXTS)],
    "generate": ["generate", *flags(ANSWERS), "--correct"],
    "eval": ["eval", *flags(EVAL), "--metrics", "exact_match", "loss", "curve", "correction"],
}
MORE: dict[str, list[str]] = {
    "stream": ["train", *flags(TRAIN | {"streaming": True, "dataset": "data", "dataloader_num_workers": 2})],
    "save at the end": ["train", *flags(TRAIN | {"save_strategy": "no"})],
    "few logs": ["train", *flags(TRAIN | {"logging_steps": 3, "gradient_accumulation_steps": 2})],
    "few logs of rac": ["train", *flags(TRAIN | {"method": "rac", "max_new_tokens": 4, "logging_steps": 3})],
    "written contexts": ["train", *flags(WRITTEN)],
}


def prepare(folder: Path) -> Path:
    """A folder with a model, data, and contexts to train on."""
    save_model(folder / "model", initializer_range=0.5)
    draw = random.Random(5)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 8)))

    rows = [{"prompt": text(), "completion": text()} for _ in range(16)]
    write_jsonl(folder / "train.jsonl", rows)
    (folder / "data").mkdir()
    for part in range(2):
        write_jsonl(folder / "data" / f"train-{part}.jsonl", rows[part::2])
    ended(["contexts", *flags(CONTEXTS | {"output_dir": "contexts"})], folder)
    return folder


# A run in a process of its own


class Stops:
    """Kills this process and its group at the call number ``count`` that changes a file below ``out``."""

    def __init__(self, count: int | None, told: Path):
        self.left, self.told, self.seen = count, told, 0
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            return
        path = os.path.relpath(os.fspath(arguments[0])) if isinstance(arguments[0], str | os.PathLike) else ""
        if not path.startswith("out"):
            return
        self.seen += 1
        if self.left is not None and self.seen == self.left:
            os.killpg(0, signal.SIGKILL)


def _command(arguments: list[str], folder: str, stop: int | None, log: str) -> None:
    from selfgen.cli import main

    os.setsid()
    os.chdir(folder)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a command that no server has started
    datasets.config.HF_DATASETS_CACHE = Path("cache").absolute()
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
    stops = Stops(stop, Path(log))
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    Path(f"{log}.calls").write_text(str(stops.seen))
    sys.stderr.flush()
    os._exit(code)


def begin(arguments: list[str], folder: Path, stop: int | None = None):
    return forked(_command, arguments, str(folder), stop, str(folder / "log"))


def ended(arguments: list[str], folder: Path) -> tuple[float, int]:
    """Seconds that the command takes, and its calls that change files; it ends with exit code 0."""
    start = time.monotonic()
    process = begin(arguments, folder)
    process.join(120)
    assert process.exitcode == 0, (folder / "log").read_text()
    return time.monotonic() - start, int((folder / "log.calls").read_text())


# What is compared


def state_of(folder: Path) -> dict[str, tuple]:
    """Names, sizes and times of all files below a folder."""
    found = {}
    with suppress(FileNotFoundError):  # removed meanwhile
        for at, _, names in os.walk(folder):
            for name in names:
                there = os.stat(os.path.join(at, name))
                found[os.path.join(at, name)] = (there.st_size, there.st_mtime_ns)
    return found


CLOCK = ("_seconds", "_runtime", "_per_second", "seconds")


def without_clock(value):
    """JSON without figures of wall-clock time; nor the last line of `train`, which tells of one process only."""
    if isinstance(value, dict):
        return {name: without_clock(one) for name, one in value.items() if not name.endswith(CLOCK)}
    if isinstance(value, list):
        return [without_clock(one) for one in value if not (isinstance(one, dict) and "train_runtime" in one)]
    return value


def outputs(folder: Path) -> dict[str, object]:
    """What a run has left, file by file; checkpoints and states of optimizers, schedules and generators, too."""
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if not file.is_file() or file.name.endswith(".lock"):
            continue
        if file.name in ("trainer_state.json", "results.json") or file.name.startswith("selfgen_log"):
            found[name] = without_clock(json.loads(file.read_text()))
        else:
            found[name] = file.read_bytes()
    return found


def outputs_or_none(folder: Path) -> dict[str, object] | None:
    try:
        return outputs(folder)
    except ValueError:  # half a file of JSON
        return None


def half_written(folder: Path) -> bool:
    """Whether a kill has left something that is not whole."""
    checkpoints = [one for one in folder.rglob("checkpoint-*") if not (one / "trainer_state.json").is_file()]
    hidden = [one for one in folder.rglob(".*") if one.name.endswith("partial")] + [*folder.rglob("*.partial")]
    lines = [one for one in folder.rglob("*.jsonl") if not one.read_bytes().endswith(b"\n")]
    models = [one for one in (folder, *folder.rglob("model*")) if (one / "config.json").is_file()
              and not (one / "tokenizer.json").is_file()]  # fmt: skip
    return bool(checkpoints or hidden or lines or models)


# Kills


@dataclass
class Tally:
    """What the kills of a command came to."""

    kinds: Counter = field(default_factory=Counter)
    half: int = 0  # that left something half-written
    early: int = 0  # runs that ended before they were killed

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} by {kind}" for kind, count in sorted(self.kinds.items()))
        return f"{self.kinds.total()} kills ({kinds}), {self.half} of them while something was half-written"


def kill(arguments: list[str], folder: Path, kind: str, draw: random.Random, seconds: float, calls: int) -> bool:
    """Begin the command and kill it, as ``kind`` says; whether it was killed before it ended."""
    process = begin(arguments, folder, draw.randint(1, calls) if kind == "call" else None)
    deadline = time.monotonic() + (draw.uniform(0, seconds) if kind == "time" else 120)
    if kind == "change":  # the n-th that is seen, and a moment later
        before, left = state_of(folder / "out"), draw.randint(1, max(1, calls // 2))
        while process.is_alive() and left and time.monotonic() < deadline:
            now = state_of(folder / "out")
            left -= now != before
            before = now
        time.sleep(draw.choice([0, 0, draw.uniform(0, 0.003)]))
    elif kind == "time":
        process.join(max(0.0, deadline - time.monotonic()))
    if kind != "call":
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), (folder / "log").read_text()
    return process.exitcode != 0


def survive(arguments: list[str], source: Path, folder: Path, kills: int, seed: int, expected=None) -> Tally:
    """Kill the command this often, up to three times in a row; each time the run that ends must be the unbroken one."""
    draw, tally = random.Random(seed), Tally()
    shutil.copytree(source, folder / "whole")
    seconds, calls = ended(arguments, folder / "whole")
    want = outputs(folder / "whole" / "out")
    assert want
    number = 0
    while tally.kinds.total() < kills:
        number += 1
        run = folder / "run"
        shutil.copytree(source, run)
        for _ in range(min(draw.choice([1, 1, 2, 3]), kills - tally.kinds.total())):
            kind = draw.choice(["time", "time", "call", "call", "change"])
            if not kill(arguments, run, kind, draw, seconds, calls):
                tally.early += 1
                break
            tally.kinds[kind] += 1
            tally.half += half_written(run / "out")
        if arguments[0] != "train" or not finished(run, want):
            ended(arguments, run)
        got = outputs(run / "out")
        wrong = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
        assert not wrong, (number, wrong)
        shutil.rmtree(run)
    return tally


def finished(run: Path, want: dict) -> bool:
    """Whether a run without checkpoints was killed when all was done; to go on from it is refused."""
    return not any(name.startswith("checkpoint-") for name in want) and outputs_or_none(run / "out") == want


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("source"))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_fifty_kills(source, tmp_path, command):
    print(command, survive(COMMANDS[command], source, tmp_path, kills=50, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("command", MORE)
def test_kills_of_other_runs(source, tmp_path, command):
    print(command, survive(MORE[command], source, tmp_path, kills=20, seed=2))
