"""A run goes on from a whole checkpoint of the same run, in the same order, or it says why it does not."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from datasets import Dataset
from helpers.cli import flags, last_line, refused, run, save_model
from helpers.data import write_jsonl
from helpers.processes import in_ranks
from helpers.training import OWN_ANSWERS, make_rac_trainer, make_trainer, rows, weights
from models import OPTIONS, VOCAB, tiny_model
from transformers import Trainer, TrainerCallback

from selfgen.provenance import columns_hash
from selfgen.training import checkpoints
from selfgen.training.checkpoints import ResumeError, SaveError, fault_of, last_checkpoint, saving

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
BY_LENGTH = (
    {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" in OPTIONS
    else {"group_by_length": True}
)

UNSEEDED = {"accelerator_config": {"use_seedable_sampler": False}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the checkpoints of three steps, not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    make_trainer(folder, **SAVING).train()
    return folder


@pytest.fixture
def run_folder(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def truncate(file: Path) -> None:
    os.truncate(file, 100)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 0xFF
    file.write_bytes(data)


def a_list(file: Path) -> None:
    file.write_text("[]")


FAULTS = [
    ("model.safetensors", truncate), ("model.safetensors", empty), ("model.safetensors", Path.unlink),
    ("model.safetensors", zeros), ("optimizer.pt", truncate), ("optimizer.pt", Path.unlink), ("optimizer.pt", zeros),
    ("optimizer.pt", flip), ("scheduler.pt", empty), ("scheduler.pt", Path.unlink), ("rng_state.pth", truncate),
    ("rng_state.pth", Path.unlink), ("config.json", empty), ("generation_config.json", a_list),
    ("selfgen.json", truncate), ("selfgen.json", a_list), ("trainer_state.json", empty),
    ("trainer_state.json", a_list), ("trainer_state.json", truncate), ("trainer_state.json", Path.unlink),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage"), FAULTS, ids=lambda one: getattr(one, "__name__", one))
def test_a_broken_file_is_named(run_folder, caplog, name, damage):
    """With last, the checkpoint before is taken; a broken one that was asked for is refused."""
    assert last_checkpoint(run_folder) == str(run_folder / "checkpoint-3")
    damage(run_folder / "checkpoint-3" / name)
    assert last_checkpoint(run_folder) == str(run_folder / "checkpoint-2")
    (said,) = [line for line in caplog.messages if "passed over" in line]
    assert said.startswith("checkpoint-3 is passed over")
    assert name in said
    assert said.endswith("checkpoint-2")
    unlike = "no checkpoint there" if (name, damage) == ("trainer_state.json", Path.unlink) else f"as .*{name[:5]}"
    with pytest.raises((ResumeError, FileNotFoundError), match=f"checkpoint-3.*{unlike}"):
        make_trainer(run_folder).train(resume_from_checkpoint=str(run_folder / "checkpoint-3"))


def test_a_run_goes_on_from_the_newest_whole_checkpoint(run_folder):
    truncate(run_folder / "checkpoint-3" / "optimizer.pt")
    whole = make_trainer(run_folder.parent / "whole", max_steps=3)
    whole.train()
    for asked in ("last", True):
        resumed = make_trainer(run_folder, model=tiny_model("llama", seed=9), max_steps=3)
        resumed.train(resume_from_checkpoint=asked)
        assert torch.equal(weights(resumed.model), weights(whole.model))


def test_checkpoints_without_optimizer_are_not_continued(tmp_path):
    """New moments would be taken in silence."""
    make_trainer(tmp_path, **SAVING, save_only_model=True).train()
    with pytest.raises(ResumeError, match=r"no whole checkpoint in .*checkpoint-3, optimizer\.pt is missing"):
        make_trainer(tmp_path).train(resume_from_checkpoint="last")
    with pytest.raises(ResumeError, match=r"checkpoint-2 can't be continued from, as optimizer\.pt is missing"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_where_writing_the_only_checkpoint_was_broken_off_the_run_begins_anew(run_folder):
    for number in (1, 2):
        shutil.rmtree(run_folder / f"checkpoint-{number}")
    truncate(run_folder / "checkpoint-3" / "trainer_state.json")
    assert last_checkpoint(run_folder) is None


def test_a_missing_shard_is_named(run_folder):
    checkpoint = run_folder / "checkpoint-3"
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fault_of(checkpoint) == "model-00002-of-00002.safetensors is missing"


def test_every_rank_has_its_generators_state(run_folder):
    checkpoint = run_folder / "checkpoint-3"
    settings = json.loads((checkpoint / "selfgen.json").read_text())
    settings["trainer"]["processes"] = 2
    (checkpoint / "selfgen.json").write_text(json.dumps(settings))
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    assert fault_of(checkpoint) == "rng_state_1.pth is missing"


# Other rows and other options


def test_a_run_of_other_noise_is_refused(run_folder):
    """As that of a version that drew other tokens by the same seed, and noted nothing down."""
    file = run_folder / "checkpoint-3" / "selfgen.json"
    settings = json.loads(file.read_text())
    del settings["noise_version"]
    file.write_text(json.dumps(settings))
    with pytest.raises(ResumeError, match="noise_version was 1, is 2"):
        make_trainer(run_folder).train(resume_from_checkpoint="last")


def test_other_rows_are_refused(run_folder):
    for data in (rows(seed=5), rows().select(range(15)), rows().shuffle(seed=1)):
        with pytest.raises(ResumeError, match=r"checkpoint-3 comes from a run on other rows"):
            make_trainer(run_folder, data=data).train(resume_from_checkpoint="last")


def test_rows_that_are_learned_otherwise_are_others(run_folder):
    data = rows().add_column("is_learned", [[True] * len(answer) for answer in rows()["answer_ids"]])
    with pytest.raises(ResumeError, match="other rows"):
        make_trainer(run_folder, data=data).train(resume_from_checkpoint="last")


def test_the_same_rows_in_another_layout_are_the_same(run_folder, tmp_path):
    """Chunks, number types, formats and columns that are not trained on."""
    data = rows()
    names = ("sample_id", "prompt_ids", "answer_ids")
    parts = datasets.concatenate_datasets([data.select(range(5)), data.select(range(5, 16))])
    more = data.add_column("text", ["x"] * 16).with_format("torch")
    shuffled = data.select(range(15, -1, -1)).select(range(15, -1, -1))
    small = datasets.Features(
        sample_id=datasets.Value("int32"), prompt_ids=datasets.List(datasets.Value("int32")),
        answer_ids=datasets.LargeList(datasets.Value("int64")),
    )  # fmt: skip
    want = columns_hash(data, names)
    for other in (parts, more, shuffled, data.cast(small)):
        assert columns_hash(other, names) == want
    assert columns_hash(data.select(range(15)), names) != want
    make_trainer(run_folder, data=more, max_steps=3).train(resume_from_checkpoint="last")


def test_a_shifted_border_between_rows_is_seen():
    halves = [{"sample_id": [0, 1], "prompt_ids": [[1], [2]], "answer_ids": answers} for answers in (
        [[3, 4], [5]], [[3], [4, 5]])]  # fmt: skip
    names = ("sample_id", "prompt_ids", "answer_ids")
    one, other = (columns_hash(Dataset.from_dict(half), names) for half in halves)
    assert one != other


def test_other_lengths_sort_other_batches(tmp_path):
    data = rows()
    lengths = [len(row["prompt_ids"]) + len(row["answer_ids"]) for row in data]
    make_trainer(tmp_path, data=data.add_column("length", lengths), **SAVING, **BY_LENGTH).train()
    other = data.add_column("length", lengths[::-1])
    with pytest.raises(ResumeError, match="other rows"):
        make_trainer(tmp_path, data=other, **BY_LENGTH).train(resume_from_checkpoint="last")


def test_own_answers_that_are_read_count_as_rows(tmp_path):
    options = {"own_answer": "column", "save_strategy": "steps", "save_steps": 1}
    make_rac_trainer(tmp_path, **options).train()
    other = [{**row, "own_answer": "g g"} for row in OWN_ANSWERS]
    with pytest.raises(ResumeError, match="other rows"):
        make_rac_trainer(tmp_path, data=other, **options).train(resume_from_checkpoint="last")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_device_train_batch_size": 4}, "rows_per_step was 4, is 8"),
        ({"gradient_accumulation_steps": 1}, "rows_per_step was 4, is 2"),
        ({"optim": "sgd"}, "optim was .*, is 'sgd'"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor was 0.0, is 0.1"),
        ({"neftune_noise_alpha": 5.0}, r"neftune_noise_alpha was None, is 5.0"),
        ({"data_seed": 3}, "data_seed was None, is 3"),
        (BY_LENGTH, "group_by_length"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last was False, is True"),
        ({"seed": 3}, "seed was 42, is 3"),
        ({"sampling_temperature": 0.7}, r"sampling_temperature was 1.0, is 0.7"),
    ],
)
def test_options_that_make_another_run_are_refused(run_folder, change, message):
    with pytest.raises(ResumeError, match=message):
        make_trainer(run_folder, **change).train(resume_from_checkpoint="last")


def test_a_run_does_not_go_on_by_another_method(run_folder, tmp_path):
    options = {"data": rows(6), "max_new_tokens": 4, "max_length": 64}
    make_rac_trainer(tmp_path, **options, **SAVING).train()
    before = json.loads((run_folder / "checkpoint-3" / "selfgen.json").read_text())
    with pytest.raises(ResumeError, match="method was 'bss or bash', is 'rac'"):
        make_rac_trainer(run_folder, **options, self_prob=before["self_prob"]).train(resume_from_checkpoint="last")
    with pytest.raises(ResumeError, match="method was 'rac', is 'bss or bash'"):
        make_trainer(tmp_path, data=rows(6), self_prob=0).train(resume_from_checkpoint="last")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": 5}, "differs from an unbroken one: max_steps was 3, is 5"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type was 'linear', is 'cosine'"),
        ({"warmup_steps": 2}, "warmup_steps was 0"),
        ({"max_grad_norm": 0.5}, r"max_grad_norm was 1.0, is 0.5"),
        ({"bf16": True}, "bf16 was False, is True"),
        ({"learning_rate": 0.5}, r"learning_rate was 0.01, is 0.5: no effect in a resumed run"),
        ({"weight_decay": 0.5}, r"weight_decay was 0.0, is 0.5: no effect"),
        ({"logging_steps": 2, "save_steps": 7, "per_device_eval_batch_size": 3, "report_to": []}, None),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}, None),
    ],
)
def test_options_that_users_change_are_told(run_folder, caplog, change, message):
    make_trainer(run_folder, **{**SAVING, **change}).train(resume_from_checkpoint=str(run_folder / "checkpoint-2"))
    said = [line for line in caplog.messages if " was " in line]
    assert bool(said) == (message is not None)
    if message:
        (line,) = said
        assert re.search(message, line)


@pytest.mark.parametrize("change", [{"learning_rate": 0.5}, {"weight_decay": 0.5}, {"adam_beta2": 0.5}])
@pytest.mark.one_case
def test_what_the_warning_says_has_no_effect_has_none(run_folder, change):
    found = []
    for options in ({}, change):
        trainer = make_trainer(run_folder, max_steps=3, **options)
        trainer.train(resume_from_checkpoint=str(run_folder / "checkpoint-1"))
        found.append(weights(trainer.model))
    assert torch.equal(*found)


def test_a_checkpoint_of_an_earlier_version_is_continued(run_folder):
    """It has neither a hash of the rows nor the Trainer's options."""
    for file in run_folder.glob("checkpoint-*/selfgen.json"):
        settings = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in settings.items() if k not in ("rows", "trainer")}))
    make_trainer(run_folder, data=rows(seed=5), max_steps=4).train(resume_from_checkpoint="last")


