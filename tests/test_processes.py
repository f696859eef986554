"""Several processes: one tokenizes for all on its machine, and all end where one fails."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from datasets import Dataset
from helpers.cli import flags, history, last_line, run
from helpers.data import ROWS, make_tokenizer, write_jsonl
from helpers.processes import in_ranks
from models import tiny_model

from selfgen import BSSConfig, BSSTrainer
from selfgen.cli import main
from selfgen.files import alone
from selfgen.training.processes import meet, once_per_machine


@pytest.fixture
def once(arguments) -> dict:
    """Arguments of ``selfgen train`` for one step."""
    return arguments | {"max_steps": 1, "save_strategy": "no"}


def count_maps(rank: int, folder: Path) -> None:
    """Note down the rows of every ``Dataset.map`` of this process."""
    real = Dataset.map

    def counted(self, *args, **kwargs):
        with (folder / f"rows-{rank}").open("a") as file:
            file.write(f"{len(self)}\n")
        return real(self, *args, **kwargs)

    Dataset.map = counted


def train_counted(rank: int, folder: Path, options: dict) -> None:
    count_maps(rank, folder)
    assert main(["train", *flags(options)]) == 0


def mapped_rows(folder: Path) -> dict[str, int]:
    return {file.name: sum(map(int, file.read_text().split())) for file in sorted(folder.glob("rows-*"))}


@pytest.mark.parametrize("num_rows", [pytest.param(16, marks=pytest.mark.slow), 12])
def test_one_process_tokenizes(once, tmp_path, capsys, num_rows):
    """The losses are those of one process, also where rows are dropped."""
    rows = [*(ROWS * 8)[:num_rows], {"prompt": "a", "completion": " "}]
    write_jsonl(Path(once["dataset"]), rows)
    given = once | {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01}
    in_ranks(train_counted, tmp_path, given)
    assert mapped_rows(tmp_path) == {"rows-0": num_rows + 1}
    whole = given | {"output_dir": tmp_path / "whole", "per_device_train_batch_size": 4}
    assert run(["train", *flags(whole)], capsys)[0] == 0
    losses = [[entry["loss"] for entry in history(one["output_dir"])] for one in (given, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def tokenize_in_memory(rank: int, folder: Path) -> None:
    count_maps(rank, folder)
    config = BSSConfig(str(folder / "out"), use_cpu=True, max_length=64)
    rows = {name: Dataset.from_list((ROWS * 8)[:size]) for name, size in (("a", 4), ("b", 6))}
    trainer = BSSTrainer(
        tiny_model("llama"), config, train_dataset=rows["b"], eval_dataset=rows, processing_class=make_tokenizer()
    )
    data = [trainer.train_dataset, *trainer.eval_dataset.values()]
    told = meet(say=[list(one["answer_ids"]) for one in data])
    assert told[0] == told[1]
    assert [len(one) for one in told[0]] == [6, 4, 6]


@pytest.mark.slow
def test_rows_in_memory_are_tokenized_once(tmp_path):
    in_ranks(tokenize_in_memory, tmp_path)
    assert mapped_rows(tmp_path) == {"rows-0": 16}


def fail_in_first(rank: int, folder: Path, options: dict) -> None:
    """The command ends with exit code 2; what it says goes to a file."""
    with (
        (folder / f"err-{rank}").open("w") as stream,
        contextlib.redirect_stderr(stream),
        pytest.raises(SystemExit, match="2"),
    ):
        main(["train", *flags(options)])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a", "completion": " "}], "no row is left"),
        pytest.param([{"question": "a"}], "question", marks=pytest.mark.slow),
    ],
)
def test_all_processes_end_where_the_first_one_fails(once, tmp_path, rows, words):
    """With its message, and not after a timeout."""
    write_jsonl(Path(once["dataset"]), rows)
    in_ranks(fail_in_first, tmp_path, once)
    lines = [last_line((tmp_path / f"err-{rank}").read_text()) for rank in range(2)]
    assert words in lines[0]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_all_processes_end_where_the_folder_is_taken(once, tmp_path):
    folder = Path(once["output_dir"])
    folder.mkdir()
    with alone(folder):
        in_ranks(fail_in_first, tmp_path, once)
    for rank in range(2):
        assert f"another process is writing {folder}" in last_line((tmp_path / f"err-{rank}").read_text())


def make_and_meet(rank: int, folder: Path) -> None:
    BSSConfig(str(folder), use_cpu=True)  # which starts accelerate

    def make():
        (folder / f"made-{rank}").touch()
        return {"rank": rank}

    assert once_per_machine(make) == {"rank": 0}
    assert meet(say=rank) == [0, 1]
    for kind in (TypeError, FileNotFoundError, ValueError, OSError, ImportError):
        with pytest.raises(kind, match="the message"):
            meet(kind("the message") if rank == 0 else None)
    with pytest.raises(RuntimeError if rank else KeyError, match="odd"):
        meet(KeyError("odd") if rank == 0 else None)
    with pytest.raises(ValueError, match="broken"):
        once_per_machine(lambda: int("broken"))
    with pytest.raises(ValueError, match="last rank"):
        meet(ValueError("last rank") if rank == 1 else None)


def test_what_one_process_does_for_all(tmp_path):
    in_ranks(make_and_meet, tmp_path)
    assert [file.name for file in tmp_path.glob("made-*")] == ["made-0"]


def test_what_one_process_does_alone():
    assert once_per_machine(lambda: 5) == 5
    assert meet(say=3) == [3]
    with pytest.raises(KeyError):
        meet(KeyError())
