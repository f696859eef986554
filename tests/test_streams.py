"""Streams: the same training as on rows in memory, the same rows after a kill, and every dropped row counted."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset, IterableDataset, IterableDatasetDict, load_dataset
from datasets.distributed import split_dataset_by_node
from helpers.cli import flags, history, run
from helpers.data import TEMPLATE, make_tokenizer, write_jsonl
from helpers.processes import WORLD, in_ranks, kill_command
from helpers.training import OWN_ANSWERS, Tokenizer, config, losses_of, make_rac_trainer, make_trainer, rows, weights
from models import OPTIONS, tiny_model
from torch.utils.data import SequentialSampler

from selfgen import BASHTrainer, BSSTrainer, ContextGenerator, RACTrainer, write_contexts
from selfgen.data import DataError, tokenize_prompts, tokenize_rows
from selfgen.evaluation import held_out_losses
from selfgen.training.rounds import train_rounds

LETTERS = "abcdefgh"
TEXTS = [{"prompt": f"{a} {b}", "completion": f"{b} {a} {c}"} for a in LETTERS[:3] for b in LETTERS for c in "ah"]
EMPTY = {"prompt": "a", "completion": ""}


def stream(data=TEXTS, shards: int = 1) -> IterableDataset:
    return Dataset.from_list(data).to_iterable_dataset(num_shards=shards)


def of_generator(data) -> IterableDataset:
    """Whose features are not known."""
    return IterableDataset.from_generator(lambda: iter(data))


def text_trainer(folder, data, **changes) -> BSSTrainer:
    return BSSTrainer(
        tiny_model("llama"), config(folder, **changes), train_dataset=data, processing_class=make_tokenizer(TEMPLATE)
    )


def ids_of(found) -> list[int]:
    """Sample ids in the order of training, of `losses_of`."""
    return [one for _, inputs in found for one in inputs["sample_id"].tolist()]


def logged(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# Rows


def test_rows_of_a_stream_are_those_of_a_data_set():
    tokenizer = make_tokenizer(TEMPLATE)
    data = [*TEXTS[:3], EMPTY, {"prompt": "a " * 9, "completion": "b"}, *TEXTS[3:6]]
    known, report = tokenize_rows(Dataset.from_list(data), tokenizer, max_length=8)
    found, nothing = tokenize_rows(stream(data), tokenizer, max_length=8)
    assert nothing is None
    assert len(report.dropped) == 2
    without_ids = [{name: row[name] for name in ("prompt_ids", "answer_ids")} for row in known]
    assert [row | {"sample_id": None} for row in found] == [row | {"sample_id": None} for row in without_ids]
    assert found.column_names == ["sample_id", "prompt_ids", "answer_ids"]


def test_ids_are_of_the_tokens_and_not_of_the_place():
    tokenizer = make_tokenizer(TEMPLATE)

    def ids(data):
        return [row["sample_id"] for row in tokenize_rows(data, tokenizer, max_length=16)[0]]

    plain = ids(stream())
    assert len(set(plain)) == len(TEXTS)
    assert all(0 <= one < 1 << 63 for one in plain)
    assert sorted(ids(stream(shards=3).shuffle(seed=1, buffer_size=8))) == sorted(plain)
    assert ids(stream(TEXTS[:2] * 2)) == plain[:2] * 2
    assert plain[0] == 3354530505470916544  # as on any machine, by any version
    named = [{**row, "sample_id": number} for row, number in zip(TEXTS, [5, (1 << 64) - 1], strict=False)]
    assert ids(of_generator(named)) == [5, -1]


def test_ids_that_are_none_drop_the_row(caplog):
    data = of_generator([{**row, "sample_id": one} for row, one in zip(TEXTS[:3], [3, "x", None], strict=True)])
    found, _ = tokenize_rows(data, make_tokenizer(TEMPLATE), max_length=16)
    assert [row["sample_id"] for row in found][:1] == [3]
    assert len(list(found)) == 2
    assert "sample_id is no integer of 64 bits" in caplog.text


def test_columns_may_come_late():
    """Rows of JSON bring the keys that they have; features are not known."""
    late = [*TEXTS[:3], {**TEXTS[3], "extra": 1}, {"completion": "a"}, TEXTS[4]]
    found, _ = tokenize_rows(of_generator(late), make_tokenizer(TEMPLATE), max_length=16)
    assert len(list(found)) == 5
    with pytest.raises(ValueError, match=r"no 'prompt' \(prompt_column\)"):
        tokenize_rows(of_generator([{"text": "a"}]), make_tokenizer(), max_length=16)


@pytest.mark.parametrize("known", [True, False], ids=["features", "no features"])
def test_keys_that_arrow_adds_are_no_content(tmp_path, known):
    """Of rows that come out of Arrow, None is no key; of a generator's, it is one."""
    template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% for call in m.tool_calls or [] %}"
        "{{ call.function.name }} {% for key in call.function.arguments %}h {% endfor %}{% endfor %}<eos> {% endfor %}"
    )

    def row(arguments):
        call = {"type": "function", "function": {"name": "g", "arguments": arguments}}
        turns = [{"role": "assistant", "content": "b", "tool_calls": [call]}, {"role": "assistant", "content": "c"}]
        return {"messages": [{"role": "user", "content": "a"}, *turns]}

    data = Dataset.from_list([row({"d": "e"}), row({"f": "e"})])
    arrow = data.to_iterable_dataset()
    if not known:
        data.to_parquet(tmp_path / "rows.parquet")
        files = str(tmp_path / "rows.parquet")
        arrow = load_dataset("parquet", data_files=files, split="train", streaming=True).map(None)
        assert arrow.features is None
    exact = of_generator([row({"d": None, "f": "e"})])
    options = {"max_length": 32, "keep_incomplete_rows": True}
    for one, keys in ((arrow, 1), (exact, 2)):
        found = next(iter(tokenize_rows(one, make_tokenizer(template), **options)[0]))
        assert found["prompt_ids"].count(make_tokenizer().convert_tokens_to_ids("h")) == keys


