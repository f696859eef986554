"""Stored contexts: written whole or resumed, trained on as they are, from Python and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
from helpers.cli import flags, history, run
from helpers.data import ROWS, write_jsonl
from helpers.processes import Killed, contents, kill_at, kill_command
from helpers.training import Tokenizer, config, losses_of, rows, weights
from models import VOCAB, tiny_model
from transformers import AutoModelForCausalLM

from selfgen import BASHTrainer, BSSTrainer, ContextGenerator, Masks, load_contexts, write_contexts
from selfgen.data import load_rows
from selfgen.provenance import weights_hash
from selfgen.stored_contexts import OfflineError, read_provenance

SETTINGS = {"self_prob": 0.5, "seed": 3, "batch_size": 3, "shard_rows": 4, "progress": False}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def make_generator(seed: int = 0, **options) -> ContextGenerator:
    return ContextGenerator(tiny_model("llama", seed=seed), token_budget=32, balance=4, **options)


def write(folder: Path, data=None, generator=None, **changes) -> dict:
    data = rows(10) if data is None else data
    return write_contexts(generator or make_generator(), data, folder, **{**SETTINGS, **changes})


# Writing


def decode(data, generator: ContextGenerator, seed: int):
    """The sequential contexts of tokenized rows: the oracle."""
    return generator.contexts(
        list(data["prompt_ids"]),
        list(data["answer_ids"]),
        0.5,
        seed=seed,
        sample_ids=list(data["sample_id"]),
        method="sequential",
    )


@pytest.mark.parametrize(("batch_size", "shard_rows"), [(1, 4), (3, 5), (32, 512)])
def test_contexts_are_the_generators_own(tmp_path, batch_size, shard_rows):
    data = rows(10)
    write(tmp_path, data, batch_size=batch_size, shard_rows=shard_rows)
    written = load_contexts(tmp_path)
    assert written.select_columns(data.column_names).to_list() == data.to_list()
    expected = decode(data, make_generator(), seed=3)
    assert list(written["context_ids"]) == [tokens.tolist() for tokens in expected.tokens]
    assert list(written["is_self"]) == [is_self.tolist() for is_self in expected.is_self]
    assert len(list((tmp_path / "data").iterdir())) == -(-10 // shard_rows)
    assert load_rows(tmp_path).to_list() == written.to_list()
    assert datasets.load_dataset(str(tmp_path))["train"].to_list() == written.to_list()


def test_provenance(tmp_path):
    generator = make_generator(temperature=0.5)
    record = write(tmp_path, rows(10), generator, provenance={"revision": "abc", "dataset": "d"})
    assert record == read_provenance(tmp_path)
    settings = record["settings"]
    assert (settings["self_prob"], settings["seed"], settings["temperature"]) == (0.5, 3, 0.5)
    assert (settings["num_rows"], settings["shard_rows"], settings["precision"]) == (10, 4, "float32")
    assert settings["weights"] == weights_hash(tiny_model("llama")) != weights_hash(tiny_model("llama", seed=1))
    assert record["source"] == {"model": "", "revision": "abc", "dataset": "d"}
    assert [set(versions) for versions in record["versions"]] == [{"selfgen", "torch", "transformers", "datasets"}]
    stats = decode(rows(10), generator, seed=3).stats
    assert record["statistics"] == {
        "answer_tokens": stats.answer_tokens,
        "self_tokens": stats.self_tokens,
        "self_share": stats.self_tokens / stats.answer_tokens,
        "agreement": pytest.approx(stats.agreement),
        "invalid": 0,
    }


def test_without_self_tokens_the_context_is_the_reference(tmp_path):
    record = write(tmp_path, self_prob=0.0)
    assert record["statistics"]["self_share"] == 0.0
    assert list(load_contexts(tmp_path)["context_ids"]) == list(rows(10)["answer_ids"])


# 10 rows: shards of 4, 4 and 2; batches of 3 and 1, 3 and 1, 2. The first call of generate checks its arguments.
@pytest.mark.parametrize(
    ("target", "call", "shards"),
    [
        ("selfgen.context.ContextGenerator.contexts", 1, 0),
        ("selfgen.context.ContextGenerator.contexts", 2, 0),
        ("selfgen.context.ContextGenerator.contexts", 3, 1),
        ("selfgen.context.ContextGenerator.contexts", 5, 2),
        ("selfgen.stored_contexts.pq.write_table", 1, 1),
        ("selfgen.files.os.fsync", 3, 1),  # the second shard is written, but not in its place; provenance: 0 and 1
        ("selfgen.stored_contexts._statistics", 0, 3),
    ],
)
def test_a_killed_run_goes_on(tmp_path, monkeypatch, target, call, shards):
    write(tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, target, call)
        with pytest.raises(Killed):
            write(tmp_path / "killed")
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "killed" / "data").glob("*.parquet")}
    assert len(done) == shards
    with pytest.raises(OfflineError, match=rf"not complete \({shards} of 3 shards\); run the command .* again"):
        load_contexts(tmp_path / "killed")
    with pytest.raises(OfflineError, match="not complete"):
        make_trainer(tmp_path, tmp_path / "killed")
    write(tmp_path / "killed", batch_size=2)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert {file: file.stat().st_mtime_ns for file in done} == done


def test_a_complete_folder_is_left_alone(tmp_path, monkeypatch):
    record = write(tmp_path)
    before = contents(tmp_path)
    kill_at(monkeypatch, "selfgen.stored_contexts.write_whole", 0)
    assert write(tmp_path) == record
    assert contents(tmp_path) == before


def test_a_lost_shard_is_written_again(tmp_path):
    write(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(OfflineError, match=r"2 of 3 shards"):
        load_contexts(tmp_path)
    write(tmp_path)
    assert contents(tmp_path) == before


def test_other_versions_are_noted_down(tmp_path, monkeypatch):
    kill_at(monkeypatch, "selfgen.context.ContextGenerator.contexts", 3)
    with pytest.raises(Killed):
        write(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("selfgen.provenance.version", lambda package: "99")
    versions = write(tmp_path)["versions"]
    assert len(versions) == 2
    assert versions[1]["torch"] == "99"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"self_prob": 0.25}, r"self_prob was 0\.5, is 0\.25\): give the former ones, or another folder"),
        ({"seed": 4}, "seed was 3, is 4"),
        ({"shard_rows": 5}, "shard_rows was 4, is 5"),
        ({"generator": {"seed": 1}}, r"weights was [0-9a-f]{8}\.\.\., is [0-9a-f]{8}\.\.\."),
        ({"generator": {"temperature": 0.5}}, r"temperature was 1\.0, is 0\.5"),
        ({"data": rows(10, seed=1)}, r"rows was [0-9a-f]{8}\.\.\., is [0-9a-f]{8}\.\.\."),
        ({"data": rows(10).select([*range(1, 10), 0])}, "rows was"),
        ({"data": rows(9)}, "num_rows was 10, is 9"),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, words):
    write(tmp_path)
    before = contents(tmp_path)
    generator = make_generator(**changes.get("generator", {}))
    with pytest.raises(OfflineError, match=words):
        write(tmp_path, **{**changes, "generator": generator})
    assert contents(tmp_path) == before


def test_contexts_of_other_noise_are_refused(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr("selfgen.stored_contexts.NOISE_VERSION", 3)
    with pytest.raises(OfflineError, match="noise_version was 2, is 3"):
        write(tmp_path)


def test_bad_arguments(tmp_path):
    (tmp_path / "other" / "data").mkdir(parents=True)
    (tmp_path / "other" / "data" / "train.jsonl").touch()
    for words, changes in {
        "the rows lack answer_ids": {"data": rows(2).remove_columns("answer_ids")},
        "no rows": {"data": rows(2).select([])},
        "batch_size is 0": {"batch_size": 0},
        "shard_rows is 0": {"shard_rows": 0},
        "self_prob is 2.0": {"self_prob": 2.0},
        "method is 'magic'": {"method": "magic"},
        "longest row has 302 tokens, but the model has 256": {
            "data": datasets.Dataset.from_list([{"sample_id": 0, "prompt_ids": [3] * 300, "answer_ids": [4, 5]}])
        },
    }.items():
        with pytest.raises(ValueError, match=words):
            write(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()
    with pytest.raises(OfflineError, match="holds other files, and no contexts"):
        write(tmp_path / "other")
    with pytest.raises(OfflineError, match=r"holds no contexts .* write them with `selfgen contexts`"):
        load_contexts(tmp_path / "nowhere")


# Training


def make_trainer(tmp_path: Path, contexts, **changes) -> BASHTrainer:
    return BASHTrainer(
        tiny_model("llama"),
        config(tmp_path / "out", **changes),
        train_dataset=contexts,
        processing_class=Tokenizer(),
    )


def plain_loss(model, row: dict) -> torch.Tensor:
    """Summed loss of one row: its context goes in, its reference is learned."""
    prompt, answer = row["prompt_ids"], torch.tensor(row["answer_ids"])
    logits = model(torch.tensor([prompt + row["context_ids"]])).logits[0, len(prompt) - 1 : -1]
    return F.cross_entropy(logits, answer, reduction="sum")


def test_training_takes_the_contexts_as_they_are(tmp_path, monkeypatch):
    """Inputs are exactly ``context_ids``, labels ``answer_ids``; the loss is torch's own over them."""
    record = write(tmp_path / "contexts", rows(8))
    written = {row["sample_id"]: row for row in load_contexts(tmp_path / "contexts")}
    monkeypatch.setattr(ContextGenerator, "contexts", None)  # is not called
    trainer = make_trainer(tmp_path, tmp_path / "contexts", max_steps=2, logging_steps=2, learning_rate=0.0)
    seen, compute_loss = [], trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *args, **options: (
        seen.append(inputs) or compute_loss(model, inputs, *args, **options)
    )
    trainer.train()
    assert sorted(int(i) for inputs in seen for i in inputs["sample_id"]) == list(range(8))
    for inputs in seen:
        for index, sample_id in enumerate(inputs["sample_id"].tolist()):
            row = written[sample_id]
            p, length = len(row["prompt_ids"]), len(row["prompt_ids"]) + len(row["answer_ids"])
            ids, labels = inputs["input_ids"][index].tolist(), inputs["labels"][index].tolist()
            assert ids[:length] == row["prompt_ids"] + row["context_ids"]
            assert labels == [-100] * p + row["answer_ids"] + [-100] * (len(labels) - length)
            assert inputs["attention_mask"][index].sum() == length

    with torch.no_grad():
        steps = []  # 2 of 2 micro-batches
        for micro_batches in (seen[:2], seen[2:]):
            of_step = [written[int(i)] for inputs in micro_batches for i in inputs["sample_id"]]
            losses = [plain_loss(tiny_model("llama"), row) for row in of_step]
            steps.append(float(sum(losses)) / sum(len(row["answer_ids"]) for row in of_step))
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["loss"] == pytest.approx(sum(steps) / 2, rel=1e-5)
    assert log["self_share"] == pytest.approx(record["statistics"]["self_share"])
    assert log["agreement"] == pytest.approx(record["statistics"]["agreement"])
    assert log["passes"] == log["computed_per_token"] == 0


