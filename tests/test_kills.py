"""SIGKILL at any moment, in every command: the same command line then ends at the bytes of a run that nothing stopped.

A run is a process of its own, forked from one that has imported everything. It is killed with all that it started: at a
random time, at a random change of its files (as seen from outside: in the middle of a write, too), or at a random call
by which it opens, renames or removes a file of its own, of which each has its turn.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pytest
import torch
from helpers.cli import ROOT, flags, refused, run, save_model
from helpers.data import write_jsonl
from helpers.processes import Killed, contents, forked, kill_at
from helpers.training import make_rac_trainer, make_trainer, weights

from selfgen.cli import main
from selfgen.cli.journal import Journal
from selfgen.data import DataError, check_sample_ids
from selfgen.files import SaveError
from selfgen.training.checkpoints import fault_of, last_checkpoint

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
    "report": False,  # it tells times
    "disable_tqdm": True,
    "use_cpu": True,
    "resume_from_checkpoint": "last",
}
AUTO = {
    "self_prob": "auto", "difference_target": 0.3, "self_prob_cap": 0.9, "self_prob_warmup": 2, "logging_steps": 3,
    "granularity": "prefix", "loss_on": "after_switch",
}  # fmt: skip
ROUNDS = {"method": "bash", "rounds": 2, "shard_rows": 4, "max_steps": 3, "save_steps": 1, "eval_split": "train[:4]"}
WRITTEN = {name: value for name, value in TRAIN.items() if name != "dataset"} | {
    "method": "bash",
    "contexts": "contexts",
}
COMMON = {"model": "model", "dataset": "train.jsonl", "max_length": 32, "use_cpu": True}
CONTEXTS = COMMON | {"output_dir": "out", "self_prob": 0.5, "shard_rows": 4, "token_budget": 32, "balance": 4}
ANSWERS = COMMON | {"output_file": "out/answers.jsonl", "chunk_rows": 3, "max_new_tokens": 8, "temperature": 1.0}
EVAL = COMMON | {"output_dir": "out", "batch_size": 1, "max_new_tokens": 8, "temperature": 1.0}

LOSSES = ["eval", *flags(EVAL), "--metrics", "loss"]

COMMANDS: dict[str, list[str]] = {
    "bss": ["train", *flags(TRAIN), "--eval_split", "train[:4]"],
    "rac": ["train", *flags(TRAIN | {"method": "rac", "max_new_tokens": 4})],
    "rounds": ["train", *flags(TRAIN | ROUNDS)],
    "contexts": ["contexts", *flags(CONTEXTS)],
    "generate": ["generate", *flags(ANSWERS), "--correct"],
    "eval": ["eval", *flags(EVAL), "--metrics", "gap", "exact_match", "loss", "curve", "correction"],
}
MORE: dict[str, list[str]] = {
    "stream": ["train", *flags(TRAIN | {"streaming": True, "dataset": "data", "dataloader_num_workers": 2})],
    "save at the end": ["train", *flags(TRAIN | {"save_strategy": "no"})],
    "few logs": ["train", *flags(TRAIN | {"logging_steps": 3, "gradient_accumulation_steps": 2})],
    "few logs of rac": ["train", *flags(TRAIN | {"method": "rac", "max_new_tokens": 4, "logging_steps": 3})],
    "auto": ["train", *flags(TRAIN | AUTO)],
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
    with chdir(folder):
        assert main(["contexts", *flags(CONTEXTS | {"output_dir": "contexts"})]) == 0
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
            if finished(arguments, run, want):
                break
            kind = draw.choice(["time", "time", "call", "call", "change"])
            if not kill(arguments, run, kind, draw, seconds, calls):
                tally.early += 1
                break
            tally.kinds[kind] += 1
            tally.half += half_written(run / "out")
        if not finished(arguments, run, want):
            ended(arguments, run)
        got = outputs(run / "out")
        wrong = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
        assert not wrong, (number, wrong)
        shutil.rmtree(run)
    return tally


def finished(arguments: list[str], run: Path, want: dict) -> bool:
    """Whether training without checkpoints was killed when all was done; to go on from that is refused."""
    checkpoints = any(name.rpartition("/")[0].startswith(("checkpoint-", "round-")) for name in want)
    return arguments[0] == "train" and not checkpoints and outputs_or_none(run / "out") == want


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


@pytest.mark.slow
@pytest.mark.parametrize("command", ["contexts", "bss"])
def test_kills_of_processes_that_were_not_forked(source, tmp_path, command):
    """`python -m selfgen`, killed twice when its folder changes; then it ends."""
    for name in ("whole", "run"):
        shutil.copytree(source, tmp_path / name)
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)

    def start(name: str) -> subprocess.Popen:
        arguments = [sys.executable, "-m", "selfgen", *COMMANDS[command]]
        return subprocess.Popen(
            arguments, cwd=tmp_path / name, env=environment, start_new_session=True, stderr=subprocess.DEVNULL
        )

    assert start("whole").wait(300) == 0
    for _ in range(2):
        process, before = start("run"), state_of(tmp_path / "run" / "out")
        while process.poll() is None and len(state_of(tmp_path / "run" / "out")) < len(before) + 2:
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert start("run").wait(300) == 0
    assert outputs(tmp_path / "run" / "out") == outputs(tmp_path / "whole" / "out")


def test_a_few_kills(source, tmp_path):
    survive(COMMANDS["contexts"], source, tmp_path, kills=3, seed=3)


# What kills have shown


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_goes_on_from_its_last_step_and_trains_no_other(tmp_path, step):
    """There are four steps in an epoch; the Trainer looks for the end after a step, and so took one more."""
    whole = make_trainer(tmp_path, max_steps=step, save_strategy="steps", save_steps=1)
    whole.train()
    resumed = make_trainer(tmp_path, max_steps=step, save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint="last")
    assert resumed.state.global_step == step
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert not (tmp_path / f"checkpoint-{step + 1}").exists()
    more = make_trainer(tmp_path, max_steps=step + 1)
    more.train(resume_from_checkpoint="last")
    assert more.state.global_step == step + 1


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("make", [make_trainer, make_rac_trainer])
@pytest.mark.each_value
def test_the_next_line_of_the_log_counts_from_the_line_before(tmp_path, step, make):
    options = {"max_steps": 6, "logging_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    lines = []
    for resumed in (None, str(tmp_path / f"checkpoint-{step}")):
        trainer = make(tmp_path, **options)
        trainer.train(resume_from_checkpoint=resumed)
        lines.append(without_clock(trainer.state.log_history))
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [3, 6]


@pytest.mark.slow
def test_rounds_that_are_killed_while_they_are_evaluated(source, tmp_path, monkeypatch, capsys):
    shutil.copytree(source, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    with monkeypatch.context() as patch:
        kill_at(patch, "selfgen.training.bss.BSSTrainer.evaluate", 0)
        with pytest.raises(Killed):
            main(COMMANDS["rounds"])
    assert run(COMMANDS["rounds"], capsys)[0] == 0
    for number in range(2):
        state = json.loads(Path(f"out/round-{number}/trainer_state.json").read_text())
        assert sum("eval_loss" in entry for entry in state["log_history"]) == 1


def test_a_model_is_saved_as_a_whole(source, tmp_path, monkeypatch, capsys):
    """A run without checkpoints that is killed while its model is put in its place begins anew; before, nothing is."""
    shutil.copytree(source, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    for target, call in (
        ("selfgen.training.bss.BSSTrainer.save_model", 0),
        ("selfgen.training.ending.Path.replace", 2),
    ):
        with monkeypatch.context() as patch:
            kill_at(patch, target, call)
            with pytest.raises(Killed):
                main(MORE["save at the end"])
        assert (Path("out") / "config.json").exists() == (call == 2)
    assert run(MORE["save at the end"], capsys)[0] == 0
    assert not [*Path("out").glob(".model*")]
    assert "holds a model" in refused(MORE["save at the end"], capsys)


# Places that can't be written to


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system, where this process may mount one."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system may be mounted")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def folder(source, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def no_model(*args, **kwargs):
    pytest.fail("the model is loaded before the place is looked at")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_is_none_is_told_before_a_model_is_loaded(folder, monkeypatch, capsys, command):
    monkeypatch.setattr("selfgen.cli.options.from_pretrained", no_model)
    Path("file").write_text("mine")
    option = "output_file" if command == "generate" else "output_dir"
    below = [one.replace("out", "file/in", 1) if one.startswith("out") and "_" not in one else one
             for one in COMMANDS[command]]  # fmt: skip
    line = refused(below, capsys)
    assert f"{option} is 'file/in" in line
    assert f"file is no folder: give another {option}" in line
    if command != "generate":
        at = [one if one != "out" else "file" for one in COMMANDS[command]]
        assert "output_dir is 'file', which is a file: give the name of a folder" in refused(at, capsys)
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_place_is_told_before_a_model_is_loaded(folder, monkeypatch, capsys, command):
    monkeypatch.setattr("selfgen.cli.options.from_pretrained", no_model)
    with mounted(folder / "out", "ro"):
        line = refused(COMMANDS[command], capsys)
    assert "out can't be written to (it is read-only, or of somebody else): give another output_" in line


ROOM = {"bss": "180k", "rac": "180k", "rounds": "180k", "contexts": "12k", "generate": "4k", "eval": "12k"}


@pytest.mark.parametrize(
    "command",
    [pytest.param(one, marks=pytest.mark.slow if one in ("rac", "rounds", "eval") else ()) for one in COMMANDS],
)
@pytest.mark.one_case
def test_a_full_disk(folder, capsys, command):
    """One line; what was written before is whole, and with room the command goes on to the end of an unbroken run."""
    with mounted(folder / "out", f"size={ROOM[command]}"):
        Path("out/notes").write_bytes(b"x" * 1000)
        if command == "contexts":
            Path("out/notes").rename("out/.notes")  # another file would be refused
        line = refused(COMMANDS[command], capsys, said=True)
        assert "can't be written (" in line
        assert "out" in line
        assert "give the command again" in line or "--resume-from-checkpoint last" in line
        assert not half_written(Path("out"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(folder / "out")], check=True)
        code, _, err = run(COMMANDS[command], capsys)
        assert code == 0, err
        got = outputs(Path("out"))
    shutil.rmtree("out")
    assert run(COMMANDS[command], capsys)[0] == 0
    assert {name: one for name, one in got.items() if "notes" not in name} == outputs(Path("out"))


def test_a_journal_keeps_whole_lines_on_a_full_disk(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "rows.jsonl", {})
    rows = datasets.Dataset.from_list([{"x": 1}, {"x": 2}])
    journal.complete(rows.select([0]), 1, lambda part, _: part, "Rows")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("selfgen.cli.journal.os.fsync", full)
        with pytest.raises(SaveError, match=r"rows\.jsonl can't be written \(No space left on device\): make room"):
            journal.complete(rows, 1, lambda part, _: part, "Rows")
        with pytest.raises(SaveError, match=r"settings\.json can't be written"):
            Journal(tmp_path / "other.jsonl", {})
    assert (tmp_path / "rows.jsonl").read_text() == '{"x": 1}\n'
    assert not [*tmp_path.glob(".*partial")]


@pytest.mark.parametrize(("command", "size"), [("contexts", "4k"), ("rounds", "4k"), ("rounds", "8k")])
def test_a_full_cache_of_data(folder, monkeypatch, capsys, command, size):
    """`datasets` says that a file is closed, or gives the size that it does not know."""
    with mounted(folder / "small", f"size={size}"):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "small")
        line = refused(COMMANDS[command], capsys)
    assert f"the cache folder of `datasets`, {folder / 'small'}, is full (" in line
    assert "make room, or set HF_DATASETS_CACHE" in line


BROKEN = [
    ("contexts", "out/provenance.json", "out/provenance.json is no record of contexts that selfgen wrote: remove it"),
    ("contexts", "out/data/train-00001-of-00004.parquet", "train-00001-of-00004.parquet is broken (Parquet"),
    ("generate", "out/answers.jsonl.settings.json", "answers.jsonl.settings.json, line 1: broken JSON"),
    ("eval", "out/losses.jsonl.settings.json", "losses.jsonl.settings.json, line 1: broken JSON"),
    ("eval", "out/results.json", "selfgen eval did not write out/results.json, or it is broken: give another"),
]


@pytest.fixture(scope="module")
def done(source, tmp_path_factory):
    """A folder in which contexts, answers and losses are written, each next to the others."""
    folder = tmp_path_factory.mktemp("done")
    for command in ("contexts", "generate", "eval"):
        shutil.copytree(source, folder / command)
        with chdir(folder / command):
            assert main(COMMANDS[command] if command != "eval" else LOSSES) == 0
    return folder


@pytest.mark.parametrize("damage", ["empty", "half", "bytes"])
@pytest.mark.parametrize(("command", "file", "words"), BROKEN, ids=lambda one: str(one).rpartition("/")[2][:20])
@pytest.mark.each_value
def test_a_broken_file_of_its_own_is_named(done, tmp_path, monkeypatch, capsys, command, file, words, damage):
    """And no other file is changed."""
    shutil.copytree(done / command, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    size = Path(file).stat().st_size
    if damage == "bytes":
        Path(file).write_bytes(b"\xff" * size)
        words = words.replace(", line 1: broken JSON", " is not UTF-8")
    else:
        os.truncate(file, 0 if damage == "empty" else size // 2)
    before = contents(Path("out"))
    line = refused(LOSSES if command == "eval" else COMMANDS[command], capsys)
    assert words in line
    assert contents(Path("out")) == before


@pytest.mark.parametrize("name", ["answers.jsonl", "losses.jsonl"])
def test_lines_that_are_lost_are_made_again(done, tmp_path, monkeypatch, capsys, name):
    command = "generate" if name == "answers.jsonl" else "eval"
    shutil.copytree(done / command, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    want = outputs(Path("out"))
    os.truncate(f"out/{name}", len(Path("out", name).read_bytes()) // 2)
    assert run(LOSSES if command == "eval" else COMMANDS[command], capsys)[0] == 0
    assert outputs(Path("out")) == want


def test_what_a_checkpoint_counts_must_be_whole(tmp_path):
    """Such as where a stream was read; the checkpoint before is taken."""
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    os.truncate(tmp_path / "checkpoint-2" / "selfgen_log_0.json", 5)
    assert "selfgen_log_0.json is broken" in fault_of(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1, 2, 1], "row 2 has 1, as row 0 has"),
        ([1, None, 2], "row 1 has none"),
        (["a", "b", "c"], "row 0 has 'a'"),
        ([1.0, 2.5, 3.0], "row 0 has 1.0"),
    ],
)
def test_the_row_of_a_bad_sample_id_is_named(ids, words):
    rows = datasets.Dataset.from_dict({"sample_id": ids})
    with pytest.raises(DataError, match=re.escape(f"must hold a different integer in every row, but {words}: change")):
        check_sample_ids(rows)


# Options that lead nowhere


def test_a_run_needs_a_folder(folder, capsys):
    for command in ("bss", "rac", "rounds"):
        place = COMMANDS[command].index("--output_dir")
        line = refused([*COMMANDS[command][:place], *COMMANDS[command][place + 2 :]], capsys)
        assert "--output-dir" in line.replace("_", "-")
    assert not Path("trainer_output").exists()


def test_a_checkpoint_that_is_not_there_is_told_first(folder, capsys):
    """Also in a folder with a model, which would be refused otherwise."""
    shutil.copytree("model", "out")
    given = [one if one != "last" else "out/checkpoint-7" for one in COMMANDS["bss"]]
    assert "resume_from_checkpoint is 'out/checkpoint-7': no checkpoint there" in refused(given, capsys)