def test_a_checkpoint_that_can_not_be_compared_is_named(run_folder, caplog):
    (run_folder / "checkpoint-3" / "selfgen.json").unlink()
    make_trainer(run_folder, max_steps=4).train(resume_from_checkpoint="last")
    (line,) = [line for line in caplog.messages if "selfgen.json" in line]
    assert line.endswith(
        "checkpoint-3 has no selfgen.json, so whether its run had these settings and rows can't be told"
    )


# Weights


def mixtral() -> transformers.MixtralForCausalLM:
    """Its experts have other names in a file."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))


def test_weights_that_have_other_names_in_a_file_are_loaded(tmp_path):
    whole = make_trainer(tmp_path / "whole", mixtral(), **SAVING)
    whole.train()
    (tmp_path / "killed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    resumed = make_trainer(tmp_path / "killed", mixtral(), **SAVING)
    resumed.train(resume_from_checkpoint="last")
    assert torch.equal(weights(resumed.model), weights(whole.model))
    resumed.state.best_model_checkpoint = str(tmp_path / "whole" / "checkpoint-1")
    resumed._load_best_model()
    first = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-1")
    assert torch.equal(weights(resumed.model), weights(first))


@pytest.mark.parametrize("change", [{"num_hidden_layers": 5}, {"intermediate_size": 24}])
def test_a_checkpoint_of_another_model_is_refused(run_folder, change):
    model = tiny_model("llama")
    other = type(model)(type(model.config)(**{**model.config.to_dict(), **change}))
    with pytest.raises(ResumeError, match="checkpoint-3 has the weights of another model"):
        make_trainer(run_folder, other, max_steps=4).train(resume_from_checkpoint="last")


def test_the_mean_loss_of_a_resumed_run_is_that_of_its_steps(tmp_path):
    options = {**SAVING, "logging_steps": 3, "max_steps": 4}
    whole = make_trainer(tmp_path, **{**options, "logging_steps": 1})
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    resumed = make_trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.training_loss == pytest.approx(sum(losses[2:]) / 2)


# The order of rows


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def in_epochs(folder, step=None, **options):
    trainer = make_trainer(folder, data=rows(7), **{**SAVING, "max_steps": -1, "num_train_epochs": 3, **options})
    if step:
        trainer.add_callback(Stop(step))
    return trainer


@pytest.mark.parametrize("options", [{}, BY_LENGTH, UNSEEDED], ids=["random", "by length", "unseeded"])
@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 2, 4, 5))])
@pytest.mark.one_case
def test_a_run_resumed_in_any_epoch_has_the_order_of_an_unbroken_one(tmp_path, step, options):
    """There are two steps in an epoch."""
    whole = in_epochs(tmp_path / "whole", save_strategy="no", **options)
    whole.train()
    in_epochs(tmp_path / "run", step, **options).train()
    resumed = in_epochs(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint="last")
    assert torch.equal(weights(resumed.model), weights(whole.model))


def _resume_in_ranks(rank, folder, options):
    def trainer(name, step=None):
        return in_epochs(folder / name, step, gradient_accumulation_steps=1, **options)

    whole = trainer("whole")
    whole.train()
    trainer("run", 3).train()
    resumed = trainer("run")
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3"))
    assert torch.equal(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), BY_LENGTH], ids=["random", "by length"])
@pytest.mark.slow
def test_the_same_in_two_processes(tmp_path, options):
    in_ranks(_resume_in_ranks, tmp_path, options)


# What can't be written


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "target",
    ["transformers.Trainer._save", "transformers.Trainer._save_optimizer_and_scheduler", "torch.save",
     "transformers.trainer_callback.TrainerState.save_to_json"],
)  # fmt: skip
@pytest.mark.one_case
def test_a_full_disk_leaves_earlier_checkpoints(tmp_path, monkeypatch, target):
    trainer = make_trainer(tmp_path, **SAVING)

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                monkeypatch.setattr(target, full_disk)

    trainer.add_callback(Fill())
    with pytest.raises(SaveError, match=r"checkpoint-2 can't be written \(.*No space left on device\): make room"):
        trainer.train()
    monkeypatch.undo()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-2").exists()
    make_trainer(tmp_path, max_steps=3).train(resume_from_checkpoint="last")


@pytest.mark.parametrize("error", [
    RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    PermissionError(errno.EROFS, "Read-only file system"),
])  # fmt: skip
def test_all_ways_to_say_that_a_file_can_not_be_written(tmp_path, error):
    with pytest.raises(SaveError, match="can't be written"), saving(tmp_path):
        raise error


def test_other_errors_stay(tmp_path):
    with pytest.raises(ValueError, match="else"), saving(tmp_path):
        raise ValueError("something else")


def test_a_checkpoint_that_is_written_over_does_not_count_meanwhile(run_folder, monkeypatch):
    """Such as where a run goes on from an earlier one than the newest."""
    seen = []
    monkeypatch.setattr(Trainer, "_save_scaler", lambda self, folder: seen.append(fault_of(Path(folder))))
    make_trainer(run_folder, **SAVING).train(resume_from_checkpoint=str(run_folder / "checkpoint-1"))
    assert len(seen) == 2
    assert all("trainer_state.json" in fault for fault in seen)
    assert fault_of(run_folder / "checkpoint-3") is None


# On the command line


@pytest.fixture
def cli(tmp_path):
    save_model(tmp_path / "model")
    write_jsonl(
        tmp_path / "train.jsonl", [{"prompt": "a b", "completion": "c d"}, {"prompt": "e", "completion": "f"}] * 4
    )
    small = {"max_steps": 3, "save_steps": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "use_cpu": True}
    quiet = {"disable_tqdm": True, "report_to": "none", "max_length": 32, "token_budget": 32, "balance": 4}
    names = {"model": tmp_path / "model", "dataset": tmp_path / "train.jsonl", "output_dir": tmp_path / "out"}
    return {**names, **small, **quiet, "self_prob": 0.5}


def test_one_line_on_the_command_line(cli, tmp_path, capsys, monkeypatch):
    assert run(["train", *flags(cli)], capsys)[0] == 0
    resume = [*flags(cli), "--resume_from_checkpoint"]
    truncate(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    line = refused(["train", *resume, tmp_path / "out" / "checkpoint-2"], capsys)
    assert "checkpoint-2 can't be continued from, as model.safetensors is broken" in line
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "h", "completion": "c d"}] * 8)
    assert "checkpoint-3 comes from a run on other rows" in refused(["train", *resume, "last"], capsys)
    assert "rows_per_step was 2, is 4" in refused(
        ["train", *resume, "last", "--gradient_accumulation_steps", "2"], capsys
    )
    monkeypatch.setattr("transformers.Trainer._save_optimizer_and_scheduler", full_disk)
    code, _, err = run(["train", *flags({**cli, "output_dir": tmp_path / "full"})], capsys)
    assert code == 2
    assert "checkpoint-1 can't be written" in last_line(err)
    assert checkpoints.last_checkpoint(tmp_path / "full") is None


def test_another_model_to_stay_near_is_refused(tmp_path):
    """Without kl_model it is the model that training begins with."""
    options = {"kl_weight": 0.1, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(tmp_path, model=tiny_model("llama"), **options).train()
    make_trainer(tmp_path, model=tiny_model("llama"), **options | {"max_steps": 3}).train(resume_from_checkpoint=True)
    other = tiny_model("llama")
    other.lm_head.weight.data[0] += 1
    with pytest.raises(ResumeError, match="stays near another model"):
        make_trainer(tmp_path, model=other, **options | {"max_steps": 5}).train(resume_from_checkpoint=True)


def test_a_model_that_lacks_weights_is_not_trained_by_its_name(tmp_path):
    model = tiny_model("llama")
    state = {name: weight for name, weight in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path / "model", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 weight of LlamaForCausalLM.*layers\.1\.mlp\.up_proj"):
        make_trainer(tmp_path / "out", model=str(tmp_path / "model"))