def test_contexts_without_self_tokens_are_fine_tuning(tmp_path):
    write(tmp_path / "contexts", rows(16), self_prob=0.0)
    offline = make_trainer(tmp_path, tmp_path / "contexts", lean_loss=False)
    sft = BSSTrainer(
        tiny_model("llama"),
        config(tmp_path / "sft", self_prob=0.0),
        train_dataset=rows(16),
        processing_class=Tokenizer(),
    )
    for trainer in (offline, sft):
        trainer.train()
    assert torch.equal(weights(offline.model), weights(sft.model))


def test_evaluation_is_under_the_contexts_that_the_rows_have(tmp_path):
    write(tmp_path, rows(6))
    written = load_contexts(tmp_path)
    trainer = make_trainer(tmp_path, written, per_device_eval_batch_size=6)
    tokens = sum(len(row["answer_ids"]) for row in written)
    references = [{**row, "context_ids": row["answer_ids"]} for row in written]
    for given, plain in ((written, list(written)), (rows(6), references)):
        with torch.no_grad():
            expected = float(sum(plain_loss(trainer.model, row) for row in plain)) / tokens
        assert trainer.evaluate(given)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_only_what_follows_a_prefix_is_learned(tmp_path):
    """As online: a row that is self tokens to its end has nothing to learn; contexts of another kind are refused."""
    write(tmp_path / "contexts", rows(16), make_generator(masks=Masks("prefix")), self_prob=0.6)
    written = {row["sample_id"]: row for row in load_contexts(tmp_path / "contexts")}
    options = {"granularity": "prefix", "loss_on": "after_switch", "learning_rate": 0.0, "num_train_epochs": 1}
    found = losses_of(make_trainer(tmp_path, tmp_path / "contexts", max_steps=-1, **options))
    learned = {}
    for _, inputs in found:
        for row, sample_id in enumerate(inputs["sample_id"].tolist()):
            begin, length = (int(inputs[name][row]) for name in ("prompt_length", "answer_length"))
            is_self = written[sample_id]["is_self"]
            assert is_self == sorted(is_self, reverse=True)
            learned[sample_id] = [not one for one in is_self]
            assert (inputs["labels"][row, begin : begin + length] != -100).tolist() == learned[sample_id]
    assert len(learned) == 16
    assert {sum(one) == 0 for one in learned.values()} == {False, True}
    write(tmp_path / "tokens", rows(16))
    with pytest.raises(ValueError, match="of row 0 a self token follows a reference token: write contexts with"):
        make_trainer(tmp_path, tmp_path / "tokens", **options)