def test_what_is_dropped_is_named_and_strict_data_ends_it(caplog):
    data = stream([*TEXTS[:2], *[EMPTY] * 5])
    found, _ = tokenize_rows(data, make_tokenizer(TEMPLATE), max_length=16)
    assert len(list(found)) == 2
    assert caplog.text.count("empty answer: {'prompt': 'a', 'completion': ''}") == 3
    found, _ = tokenize_rows(data, make_tokenizer(TEMPLATE), max_length=16, strict_data=True)
    with pytest.raises(DataError, match=r"no row to be dropped; .*1 empty answer: {'prompt': 'a'"):
        list(found)


# Training


@pytest.mark.parametrize("ids", [True, False], ids=["own ids", "hashes"])
@pytest.mark.one_case
def test_a_stream_trains_as_rows_in_memory_do(tmp_path, ids):
    """Bit for bit, over an epoch and a half."""
    tokenizer = make_tokenizer(TEMPLATE)
    given = stream([{**row, "sample_id": n} for n, row in enumerate(TEXTS[:16])] if ids else TEXTS[:16])
    known = Dataset.from_list(list(tokenize_rows(given, tokenizer, max_length=64)[0]))
    streamed = text_trainer(tmp_path / "stream", given, max_steps=6)
    in_memory = text_trainer(tmp_path / "memory", known, max_steps=6)
    in_memory._get_train_sampler = lambda *_: SequentialSampler(known)
    losses, want = losses_of(streamed), losses_of(in_memory)
    assert ids_of(losses) == ids_of(want)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(losses, want, strict=True))
    assert torch.equal(weights(streamed.model), weights(in_memory.model))


def test_rows_that_are_tokenized_already(tmp_path):
    tokenized, _ = tokenize_rows(stream([*TEXTS, EMPTY]), make_tokenizer(TEMPLATE), max_length=64)
    trainer = text_trainer(tmp_path / "tokenized", tokenized)
    assert ids_of(losses_of(trainer)) == ids_of(losses_of(text_trainer(tmp_path / "text", stream([*TEXTS, EMPTY]))))
    made = make_trainer(tmp_path / "rows", data=rows().to_iterable_dataset())
    assert ids_of(losses_of(made)) == list(range(16))
    splits = IterableDatasetDict(train=rows().to_iterable_dataset())
    assert ids_of(losses_of(make_trainer(tmp_path / "splits", data=splits))) == list(range(16))


def shuffled(data=TEXTS[:12], shards=2, seed=7):
    return stream(data, shards).shuffle(seed=seed, buffer_size=4)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ends", [pytest.param(2, marks=pytest.mark.slow), 6], ids=["first epoch", "third epoch"])
