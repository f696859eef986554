"""Training in rounds: each writes contexts with the model of the round before, and goes on where it was killed."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import datasets
import pytest
import torch
from helpers.cli import ROOT, flags, history, run
from helpers.processes import Killed, contents, kill_at, record_calls
from helpers.training import Tokenizer, config, rows, weights
from models import tiny_model
from transformers import AutoModelForCausalLM

from selfgen import BSSConfig, ContextGenerator, load_contexts, train_rounds
from selfgen.provenance import weights_hash
from selfgen.stored_contexts import OfflineError, read_provenance
from selfgen.training.config import with_fixed_self_prob
from selfgen.training.rounds import split_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def load(name: str):
    return tiny_model("llama") if name == "pre-trained" else AutoModelForCausalLM.from_pretrained(name)


def run_rounds(folder: Path, rounds: int = 2, schedule=None, **changes) -> None:
    """Two rounds of 6 rows: 3 shards of contexts, 3 steps, a checkpoint each."""
    options = {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 1}
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    train_rounds(
        load,
        "pre-trained",
        rows(12),
        config(folder, **{**options, **saving, **changes}),
        rounds=rounds,
        processing_class=Tokenizer(),
        schedule=schedule,
        shard_rows=2,
        batch_size=2,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("rounds") / "whole"
    run_rounds(folder)
    return folder


def final(folder: Path) -> torch.Tensor:
    return weights(AutoModelForCausalLM.from_pretrained(folder))


def test_parts():
    parts = split_rows(rows(11), 3, seed=0)
    ids = [list(part["sample_id"]) for part in parts]
    assert sorted(len(part) for part in ids) == [3, 4, 4]
    together = list(chain(*ids))
    assert together != sorted(together) == list(range(11))
    assert ids == [list(part["sample_id"]) for part in split_rows(rows(11), 3, seed=0)]
    assert ids != [list(part["sample_id"]) for part in split_rows(rows(11), 3, seed=1)]
    for rounds in (0, 12):
        with pytest.raises(OfflineError, match=f"rounds is {rounds}; 11 rows can be split for 1 to 11 rounds"):
            split_rows(rows(11), rounds, seed=0)


def test_each_round_writes_with_the_model_of_the_round_before(whole):
    models = [load("pre-trained"), load(str(whole / "round-0" / "model"))]
    written = [load_contexts(whole / f"round-{number}" / "contexts") for number in range(2)]
    assert sorted(i for contexts in written for i in contexts["sample_id"]) == list(range(12))
    hashes = [read_provenance(whole / f"round-{number}" / "contexts")["settings"]["weights"] for number in range(2)]
    assert hashes == [weights_hash(model) for model in models]
    assert hashes[0] != hashes[1]
    for model, contexts in zip(models, written, strict=True):
        columns = (list(contexts[name]) for name in ("prompt_ids", "answer_ids"))
        keys = {"seed": 42, "sample_ids": list(contexts["sample_id"]), "method": "sequential"}
        expected = ContextGenerator(model).contexts(*columns, 0.5, **keys)
        assert list(contexts["context_ids"]) == [tokens.tolist() for tokens in expected.tokens]
    assert torch.equal(final(whole), final(whole / "round-1" / "model"))
    assert not torch.equal(final(whole), final(whole / "round-0" / "model"))
    assert len(history(whole / "round-1")) == 3


@pytest.mark.parametrize(
    ("target", "call", "batches", "steps"),  # and what is left to do
    [
        ("transformers.Trainer.training_step", 1, 3, 5),  # training of round 0, behind a checkpoint
        ("selfgen.training.rounds.write_contexts", 1, 3, 3),  # between the rounds
        pytest.param("selfgen.context.ContextGenerator.contexts", 6, 2, 3, marks=pytest.mark.slow),  # of round 1
        pytest.param("transformers.Trainer.training_step", 5, 0, 1, marks=pytest.mark.slow),  # of round 1, likewise
        ("selfgen.BASHTrainer.save_state", 1, 0, 0),  # round 1 is trained, but not saved
        ("selfgen.training.rounds.Path.rename", 1, 0, 0),  # saved, but not in its place
        ("selfgen.training.rounds.shutil.copytree", 0, 0, 0),  # all but the copy of the last model
    ],
)
@pytest.mark.one_case
def test_killed_rounds_go_on(tmp_path, whole, monkeypatch, target, call, batches, steps):
    with monkeypatch.context() as patch:
        kill_at(patch, target, call)
        with pytest.raises(Killed):
            run_rounds(tmp_path)
    assert not (tmp_path / "config.json").exists()
    generated = record_calls(monkeypatch, "selfgen.context.ContextGenerator.contexts")
    trained = record_calls(monkeypatch, "transformers.Trainer.training_step")
    run_rounds(tmp_path, resume_from_checkpoint="last")
    assert len([prompts for _, prompts, *_ in generated if prompts]) == batches
    assert len(trained) == steps
    assert torch.equal(final(tmp_path), final(whole))
    for number in range(2):
        folders = [folder / f"round-{number}" for folder in (tmp_path, whole)]
        contexts, expected = (load_contexts(folder / "contexts").to_list() for folder in folders)
        assert contexts == expected
        losses, expected = ([entry["loss"] for entry in history(folder)] for folder in folders)
        assert losses == expected


def test_rounds_that_are_there_are_not_overwritten(whole):
    before = contents(whole)
    with pytest.raises(OfflineError, match=r"has rounds already; continue them \(--resume-from-checkpoint last\)"):
        run_rounds(whole)
    with pytest.raises(OfflineError, match='rounds continue from "last" only'):
        run_rounds(whole, resume_from_checkpoint=str(whole / "round-0" / "checkpoint-3"))
    for changes, words in (
        ({"self_prob": None}, "self_prob was 0.5, is 0.1"),
        ({"self_prob": "auto"}, r"self_prob is auto: .* made before its steps\. Give numbers"),
        ({"self_prob_schedule": "disagreement"}, "self_prob_schedule is disagreement"),
        ({"self_prob_warmup": "settled"}, "self_prob_warmup is settled"),
        ({"self_prob": 0.25}, "self_prob was 0.5, is 0.25"),
        ({"seed": 1}, "seed was 42, is 1"),
        ({"sampling_temperature": 0.7}, "temperature was 1.0, is 0.7"),
        ({"rounds": 3}, "rows was"),
    ):
        with pytest.raises(OfflineError, match=words):
            run_rounds(whole, **changes, resume_from_checkpoint="last")
    run_rounds(whole, resume_from_checkpoint="last")  # there is nothing left to do
    assert contents(whole) == before


def test_what_is_not_given_is_as_of_stored_contexts(tmp_path):
    """Not what follows training steps, which is refused only where it is asked for."""

    def fixed(**given):
        found = with_fixed_self_prob(BSSConfig(str(tmp_path), use_cpu=True, report_to=[], **given))
        return found.self_prob, found.self_prob_schedule, found.warm_up, found.follows_steps

    assert fixed() == (0.1, "constant", 0.0, False)
    assert fixed(self_prob=0.5) == (0.5, "constant", 0.0, False)
    assert fixed(self_prob_schedule="linear") == (0.1, "linear", 0.0, False)
    assert fixed(self_prob_warmup=0.5) == (0.1, "constant", 0.5, False)
    assert fixed(self_prob_warmup="settled") == (0.1, "constant", "settled", True)
    assert fixed(self_prob_schedule="disagreement") == (0.1, "disagreement", 0.0, True)
    given = BSSConfig(str(tmp_path), use_cpu=True, report_to=[])
    given.self_prob = 0.2
    assert with_fixed_self_prob(given).self_prob == 0.2
    assert given.self_prob_schedule == "disagreement"


def test_rounds_run_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 2)
    with pytest.raises(OfflineError, match="rounds run in one process"):
        run_rounds(tmp_path)


def test_rows_that_the_model_has_no_positions_for_cost_no_contexts(tmp_path):
    with pytest.raises(OfflineError, match=r"pre-trained: max_length is 100000, but the model has \d+ positions"):
        run_rounds(tmp_path, max_length=100_000)
    assert not list(tmp_path.glob("round-*/*"))


def test_a_teacher_that_is_not_there_costs_no_contexts(tmp_path):
    with pytest.raises(OfflineError, match="pre-trained: target is teacher, but there is none"):
        run_rounds(tmp_path, target="teacher")
    assert not list(tmp_path.glob("round-*/*"))


def test_a_schedule_goes_from_round_to_round(tmp_path):
    run_rounds(tmp_path, self_prob=0.8, self_prob_start=0.2, self_prob_schedule="linear", max_steps=1)
    settings = [read_provenance(tmp_path / f"round-{number}" / "contexts")["settings"] for number in range(2)]
    assert [entry["self_prob"] for entry in settings] == [0.2, 0.8]


@pytest.mark.slow
def test_a_function_goes_from_round_to_round(tmp_path):
    run_rounds(tmp_path, max_steps=1, schedule=lambda start, end, progress: 0.3 + 0.4 * progress)
    settings = [read_provenance(tmp_path / f"round-{number}" / "contexts")["settings"] for number in range(2)]
    assert [entry["self_prob"] for entry in settings] == pytest.approx([0.3, 0.7])


def test_contexts_under_mixed_precision(tmp_path):
    run_rounds(tmp_path, rounds=1, bf16=True, max_steps=1)
    assert read_provenance(tmp_path / "round-0" / "contexts")["settings"]["precision"] == "bfloat16"


@pytest.mark.slow
def test_the_example_runs_in_rounds(arguments, capsys):
    """``examples/bash.yaml`` as it is, but for the model and the data."""
    data = {"prompt_column": "prompt", "completion_column": "completion"}
    small = {**arguments, **data, "max_steps": -1}
    command = ["train", str(ROOT / "examples" / "bash.yaml"), *flags(small)]
    assert run(command, capsys)[0] == 0
    out = Path(arguments["output_dir"])
    assert sorted(file.name for file in out.glob("round-*")) == [f"round-{number}" for number in range(4)]
    ids = [i for number in range(4) for i in load_contexts(out / f"round-{number}" / "contexts")["sample_id"]]
    assert sorted(ids) == list(range(16))
    source = read_provenance(out / "round-1" / "contexts")["source"]
    assert source["model"] == str(out / "round-0" / "model")
    assert (source["pretrained"], source["round"], source["rounds"]) == (arguments["model"], 1, 4)
    assert torch.equal(final(out), final(out / "round-3" / "model"))
    code, _, err = run(command, capsys)
    assert code == 2
    assert "has rounds already" in err
    assert run([*command, "--resume_from_checkpoint", "last"], capsys)[0] == 0
