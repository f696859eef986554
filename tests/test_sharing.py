"""Several processes share the work of `selfgen contexts`, `generate` and `eval`, and a dead one's work is made anew.

What they write must not tell how many they were. Most processes are forked from one that has imported everything, with
the numbers that torchrun gives them; the slow tests start torchrun itself.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, chdir
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from helpers.cli import ROOT, flags, refused, run, save_model
from helpers.data import ROWS, write_jsonl
from helpers.processes import Killed, begun, contents, forked, kill_at
from helpers.training import rows
from models import tiny_model

from selfgen import ContextGenerator, load_contexts, write_contexts
from selfgen.cli import main, options
from selfgen.cli.journal import Journal
from selfgen.context.budget import PassBudget
from selfgen.files import SaveError, alone, taken
from selfgen.sharing import Parts, is_first
from selfgen.stored_contexts import OfflineError, read_provenance

COMMON = {"model": "model", "dataset": "rows.jsonl", "max_length": 32, "use_cpu": True}
COMMANDS: dict[str, list[str]] = {
    "contexts": [
        "contexts",
        *flags(COMMON | {"output_dir": "out", "self_prob": 0.5, "shard_rows": 3, "token_budget": 32, "balance": 4}),
    ],
    "generate": [
        "generate",
        *flags(COMMON | {"output_file": "out/answers.jsonl", "chunk_rows": 3, "max_new_tokens": 6, "temperature": 1.0}),
        "--correct",
    ],
    "eval": [
        "eval",
        *flags(COMMON | {"output_dir": "out", "batch_size": 1, "max_new_tokens": 6, "temperature": 1.0}),
        *(
            "--metrics",
            "gap",
            "correction",
            "loss",
            "curve",
        ),  # exact_match starts processes of its own, which takes seconds
    ],
}
COUNT = 16


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_model(folder / "model", initializer_range=0.5)
    write_jsonl(folder / "rows.jsonl", ROWS * (COUNT // len(ROWS)))
    return folder


@pytest.fixture
def folder(source, tmp_path, monkeypatch) -> Path:
    """A folder to work in, with a model and rows."""
    for name in ("model", "rows.jsonl"):
        (tmp_path / name).symlink_to(source / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def enter(folder: str, rank: int | None, world: int) -> None:
    """Be this process of a job, or one that was begun by hand."""
    torch.set_num_threads(1)
    os.chdir(folder)
    datasets.config.HF_DATASETS_CACHE = Path("cache").absolute()
    if rank is not None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    sys.stdout, sys.stderr = (
        open(f"{name}-{'hand' if rank is None else rank}", "a", buffering=1)  # noqa: SIM115
        for name in ("stdout", "stderr")
    )


def work(folder: str, rank: int | None, world: int, arguments: list[str]) -> None:
    enter(folder, rank, world)
    mapped = datasets.Dataset._map_single

    @functools.wraps(mapped)  # fingerprints look at the signature
    def counted(**options):
        Path(f"mapped-{rank}").touch()
        yield from mapped(**options)

    datasets.Dataset._map_single = staticmethod(counted)
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(arguments: list[str], folder: Path, world: int) -> list:
    return [forked(work, str(folder), rank, world, arguments) for rank in range(world)]


def end(processes: list, folder: Path, code: int = 0) -> None:
    for process in processes:
        process.join(120)
        assert process.exitcode == code, [file.read_text() for file in folder.glob("stderr-*")]


def outputs(folder: Path) -> dict[str, bytes]:
    """All files below ``out``, but for the plots, and for the locks of folders, which stay."""
    found = contents(folder / "out")
    return {name: one for name, one in found.items() if not name.endswith((".settings.json.lock", ".png", ".svg"))
            and name != ".answers.jsonl.lock"}  # fmt: skip


def of_one_process(command: str, folder: Path, capsys) -> dict[str, bytes]:
    with chdir(folder):
        assert run(COMMANDS[command], capsys)[0] == 0
    return outputs(folder)


# Locks


def test_a_file_is_taken_once(tmp_path):
    with taken(tmp_path / "file") as one, taken(tmp_path / "file") as other, taken(tmp_path / "file2") as another:
        assert (one, other, another) == (True, False, True)
    assert not [*tmp_path.iterdir()]
    with pytest.raises(KeyError), taken(tmp_path / "file"):
        raise KeyError
    with taken(tmp_path / "file") as again:
        assert again


def hold(ready, path: Path, seconds: float) -> None:
    with alone(path):
        ready.set()
        time.sleep(seconds)


def test_a_process_may_wait_for_another(tmp_path):
    begun(hold, tmp_path / "file", 1.0)
    with pytest.raises(ValueError, match="another process is writing"), alone(tmp_path / "file", wait=0.1):
        pass
    with alone(tmp_path / "file", wait=60):
        pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def none(*args, **kwargs):
        raise NotImplementedError("no flock")

    monkeypatch.setattr("selfgen.files.FileLock.acquire", none)
    with pytest.raises(SaveError, match=r"file can't be locked \(no flock\): mount the file system with locks"):
        taken(tmp_path / "file").__enter__()


# Parts


def parts_of(folder: Path, count: int) -> Parts:
    files = [folder / f"{number}" for number in range(count)]
    return Parts(files, [1] * count, lambda number: files[number].exists())


def make_parts(folder: str, name: str, count: int, slow: int | None, *ready) -> None:
    """Each file says who has made it; the one that is ``slow`` takes longer than the test."""
    parts = parts_of(Path(folder), count)

    def make(number: int, done: Callable[[int], object]) -> None:
        for event in ready:
            event.set()
        time.sleep(120 if number == slow else 0.02)
        parts.files[number].write_text(parts.files[number].read_text() if parts.is_whole(number) else name)
        with (Path(folder).parent / "made").open("a") as log:
            log.write(f"{number}\n")

    parts.complete(make, "", progress=False)
    assert all(parts.is_whole(number) for number in range(count))


@pytest.mark.slow
def test_each_part_is_made_once(tmp_path):
    (tmp_path / "parts").mkdir()
    processes = [forked(make_parts, str(tmp_path / "parts"), name, 24, None) for name in "abcd"]
    end(processes, tmp_path)
    assert sorted((tmp_path / "made").read_text().split(), key=int) == [str(number) for number in range(24)]
    makers = {file.read_text() for file in (tmp_path / "parts").iterdir()}
    assert len(makers) > 1
    assert makers <= set("abcd")


def test_the_part_of_a_dead_process_is_made_by_one_that_waits(tmp_path):
    (tmp_path / "parts").mkdir()
    dead = begun(make_until_killed, str(tmp_path / "parts"))
    other = forked(make_parts, str(tmp_path / "parts"), "other", 4, None)
    while len([*(tmp_path / "parts").glob("[0-9]")]) < 3:
        time.sleep(0.01)
    other.join(1)
    assert other.is_alive()  # as the first one might still make its part
    dead.kill()
    end([other], tmp_path)
    assert {file.read_text() for file in (tmp_path / "parts").iterdir()} == {"other"}
    assert len([*(tmp_path / "parts").iterdir()]) == 4


def make_until_killed(ready, folder: str) -> None:
    make_parts(folder, "dead", 4, 0, ready)


def test_what_is_waited_for_is_told(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="selfgen")
    monkeypatch.setattr("selfgen.sharing._PAUSE", 0.0)
    monkeypatch.setattr("selfgen.sharing._PATIENCE", 2)
    parts, asked, made = parts_of(tmp_path, 2), itertools.count(), []
    with ExitStack() as other:
        other.enter_context(taken(parts.files[0]))
        exists = parts.is_whole

        def is_whole(number: int) -> bool:
            if next(asked) == 20:
                other.close()  # as if it had died
            return exists(number)

        def make(number: int, done: Callable[[int], object]) -> None:
            made.append(number)
            parts.files[number].touch()

        parts.is_whole = is_whole
        parts.complete(make, "", progress=False)
    assert made == [1, 0]
    assert caplog.messages == [f"waiting for {parts.files[0]}, which another process makes"]


def test_the_bar_counts_the_rows_of_all(tmp_path, monkeypatch):
    seen: list[int] = []

    class Bar:
        def __init__(self, total: int, initial: int, **options):
            self.total, self.n = total, initial

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, more: int) -> None:
            self.n += more
            seen.append(self.n)

    monkeypatch.setattr("selfgen.sharing.tqdm", Bar)
    monkeypatch.setattr("selfgen.sharing._LOOK", -1.0)
    files = [tmp_path / f"{number}" for number in range(3)]
    files[0].touch()
    parts = Parts(files, [10, 5, 2], lambda number: files[number].exists())

    def make(number: int, done: Callable[[int], object]) -> None:
        done(3)
        files[2].touch()  # by another process
        done(2)
        files[number].touch()

    parts.complete(make, "", progress=True)
    assert seen == [13, 17, 17]


# The commands


@pytest.mark.parametrize(
    ("command", "world"),
    [
        ("contexts", 4),
        ("generate", 2),
        ("eval", 2),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("contexts", 2), ("generate", 4), ("eval", 4))),
    ],
)
def test_any_number_of_processes_writes_the_same(folder, tmp_path_factory, capsys, command, world):
    """One of them shows the bar and prints what has been done; it counts the rows of all."""
    want = of_one_process(command, folder, capsys)
    (folder / "out").rename(folder / "whole")
    shutil.rmtree(folder / "cache")
    end(start(COMMANDS[command], folder, world), folder)
    assert outputs(folder) == want
    said = [(folder / f"stdout-{rank}").read_text() for rank in range(world)]
    assert said[0]
    assert not any(said[1:])
    logs = [(folder / f"stderr-{rank}").read_text() for rank in range(world)]
    assert f"{COUNT}/{COUNT}" in logs[0]
    assert "data: " in logs[0]
    assert not any(logs[1:])
    assert len([*folder.glob("mapped-*")]) == 1  # the others read what the first one to come has tokenized


def begin_and_hang(ready, folder: str, rank: int | None, world: int, arguments: list[str], target: str, call: int):
    """Stop for good at this (0-based) call of ``target``, in the middle of a shard or a chunk."""
    enter(folder, rank, world)
    patch = pytest.MonkeyPatch()
    hang_at(patch, target, call, ready)
    main(arguments)


def hang_at(patch: pytest.MonkeyPatch, target: str, call: int, ready) -> None:
    original, calls = pkgutil.resolve_name(target), itertools.count()

    def function(*args, **kwargs):
        if next(calls) == call:
            ready.set()
            time.sleep(600)
        return original(*args, **kwargs)

    patch.setattr(target, function)


HANGS = {
    "contexts": ("selfgen.ContextGenerator.contexts", 2),  # the first call checks the values
    "generate": ("selfgen.ContextGenerator.answer", 1),
    "eval": ("selfgen.cli.eval.row_losses", 2),
}


@pytest.mark.parametrize(
    "command", ["contexts", *(pytest.param(one, marks=pytest.mark.slow) for one in ("generate", "eval"))]
)
def test_the_work_of_a_killed_process_is_done_by_another(folder, capsys, command):
    """While the job goes on; a job of two may be gone on with by four, or by one."""
    want = of_one_process(command, folder, capsys)
    (folder / "out").rename(folder / "whole")
    target, call = HANGS[command]
    dead = begun(begin_and_hang, str(folder), 1, 2, COMMANDS[command], target, call)
    (first,) = start(COMMANDS[command], folder, 1)
    first.join(2)
    assert first.is_alive(), "it does not wait"
    dead.kill()
    end([first], folder)
    assert outputs(folder) == want

    (folder / "out").rename(folder / "killed")
    both = [begun(begin_and_hang, str(folder), rank, 2, COMMANDS[command], target, call) for rank in range(2)]
    for process in both:
        process.kill()
        process.join()
    end(start(COMMANDS[command], folder, 4), folder)
    assert outputs(folder) == want


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_processes_that_are_killed_at_any_time(folder, capsys, command):
    """Three work at a time; whichever is killed, another one is begun."""
    want = of_one_process(command, folder, capsys)
    (folder / "out").rename(folder / "whole")
    draw = random.Random(4)
    for _ in range(4):
        running = [forked(work, str(folder), None, 1, COMMANDS[command]) for _ in range(3)]
        for _ in range(5):
            time.sleep(draw.uniform(0.0, 1.5))
            dead = running.pop(draw.randrange(3))
            dead.kill()
            dead.join()
            running.append(forked(work, str(folder), None, 1, COMMANDS[command]))
        end(running, folder)
        assert outputs(folder) == want
        shutil.rmtree(folder / "out")


@pytest.mark.parametrize(
    "command", ["contexts", *(pytest.param(one, marks=pytest.mark.slow) for one in ("generate", "eval"))]
)
def test_two_commands_begun_by_hand_share_the_work(folder, capsys, command):
    """As on two machines with a folder in common; each tells what has been done."""
    want = of_one_process(command, folder, capsys)
    (folder / "out").rename(folder / "whole")
    processes = [forked(work, str(folder), None, 1, COMMANDS[command]) for _ in range(2)]
    end(processes, folder)
    assert outputs(folder) == want
    said = (folder / "stdout-hand").read_text()
    assert (
        said.count({"contexts": "contexts of 16 rows", "generate": "answers are in"}.get(command, "results are")) == 2
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_processes_of_other_settings_are_refused(folder, capsys, command):
    """While another process makes the first shard or chunk, so that nothing is there yet."""
    target, _ = HANGS[command]
    other = begun(begin_and_hang, str(folder), None, 1, COMMANDS[command], target, int(command == "contexts"))
    before = outputs(folder)
    assert "seed was 0, is 7" in refused([*COMMANDS[command], "--seed", "7"], capsys)
    assert outputs(folder) == before
    other.kill()
    other.join()


@pytest.mark.parametrize(
    "command", ["contexts", *(pytest.param(one, marks=pytest.mark.slow) for one in ("generate", "eval"))]
)
def test_all_processes_tell_of_an_error(folder, command):
    (folder / "rows.jsonl").unlink()
    write_jsonl(folder / "rows.jsonl", [{"question": "a"}])
    end(start(COMMANDS[command], folder, 2), folder, code=2)
    for rank in range(2):
        assert f"selfgen {command}: error: " in (folder / f"stderr-{rank}").read_text()


# Low precision: what turns near ties is agreed on


def measured_by(number: int):
    return lambda *args, **kwargs: PassBudget(16 + 8 * number, 2.0 + number)


def write_rounded(folder: str, number: int, *ready) -> None:
    """Write contexts in bf16 with a budget that is measured differently in each process."""
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setattr("selfgen.context.generator.measure_budget", measured_by(number))
    if ready:
        hang_at(patch, "selfgen.ContextGenerator.contexts", 2, *ready)
    rounded(Path(folder))


def rounded(folder: Path, generator: ContextGenerator | None = None, **changes) -> dict:
    generator = generator or ContextGenerator(tiny_model("llama").to(torch.bfloat16))
    given = {"self_prob": 0.5, "batch_size": 3, "shard_rows": 4, "progress": False}
    return write_contexts(generator, rows(16), folder, **given | changes)


@pytest.mark.slow
def test_in_bf16_all_processes_have_the_budget_of_the_first(tmp_path, monkeypatch):
    dead = begun(write_rounded_until_killed, str(tmp_path / "shared"), 1)
    others = [forked(write_rounded, str(tmp_path / "shared"), number) for number in (2, 3)]
    dead.kill()
    end(others, tmp_path)
    settings = read_provenance(tmp_path / "shared")["settings"]
    assert (settings["batch_size"], settings["token_budget"], settings["balance"]) == (3, 24, 3.0)

    monkeypatch.setattr("selfgen.context.generator.measure_budget", lambda *a, **k: pytest.fail("measured again"))
    generator = ContextGenerator(tiny_model("llama").to(torch.bfloat16))
    shard = next((tmp_path / "shared" / "data").glob("*00001-of*"))
    before = contents(tmp_path / "shared")
    shard.unlink()
    rounded(tmp_path / "shared", generator)
    assert generator.budget == PassBudget(24, 3.0)
    assert contents(tmp_path / "shared") == before
    generator = ContextGenerator(tiny_model("llama").to(torch.bfloat16), token_budget=24, balance=3.0)
    rounded(tmp_path / "whole", generator)
    assert contents(tmp_path / "whole") == before

    shard.unlink()
    before = contents(tmp_path / "shared")
    with pytest.raises(OfflineError, match=r"bfloat16 depend on .* \(batch_size was 3, is 2\): give the former values"):
        rounded(tmp_path / "shared", batch_size=2)
    other = ContextGenerator(tiny_model("llama").to(torch.bfloat16), token_budget=32)
    with pytest.raises(OfflineError, match="token_budget was 24, is 32"):
        rounded(tmp_path / "shared", other)
    assert contents(tmp_path / "shared") == before


def write_rounded_until_killed(ready, folder: str, number: int) -> None:
    write_rounded(folder, number, ready)


def test_in_bf16_an_older_folder_is_gone_on_with(tmp_path):
    generator = ContextGenerator(tiny_model("llama").to(torch.bfloat16), token_budget=24, balance=3.0)
    rounded(tmp_path, generator)
    before = contents(tmp_path)
    record = read_provenance(tmp_path)
    for name in ("batch_size", "method", "token_budget", "balance"):
        del record["settings"][name]
    (tmp_path / "provenance.json").write_text(json.dumps(record))
    next((tmp_path / "data").glob("*00001-of*")).unlink()
    rounded(tmp_path, generator)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["generate", pytest.param("eval", marks=pytest.mark.slow)])
def test_in_bf16_rows_are_computed_in_the_chunks_that_were_noted_down(folder, capsys, command):
    """An answer may depend on the rows that are answered with it, so these are always the same ones."""
    given = [*COMMANDS[command], "--dtype", "bfloat16"]
    assert run(given, capsys)[0] == 0
    want = outputs(folder)
    (folder / "out").rename(folder / "whole")
    target, call = HANGS[command]
    dead = begun(begin_and_hang, str(folder), 0, 1, given, target, call)
    dead.kill()
    dead.join()
    more = ["--chunk_rows", "5"] if command == "generate" else []
    end(start([*given, *more], folder, 2), folder)
    found = outputs(folder)
    budgets = {f"{name}.jsonl.settings.json" for name in ("gap", "losses")}  # each measurement has its own
    assert {name for name in want if found.get(name) != want[name]} <= {*budgets, "results.json"}
    file = folder / "out" / ("answers.jsonl" if command == "generate" else "losses.jsonl")
    settings = json.loads(file.with_name(f"{file.name}.settings.json").read_text())
    assert settings["batch_size"] == (32 if command == "generate" else 1)
    assert settings["chunk_rows"] == (3 if command == "generate" else 4)
    file.write_text("")
    assert "batch_size was" in refused([*given, "--batch_size", "2"], capsys, said=True)
    file.unlink()
    assert run([*given, "--batch_size", "2"], capsys)[0] == 0  # begun anew
    assert json.loads(file.with_name(f"{file.name}.settings.json").read_text())["batch_size"] == 2


# Files of rows


def complete(file: Path, count: int, chunk_rows: int) -> list[int]:
    """Complete a journal of numbers; returns those that were made now."""
    made: list[int] = []

    def make(part: list[dict], _) -> list[dict]:
        made.extend(row["x"] for row in part)
        return part

    Journal(file, {}).complete(Dataset.from_list([{"x": x} for x in range(count)]), chunk_rows, make, "Rows")
    return made


WHOLE = "".join(f'{{"x": {x}}}\n' for x in range(7))


@pytest.mark.parametrize("lines", range(8))
@pytest.mark.parametrize("half", ["", '{"x'])
def test_what_a_kill_left_of_a_chunk_is_made_again(tmp_path, lines, half):
    file = tmp_path / "rows.jsonl"
    Journal(file, {})
    file.write_text("".join(WHOLE.splitlines(keepends=True)[:lines]) + half)
    assert complete(file, 7, 3) == ([] if lines == 7 else list(range(lines // 3 * 3, 7)))
    assert file.read_text() == WHOLE
    assert complete(file, 7, 2) == []
    assert not (tmp_path / ".rows.jsonl.chunks").exists()


# fsync: the settings, the same with the size of chunks, and then each chunk, by itself and in the file
@pytest.mark.parametrize(("call", "made"), [(2, 7), (3, 4), (4, 4), (5, 1), (6, 1), (7, 0)])
def test_a_chunk_is_written_once(tmp_path, monkeypatch, call, made):
    """Whether a process dies while it writes a chunk, or while it adds the chunk to the file."""
    file = tmp_path / "rows.jsonl"
    with monkeypatch.context() as patch:
        kill_at(patch, "selfgen.files.os.fsync", call)
        with pytest.raises(Killed):
            complete(file, 7, 3)
    assert complete(file, 7, 5) == list(range(7 - made, 7))
    assert file.read_text() == WHOLE


def test_a_file_that_is_changed_meanwhile(tmp_path):
    file = tmp_path / "rows.jsonl"

    def make(part: list[dict], _) -> list[dict]:
        if part[0]["x"] == 2:
            file.write_text("")
        return part

    with pytest.raises(ValueError, match=r"rows\.jsonl was changed by something else meanwhile"):
        Journal(file, {}).complete(Dataset.from_list([{"x": x} for x in range(4)]), 1, make, "Rows")


# Devices and launchers


def test_each_process_takes_its_own_device(monkeypatch):
    taken_devices: list[int] = []
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    monkeypatch.setattr("torch.accelerator.set_device_index", taken_devices.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert options.device(False) == torch.device("cuda")
    assert taken_devices == []
    for rank in ("0", "3", "5"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert options.device(False) == torch.device("cuda")
        assert options.device(True) == torch.device("cpu")
    assert taken_devices == [0, 3, 1]


def test_the_first_process_speaks(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert is_first()
    for rank, first in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert is_first() == first


def launch(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    own = {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | own | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    "accelerate": ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "command"), [*(("torchrun", one) for one in ("generate", "eval")), ("accelerate", "contexts")]
)
def test_under_a_launcher(folder, capsys, launcher, command):
    want = of_one_process(command, folder, capsys)
    (folder / "out").rename(folder / "whole")
    done = launch([sys.executable, "-m", *LAUNCHERS[launcher], "-m", "selfgen", *COMMANDS[command]], folder)
    assert done.returncode == 0, done.stderr
    assert outputs(folder) == want
    said = {"contexts": "contexts of 16 rows", "generate": "answers are in"}.get(command, "results are in")
    assert done.stdout.count(said) == 1
    assert done.stderr.count("data: ") == 1


@pytest.mark.slow
def test_the_example_of_a_launch(folder, capsys):
    want = of_one_process("contexts", folder, capsys)
    (folder / "out").rename(folder / "whole")
    done = launch(["sh", str(ROOT / "examples/launch/contexts.sh"), *COMMANDS["contexts"][1:]], folder, GPUS="2")
    assert done.returncode == 0, done.stderr
    assert outputs(folder) == want


@pytest.mark.slow
def test_a_killed_worker_of_torchrun(folder, capsys):
    """torchrun ends the others; one process goes on, with the bytes of an unbroken run."""
    (folder / "rows.jsonl").unlink()
    write_jsonl(folder / "rows.jsonl", ROWS * 300)
    command = [sys.executable, "-m", *LAUNCHERS["torchrun"], "-m", "selfgen", *COMMANDS["contexts"]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    while not (shards := [*folder.glob("out/data/*.parquet")]):
        assert job.poll() is None
        time.sleep(0.02)
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 1
    assert "Signal 9 (SIGKILL)" in said
    assert 0 < len(shards) < 200
    with pytest.raises(OfflineError, match="are not complete"):
        load_contexts("out")
    assert run(COMMANDS["contexts"], capsys)[0] == 0
    found = outputs(folder)
    (folder / "out").rename(folder / "killed")
    assert of_one_process("contexts", folder, capsys) == found


@pytest.mark.slow
def test_torchrun_ends_with_the_message_of_the_process_that_failed(folder):
    (folder / "rows.jsonl").unlink()
    write_jsonl(folder / "rows.jsonl", [{"question": "a"}])
    done = launch([sys.executable, "-m", *LAUNCHERS["torchrun"], "-m", "selfgen", *COMMANDS["contexts"]], folder)
    assert done.returncode == 1
    assert "selfgen contexts: error: " in done.stderr