def test_contexts_that_do_not_fit_the_model_are_refused(tmp_path):
    write(tmp_path / "contexts", rows(4))
    written = load_contexts(tmp_path / "contexts")
    longest = max(len(row["prompt_ids"]) + len(row["answer_ids"]) for row in written)
    make_trainer(tmp_path, written, max_length=longest)
    with pytest.raises(ValueError, match=f"has {longest} tokens; raise max_length"):
        make_trainer(tmp_path, written, max_length=longest - 1)
    for column in ("prompt_ids", "answer_ids", "context_ids"):
        strange = written.map(lambda row, name=column: {name: [VOCAB, *row[name][1:]]})
        with pytest.raises(ValueError, match=f"token id {VOCAB}, but the model has {VOCAB} ids"):
            make_trainer(tmp_path, strange)


def test_rows_without_contexts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the rows lack context_ids, is_self; give the folder that write_contexts"):
        make_trainer(tmp_path, rows(4))


def test_contexts_of_a_model_prepared_for_mixed_precision(tmp_path):
    """They are made, and written down, in what its forward computes in."""
    trainer = BSSTrainer(
        tiny_model("llama"),
        config(tmp_path, bf16=True, max_steps=1),
        train_dataset=rows(),
        processing_class=Tokenizer(),
    )
    trainer.train()
    record = write(tmp_path / "contexts", rows(4), ContextGenerator(trainer.model))
    assert record["settings"]["precision"] == "bfloat16"