@pytest.mark.one_case
def test_a_resumed_run_goes_on_at_the_same_row(tmp_path, workers, ends):
    """Weights bit for bit, with a shuffled stream of twelve rows (less one) that is read several times."""
    data = shuffled([*TEXTS[:5], EMPTY, *TEXTS[6:12]])
    options = {"lr_scheduler_type": "constant", "dataloader_num_workers": workers}
    whole = text_trainer(tmp_path / "whole", data, max_steps=9, **options)
    rows_of_whole = ids_of(losses_of(whole))
    epochs = [rows_of_whole[:11], rows_of_whole[11:22]]
    if not workers:
        assert set(epochs[0]) == set(epochs[1])
        assert epochs[0] != epochs[1]
    saving = {"save_strategy": "steps", "save_steps": ends}
    stopped = text_trainer(tmp_path / "run", data, max_steps=ends, **options, **saving)
    stopped.train()
    resumed = text_trainer(tmp_path / "run", shuffled([*TEXTS[:5], EMPTY, *TEXTS[6:12]]), max_steps=9, **options)
    checkpoint = str(tmp_path / "run" / f"checkpoint-{ends}")
    seen = []
    step = resumed.training_step
    resumed.training_step = lambda model, inputs, *rest: (
        seen.extend(inputs["sample_id"].tolist()) or step(model, inputs, *rest)
    )
    resumed.train(resume_from_checkpoint=checkpoint)
    assert seen == rows_of_whole[4 * ends :]
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert [entry["rows_read"] for entry in logged(resumed)] == [entry["rows_read"] for entry in logged(whole)]