# The command line


@pytest.fixture
def writing(arguments, tmp_path):
    """Arguments of ``selfgen contexts``."""
    names = ("model", "dataset", "max_length", "token_budget", "balance", "use_cpu")
    options = {name: arguments[name] for name in names}
    return {**options, "output_dir": str(tmp_path / "contexts"), "self_prob": 0.5, "shard_rows": 5}


def test_contexts_that_are_taken_for_plain_rows_are_named(arguments, writing, caplog, capsys):
    run(["contexts", *flags(writing)], capsys)
    options = {**arguments, "dataset": writing["output_dir"], "max_steps": 1}
    assert run(["train", *flags(options)], capsys)[0] == 0
    assert "has contexts that are written already, which --method bss does not use" in caplog.text


def test_contexts_then_training(arguments, writing, caplog, capsys, terminal):
    code, out, err = run(["contexts", *flags(writing)], capsys)
    assert code == 0
    assert f"contexts of 16 rows are in {writing['output_dir']}: " in out
    assert "data: 16 rows: 16 kept" in caplog.text
    assert "%" in err  # the progress bar, with the time left
    record = read_provenance(writing["output_dir"])
    assert record["source"] == {
        "model": writing["model"],
        "revision": None,
        "dataset": writing["dataset"],
        "dataset_config": None,
        "dataset_split": "train",
    }
    del arguments["dataset"]
    options = {**arguments, "method": "bash", "contexts": writing["output_dir"], "per_device_train_batch_size": 16}
    idle = {"span_length": 3.0, "sampling_temperature": 0.5, "context_method": "sequential"}
    caplog.clear()
    assert run(["train", *flags({**options, "max_steps": 1, **idle})], capsys)[0] == 0
    assert f"have no effect: {', '.join([*idle, 'token_budget', 'balance'])}\n" in caplog.text
    (log,) = history(arguments["output_dir"])
    assert log["self_share"] == pytest.approx(record["statistics"]["self_share"])
    assert AutoModelForCausalLM.from_pretrained(arguments["output_dir"])