def test_a_stream_that_changed_is_no_stream_to_go_on_with(tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    text_trainer(tmp_path, stream().shuffle(buffer_size=40), **saving).train()
    checkpoint = str(tmp_path / "checkpoint-2")

    def resume(data, **changes):
        text_trainer(tmp_path, data, **{"max_steps": 4, **changes}).train(resume_from_checkpoint=checkpoint)

    with pytest.raises(DataError, match=r"gives other rows than .* give its shuffle a seed"):
        resume(stream().shuffle(buffer_size=40))
    with pytest.raises(ValueError, match="rows_per_step was 4, is 2"):
        resume(stream(), gradient_accumulation_steps=1)
    with pytest.raises(DataError, match="gradient_accumulation_steps was 2, is 1"):  # as many rows, read otherwise
        resume(stream(), gradient_accumulation_steps=1, per_device_train_batch_size=4)
    resume(stream(), ignore_data_skip=True)
    assert "ignore_data_skip: the stream begins anew" in caplog.text
    for file in (tmp_path / "checkpoint-2").glob("selfgen_stream_*"):
        file.unlink()
    resume(stream())
    assert "does not tell what was read of the stream" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_every_dropped_row_is_counted(tmp_path, workers, caplog):
    caplog.set_level(logging.INFO)
    long = {"prompt": "a b c d e", "completion": "f g h a b c d e"}
    data = [TEXTS[0], EMPTY, *TEXTS[1:3], long, {"prompt": None, "completion": "a"}, EMPTY, *TEXTS[3:7], EMPTY]
    trainer = text_trainer(tmp_path, stream(data, shards=2), max_steps=4, max_length=14, dataloader_num_workers=workers)
    trainer.train()
    last = logged(trainer)[-1]
    assert last["rows_read"] == last["rows_kept"] + last["rows_dropped"]
    assert last["rows_kept"] == 16
    dropped = [last[f"rows_dropped/{reason}"] for reason in ("empty answer", "'prompt' is empty (None)")]
    assert sum(dropped) == last["rows_dropped"] >= 6  # of two epochs, but for the end of the second
    assert dropped[1] in (1, 2)
    assert last["rows_truncated"] >= 1
    assert "train data, so far: " in caplog.text
    assert "empty answer: {'prompt': 'a', 'completion': ''}" in caplog.text
    assert [entry["rows_read"] for entry in logged(trainer)] == sorted(entry["rows_read"] for entry in logged(trainer))


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_data_ends_a_run_at_the_row(tmp_path, workers):
    data = stream([*TEXTS[:9], EMPTY, *TEXTS[9:]])
    trainer = text_trainer(tmp_path, data, strict_data=True, dataloader_num_workers=workers, max_steps=8)
    with pytest.raises(DataError, match=r"^strict_data allows no row to be dropped; .*1 empty answer: {'prompt': 'a'"):
        trainer.train()


def test_more_workers_than_files(tmp_path, caplog):
    found = ids_of(losses_of(text_trainer(tmp_path, stream(), dataloader_num_workers=3)))
    assert found == ids_of(losses_of(text_trainer(tmp_path, stream())))
    assert "dataloader_num_workers is 3, but the train data can be read by 1 at a time" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_without_usable_rows_end(tmp_path, workers):
    trainer = text_trainer(tmp_path, stream([EMPTY] * 4, shards=2), dataloader_num_workers=workers)
    nothing = (DataError, UnboundLocalError) if workers else DataError  # accelerate 1.6 needs a batch
    with pytest.raises(nothing, match=r"the train data has no usable row|current_batch"):
        trainer.train()
    once = iter([*TEXTS[:6]])
    again = IterableDataset.from_generator(lambda: once, features=Dataset.from_list(TEXTS).features)
    with pytest.raises(DataError, match="no usable row when it is read again"):
        text_trainer(tmp_path, again).train()
    with pytest.raises(DataError, match="the stream has no rows"):
        text_trainer(tmp_path, of_generator([]))


def test_a_reader_without_usable_rows_leaves_it_to_the_others(tmp_path):
    """Files of bad rows only, where each worker reads one file."""
    data = stream([*[EMPTY] * 4, *TEXTS[:4]], shards=2)
    found = ids_of(losses_of(text_trainer(tmp_path, data, dataloader_num_workers=2)))
    assert len(found) == 16
    assert len(set(found)) == 4


def test_evaluation(tmp_path):
    tokenizer = make_tokenizer(TEMPLATE)
    data = [*TEXTS[:7], EMPTY]  # batches of 3, 3 and 1
    trainer = BSSTrainer(
        tiny_model("llama"),
        config(tmp_path, per_device_eval_batch_size=3),
        train_dataset=Dataset.from_list(TEXTS),
        eval_dataset={"stream": stream(data), "memory": Dataset.from_list(data)},
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_stream_loss"] == metrics["eval_memory_loss"]
    assert trainer.evaluate(stream(data))["eval_loss"] == metrics["eval_memory_loss"]
    assert trainer.predict(stream(data)).metrics["test_loss"] == metrics["eval_memory_loss"]
    with pytest.raises(DataError, match="the test data has no usable row"):
        trainer.predict(stream([EMPTY]))


def test_rac_on_a_stream(tmp_path):
    known = make_rac_trainer(tmp_path)
    data = stream([*OWN_ANSWERS, EMPTY])
    trainer = RACTrainer(tiny_model("llama"), known.args, train_dataset=data, processing_class=known.processing_class)
    trainer.train()
    assert logged(trainer)[-1]["rows_kept"] == 4


def test_what_streams_can_not_do(tmp_path):
    rac = make_rac_trainer(tmp_path, own_answer="column")
    grouped = {"train_sampling_strategy": "group_by_length"}
    grouped = grouped if grouped.keys() <= OPTIONS else {"group_by_length": True}
    with pytest.raises(ValueError, match="training needs max_steps"):
        text_trainer(tmp_path, stream(), max_steps=-1)
    with pytest.raises(ValueError, match="can't be sorted by length"):
        text_trainer(tmp_path, stream(), **grouped)
    with pytest.raises(TypeError, match="own answers of a column can't be of a stream"):
        RACTrainer(tiny_model("llama"), rac.args, train_dataset=stream(), processing_class=rac.processing_class)
    with pytest.raises(TypeError, match="stored contexts can't be of a stream"):
        BASHTrainer(tiny_model("llama"), config(tmp_path), train_dataset=stream(), processing_class=Tokenizer())
    with pytest.raises(TypeError, match="rounds can't be of a stream"):
        train_rounds(
            lambda name: tiny_model("llama"), "x", stream(), config(tmp_path), rounds=2, processing_class=Tokenizer()
        )
    generator = ContextGenerator(tiny_model("llama"))
    with pytest.raises(TypeError, match="stored contexts can't be of a stream"):
        write_contexts(generator, stream(), tmp_path / "contexts", self_prob=0.5)
    with pytest.raises(TypeError, match="losses can't be of a stream"):
        held_out_losses(generator, stream(), {"reference": 0.0}, progress=False)
    with pytest.raises(TypeError, match="streaming data set"):
        tokenize_prompts(stream(), make_tokenizer())


# Several processes


def ddp_worker(rank, folder):
    options = {"max_steps": 4, "lr_scheduler_type": "constant", "ddp_backend": "gloo", "self_prob": 0.5}
    saving = {"save_strategy": "steps", "save_steps": 2}
    uneven = [row for pair in zip(TEXTS[:12], [EMPTY] * 12, strict=True) for row in pair]  # one process's are all bad
    cases = {"dealt": (TEXTS[:13], 1), "files": (TEXTS[:12], 2), "uneven": (uneven, 1)}
    for name, (data, shards) in cases.items():

        def trainer(where, steps, data=data, shards=shards, **more):
            return text_trainer(folder / where, stream(data, shards), **{**options, "max_steps": steps, **more})

        whole = trainer(name, 4)
        found = losses_of(whole)
        seen = [None] * WORLD
        dist.all_gather_object(seen, ids_of(found))
        assert not set(seen[0][:4]) & set(seen[1][:4])
        if name != "files":  # dealt out as to one process with twice the batch
            together = [seen[n % WORLD][n // WORLD] for n in range(32)]
            count = 13 if name == "dealt" else 12
            assert len({*together}) == count
            assert together == [together[n % count] for n in range(32)]
        report = logged(whole)[-1] if rank == 0 else None
        if report:
            assert report["rows_kept"] == 32
            assert report["rows_dropped"] == (31 if name == "uneven" else 0)
        if str(whole.args.device) == "cpu:0":  # of accelerate 1.6; torch loads no optimizer to it
            continue
        trainer(f"{name}-run", 2, **saving).train()
        resumed = trainer(f"{name}-run", 4)
        resumed.train(resume_from_checkpoint=str(folder / f"{name}-run" / "checkpoint-2"))
        assert torch.equal(weights(resumed.model), weights(whole.model))
    with pytest.raises(DataError, match="give shuffle a seed"):
        text_trainer(folder / "unseeded", stream(TEXTS).shuffle(buffer_size=40), **options).train()
    split = split_dataset_by_node(stream(TEXTS), rank, WORLD)
    seen = [None] * WORLD
    dist.all_gather_object(seen, ids_of(losses_of(text_trainer(folder / "split", split, **options))))
    assert not set(seen[0]) & set(seen[1])
    evaluated = text_trainer(folder / "eval", stream(), **options)
    with pytest.raises(DataError, match="give a stream as a whole"):
        evaluated.evaluate(split)
    losses = [None] * WORLD
    dist.all_gather_object(losses, evaluated.evaluate(stream([*TEXTS[:5], EMPTY]))["eval_loss"])
    assert losses[0] == losses[1]


def test_processes_share_a_stream(tmp_path):
    """Disjoint rows of a step, the rows of one process in all, and the same ones after a kill."""
    in_ranks(ddp_worker, tmp_path)


# Commands


@pytest.mark.slow
def test_a_killed_command_goes_on(arguments, tmp_path, capsys):
    """SIGKILL in the middle of a stream of two files, then `--resume_from_checkpoint last`."""
    folder = tmp_path / "data"
    folder.mkdir()
    for part in range(2):
        write_jsonl(folder / f"train-{part}.jsonl", [*TEXTS[part * 20 :][:19], EMPTY])
    steps = {"max_steps": 16, "save_steps": 4, "lr_scheduler_type": "constant", "learning_rate": "1e-3"}
    options = {**arguments, **steps, "dataset": str(folder), "streaming": True, "dataloader_num_workers": 2}
    killed = tmp_path / "killed"
    command = ["train", *flags({**options, "output_dir": str(killed), "save_total_limit": 2})]
    command += ["--resume_from_checkpoint", "last"]
    kill_command(command, lambda: any(killed.glob("checkpoint-*/trainer_state.json")))
    assert not (killed / "config.json").exists()
    assert run(command, capsys)[0] == 0
    assert run(["train", *flags(options)], capsys)[0] == 0
    ours, theirs = history(killed), history(arguments["output_dir"])
    for name in ("loss", "rows_read", "rows_dropped", "rows_dropped/empty answer"):
        assert [entry.get(name) for entry in ours] == [entry.get(name) for entry in theirs]
    assert ours[-1]["rows_dropped"] > 0


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (TEXTS, {"max_steps": -1}, "training needs max_steps"),
        ([*TEXTS, EMPTY], {"strict_data": True, "max_steps": 40}, "strict_data allows no row to be dropped"),
        ([EMPTY], {}, "the train data has no usable row"),
        (TEXTS, {"method": "bash"}, "leave out --streaming"),
    ],
)
def test_faults_of_streams_are_one_line(arguments, capsys, rows, changes, message):
    write_jsonl(Path(arguments["dataset"]), rows)
    code, _, err = run(["train", *flags({**arguments, "streaming": True, "disable_tqdm": True, **changes})], capsys)
    assert code == 2
    assert [message in line for line in err.splitlines() if "error: " in line] == [True]
    assert "Traceback" not in err


def test_commands_that_need_all_rows_have_no_streaming(model_dir, tmp_path, capsys):
    for command, output in (("contexts", "output_dir"), ("generate", "output_file"), ("eval", "output_dir")):
        given = {"model": model_dir, "dataset": "x", output: tmp_path / command}
        code, _, err = run([command, *flags(given), "--streaming"], capsys)
        assert code == 2
        assert "unknown option '--streaming'" in err