def test_contexts_with_prefixes_then_training(arguments, writing, caplog, capsys):
    assert run(["contexts", *flags({**writing, "granularity": "prefix"})], capsys)[0] == 0
    record = read_provenance(writing["output_dir"])
    assert (record["settings"]["masks"]["granularity"], record["settings"]["masks"]["curve"]) == ("prefix", "falling")
    contexts = load_contexts(writing["output_dir"])
    assert all(row == sorted(row, reverse=True) for row in contexts["is_self"])
    del arguments["dataset"]
    options = {**arguments, "method": "bash", "contexts": writing["output_dir"], "max_steps": 1}
    options |= {"granularity": "prefix", "loss_on": "after_switch"}
    assert run(["train", *flags(options)], capsys)[0] == 0
    assert "have no effect: token_budget, balance\n" in caplog.text


@pytest.mark.slow
def test_killed_contexts_go_on(writing, tmp_path, capsys):
    """SIGKILL in the middle, then the same command: byte for byte the folder of a run that was not killed."""
    write_jsonl(Path(writing["dataset"]), ROWS * 100)
    command = ["contexts", *flags({**writing, "shard_rows": 3})]
    killed = Path(writing["output_dir"])
    kill_command(command, lambda: len(list(killed.glob("data/*.parquet"))) >= 2)
    assert "statistics" not in json.loads((killed / "provenance.json").read_text())
    assert run(command, capsys)[0] == 0
    whole = {**writing, "shard_rows": 3, "output_dir": str(tmp_path / "whole")}
    assert run(["contexts", *flags(whole)], capsys)[0] == 0
    assert contents(killed) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        ("contexts", {"self_prob": "2"}, "self_prob is 2.0; a probability must be in [0, 1]"),
        ("contexts", {"seed": "x"}, "--seed"),
        ("contexts", {"shard_rows": "0"}, "shard_rows is 0; it must be at least 1"),
        ("contexts", {"model": "nowhere/model"}, "nowhere/model"),
        ("contexts", {"dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
        ("contexts", {"max_length": "2"}, "no row is left"),
        ("train", {"method": "cash"}, "'cash'"),
        ("train", {"rounds": "2"}, "contexts and rounds need --method bash, but method is 'bss'"),
        ("train", {"contexts": "DIR"}, "contexts and rounds need --method bash, but method is 'bss'"),
        ("train", {"method": "bash", "contexts": "DIR"}, "give no --dataset and no --rounds"),
        ("train", {"method": "bash", "rounds": "17"}, "16 rows can be split for 1 to 16 rounds"),
        ("train", {"method": "bash", "model": "nowhere/model"}, "nowhere/model"),
        ("train", {"method": "bash", "dataset": None}, "there is no data: give --dataset"),
        ("train", {"method": "bash", "dataset": None, "contexts": "nowhere"}, "nowhere holds no contexts"),
        ("train", {"method": "bash", "dataset": None, "contexts": "x", "eval_split": "test"}, "give --eval-dataset"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, writing, command, changes, words, capsys):
    options = {**(writing if command == "contexts" else arguments), **changes}
    code, out, err = run([command, *flags({k: v for k, v in options.items() if v is not None})], capsys)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"selfgen {command}: error: ")
    assert words in last
    assert "Traceback" not in err
    assert out == ""


def test_help(capsys):
    code, out, _ = run(["contexts", "--help"], capsys)
    assert code == 0
    for option in ("--model", "--dataset", "--self-prob", "--shard-rows", "--sampling-temperature", "--revision"):
        assert option in out
    code, out, _ = run(["train", "--help"], capsys)
    assert code == 0
    for option in ("--method bss|bash", "--contexts", "--rounds"):
        assert option in out
