"""Files and folders as users give them: paths with ~, folders with something in them, broken files, odd numbers."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers as t
from datasets import Dataset
from helpers.cli import flags, history, refused, run, save_model
from helpers.data import EOS, ROWS, TEMPLATE, make_tokenizer, read_jsonl, write_jsonl
from helpers.processes import begun, contents

from selfgen import (
    BASHTrainer,
    BSSConfig,
    BSSTrainer,
    ContextGenerator,
    RACConfig,
    load_contexts,
    write_contexts,
)
from selfgen.cli.journal import Journal, read
from selfgen.data import tokenize_rows
from selfgen.files import alone

COMMANDS = ("train", "contexts", "generate", "eval", "inspect")


@pytest.fixture
def options(arguments) -> dict[str, dict]:
    """Few and quick arguments of each command, by its name."""
    common = {name: arguments[name] for name in ("model", "dataset", "max_length", "use_cpu")}
    out = Path(arguments["output_dir"])
    return {
        "train": arguments | {"max_steps": 1, "save_strategy": "no"},
        "contexts": common | {"output_dir": out},
        "generate": common | {"output_file": out / "answers.jsonl", "max_new_tokens": 2},
        "eval": common | {"output_dir": out, "metrics": "loss", "limit": 4},
        "inspect": common | {"output_file": out / "inspect.html", "max_new_tokens": 2},
    }


# The home folder


@pytest.fixture
def home(options, tmp_path, model_dir, monkeypatch):
    """A home folder with the model and the data."""
    folder = tmp_path / "home"
    shutil.copytree(model_dir, folder / "model")
    shutil.copy(options["train"]["dataset"], folder / "train.jsonl")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("how", ["flags", "joined", "yaml"])
@pytest.mark.parametrize(
    ("command", "file"),
    [("train", "config.json"), ("contexts", "provenance.json"), ("generate", ""), ("eval", "results.json")],
)
@pytest.mark.each_value
def test_home_in_every_path(home, options, tmp_path, capsys, command, file, how):
    given = options[command] | {"model": "~/model", "dataset": "~/train.jsonl"}
    given["output_file" if command == "generate" else "output_dir"] = "~/new/out"
    if how == "yaml":
        (home / "options.yaml").write_text("".join(f"{name}: {value}\n" for name, value in given.items()))
        arguments = ["~/options.yaml"]
    elif how == "joined":
        arguments = [f"--{name}={value}" for name, value in given.items()]
    else:
        arguments = flags(given)
    code, _, err = run([command, *arguments], capsys)
    assert code == 0, err
    assert (home / "new" / "out" / file).exists()
    assert not (tmp_path / "~").exists()


def test_home_in_other_paths(home, options, capsys):
    """Contexts, evaluation data, a frozen model, a checkpoint."""
    assert run(["contexts", *flags(options["contexts"] | {"output_dir": "~/contexts"})], capsys)[0] == 0
    more = {"method": "bash", "contexts": "~/contexts", "kl_model": "~/model", "kl_weight": 0.1, "save_steps": 1}
    given = options["train"] | {"output_dir": "~/out", "save_strategy": "steps", "eval_dataset": "~/train.jsonl"} | more
    del given["dataset"]
    assert run(["train", *flags(given)], capsys)[0] == 0
    again = given | {"max_steps": 2, "resume_from_checkpoint": "~/out/checkpoint-1"}
    code, _, err = run(["train", *flags(again)], capsys)
    assert code == 0, err
    assert any(
        "eval_loss" in entry for entry in json.loads((home / "out/trainer_state.json").read_text())["log_history"]
    )


def test_home_in_python(home, tmp_path):
    config = BSSConfig("~/out", use_cpu=True, max_steps=1, max_length=32, save_strategy="steps", save_steps=1)
    assert config.output_dir == str(home / "out")
    rows = Dataset.from_list(ROWS)
    trainer = BSSTrainer("~/model", config, train_dataset=rows)
    trainer.train()
    trainer.save_model("~/saved")
    assert (home / "saved" / "model.safetensors").exists()
    trainer.train(resume_from_checkpoint="~/out/checkpoint-1")
    data, _ = tokenize_rows(rows, trainer.processing_class, max_length=32)
    write_contexts(ContextGenerator(trainer.model), data, "~/contexts", self_prob=0.5, progress=False)
    assert len(load_contexts("~/contexts")) == 2
    BASHTrainer("~/model", config, train_dataset="~/contexts")
    assert not (tmp_path / "~").exists()


# Numbers


@pytest.mark.parametrize(
    ("command", "option", "value", "words"),
    [
        ("train", "rounds", 0, "rounds is 0; it must be at least 1"),
        ("train", "shard_rows", 0, "shard_rows is 0; it must be at least 1"),
        ("train", "context_batch_size", -1, "context_batch_size is -1; it must be at least 1"),
        ("train", "per_device_train_batch_size", 0, "per_device_train_batch_size is 0; it must be at least 1"),
        ("train", "gradient_accumulation_steps", 0, "gradient_accumulation_steps is 0; it must be at least 1"),
        ("train", "dataloader_num_workers", -1, "dataloader_num_workers is -1; it must be at least 0"),
        ("train", "learning_rate", -1e-5, "learning_rate is -1e-05; it must be at least 0"),
        ("train", "learning_rate", "nan", "learning_rate is nan; give a number"),
        ("train", "span_length", "nan", "span_length is nan; give a number"),
        ("train", "seed", -1, "seed is -1; it must be from 0 to 4294967295"),
        ("train", "max_length", 1, "max_length is 1; it must be at least 2"),
        ("contexts", "shard_rows", 0, "shard_rows is 0; it must be at least 1"),
        ("contexts", "batch_size", 0, "batch_size is 0; it must be at least 1"),
        ("contexts", "self_prob", "nan", "self_prob is nan; a probability must be in [0, 1]"),
        ("contexts", "sampling_temperature", "nan", "sampling_temperature is nan; it must be a finite number >= 0"),
        ("contexts", "seed", 2**64, f"seed is {2**64}; it must be a 64-bit integer"),
        ("contexts", "max_length", 0, "max_length is 0; it must be at least 2"),
        ("contexts", "token_budget", 0, "token_budget is 0; it must be at least 1"),
        ("generate", "chunk_rows", 0, "chunk_rows is 0; it must be at least 1"),
        ("generate", "batch_size", -3, "batch_size is -3; it must be at least 1"),
        ("generate", "max_new_tokens", 0, "max_new_tokens is 0; it must be at least 1"),
        ("generate", "rounds", 0, "rounds is 0; it must be at least 1"),
        ("generate", "temperature", "nan", "temperature is nan; it must be a finite number >= 0"),
        ("generate", "temperature", -0.5, "temperature is -0.5; it must be a finite number >= 0"),
        ("generate", "temperature", "inf", "temperature is inf; it must be a finite number >= 0"),
        ("generate", "top_k", 0, "top_k is 0; it must be at least 1"),
        ("generate", "top_p", 0, "top_p is 0.0; it must be above 0 and at most 1"),
        ("generate", "top_p", "nan", "top_p is nan; it must be above 0 and at most 1"),
        ("generate", "seed", -(2**63) - 1, "it must be a 64-bit integer"),
        ("eval", "limit", 0, "limit is 0; it must be at least 1"),
        ("eval", "batch_size", 0, "batch_size is 0; it must be at least 1"),
        ("eval", "temperature", "nan", "temperature is nan; it must be a finite number >= 0"),
        ("eval", "self_prob", -1, "self_prob is -1.0; a probability must be in [0, 1]"),
        ("eval", "seed", 2**64, "it must be a 64-bit integer"),
    ],
)
def test_numbers_are_checked_before_anything_is_loaded(options, capsys, monkeypatch, command, option, value, words):
    monkeypatch.setattr("selfgen.cli.options.from_pretrained", lambda *a, **k: pytest.fail("must not load a model"))
    monkeypatch.setattr("selfgen.data.loading.load_rows", lambda *a, **k: pytest.fail("must not read the data"))
    more = {"method": "bash"} if option in ("rounds", "shard_rows", "context_batch_size") and command == "train" else {}
    assert words in refused([command, *flags(options[command] | more | {option: value})], capsys)
    assert not Path(options["train"]["output_dir"]).exists()


@pytest.mark.parametrize("config", [BSSConfig, RACConfig])
def test_nan_is_no_value_of_an_option(config, tmp_path):
    names = [one.name for one in fields(config) if "float" in str(one.type)]
    assert len(names) > 15
    for name in names:
        with pytest.raises(ValueError, match=f"{name} is nan"):
            config(str(tmp_path), use_cpu=True, **{name: float("nan")})


def test_seeds_may_be_negative_where_contexts_and_answers_are_made(options, capsys):
    for command in ("contexts", "generate", "eval"):
        place = {} if command == "generate" else {"output_dir": f"{options[command]['output_dir']}-{command}"}
        code, _, err = run([command, *flags(options[command] | place), "--seed", "-1"], capsys)
        assert code == 0, err


@pytest.mark.parametrize("name", ["wandb", "comet_ml", "flyte", "azure_ml", "swanlab"])
def test_a_reporter_without_its_package(options, capsys, monkeypatch, name):
    package = {"flyte": "flytekit", "azure_ml": "azureml-core"}.get(name, name)
    asked = {"flyte": "flytekit", "azure_ml": "azureml", "comet_ml": "comet"}.get(name, name)
    monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{asked}_available", lambda: False)
    line = refused(["train", *flags(options["train"]), "--report_to", name], capsys)
    assert f"the package {package} is not installed" in line
    assert f"pip install {package}" in line
    assert "report_to has 'nothing'" in refused(["train", *flags(options["train"]), "--report_to", "nothing"], capsys)


# One process per folder, and nothing else in it


def hold(ready, path):
    with alone(path):
        ready.set()
        time.sleep(120)


@pytest.mark.parametrize("more", [{}, {"method": "bash", "rounds": 2, "num_train_epochs": 1}], ids=["bss", "rounds"])
def test_one_process_trains_in_a_folder(options, capsys, monkeypatch, more):
    given = options["train"] | more
    folder = Path(given["output_dir"])
    folder.mkdir()
    other = begun(hold, folder)
    monkeypatch.setattr("selfgen.cli.options.auto_class_of", lambda *a, **k: pytest.fail("loads"))
    assert f"another process is writing {folder}" in refused(["train", *flags(given)], capsys)
    other.kill()
    other.join()
    monkeypatch.undo()
    code, _, err = run(["train", *flags(given)], capsys)  # its lock is no file of another run
    assert code == 0, err


RUNS = {
    "model": lambda folder: save_model(folder),
    "adapter": lambda folder: write(folder / "adapter_config.json", folder / "adapter_model.safetensors"),
    "weights": lambda folder: write(folder / "pytorch_model.bin"),
    "shards": lambda folder: write(
        folder / "model-00001-of-00002.safetensors", folder / "model.safetensors.index.json"
    ),
    "another run": lambda folder: write(folder / "training_args.bin"),
    "contexts": lambda folder: write(folder / "provenance.json"),
}


def write(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize(
    "more", [{}, {"method": "bash"}, {"resume_from_checkpoint": "last"}], ids=["bss", "bash", "last"]
)
def test_a_folder_with_another_model_is_refused(options, capsys, kind, more):
    given = options["train"] | more
    folder = Path(given["output_dir"])
    RUNS[kind](folder)
    before = contents(folder)
    line = refused(["train", *flags(given)], capsys)
    assert f"{folder} holds a model or another run (" in line
    assert "--overwrite-output-dir yes" in line
    assert contents(folder) == before
    if "method" not in more:
        assert not (folder / ".lock").exists()  # nothing is left in a folder that is refused


@pytest.mark.parametrize("more", [{}, {"method": "bash"}], ids=["bss", "rounds"])
def test_a_model_is_written_over_where_that_is_asked_for(options, capsys, more):
    """Nothing of the one before is left that would be taken for a part of the new one."""
    given = options["train"] | more
    folder = Path(given["output_dir"])
    write(folder / "adapter_config.json", folder / "chat_template.jinja", folder / "notes.txt")
    code, _, err = run(["train", *flags(given), "--overwrite-output-dir", "yes"], capsys)
    assert code == 0, err
    assert t.AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"
    assert t.AutoTokenizer.from_pretrained(folder).chat_template is None
    assert (folder / "notes.txt").exists()


def test_the_models_own_folder(options, capsys, tmp_path, model_dir):
    folder = tmp_path / "own"
    shutil.copytree(model_dir, folder)
    given = options["train"] | {"model": folder, "output_dir": folder, "learning_rate": 0.01}
    before = contents(folder)
    assert "holds a model" in refused(["train", *flags(given)], capsys)
    assert contents(folder) == before
    assert run(["train", *flags(given), "--overwrite_output_dir"], capsys)[0] == 0
    assert contents(folder)["model.safetensors"] != before["model.safetensors"]


def test_other_files_do_no_harm(options, capsys):
    folder = Path(options["train"]["output_dir"])
    write(folder / "notes.txt", folder / "options.yaml", folder / "eval" / "results.json", folder / ".lock")
    code, _, err = run(["train", *flags(options["train"])], capsys)
    assert code == 0, err


def test_a_finished_run_is_continued(options, capsys):
    """With the model in its folder; checkpoints are never written over."""
    given = options["train"] | {"save_strategy": "steps", "save_steps": 1}
    assert run(["train", *flags(given)], capsys)[0] == 0
    for more in ([], ["--overwrite-output-dir", "yes"]):
        assert "has checkpoints of an earlier run; continue" in refused(["train", *flags(given), *more], capsys)
    rounds = ["--method", "bash", "--resume_from_checkpoint", "last"]
    assert "of another method" in refused(["train", *flags(given), *rounds], capsys)
    for number, checkpoint in enumerate(("last", Path(given["output_dir"]) / "checkpoint-2"), start=2):
        more = {"resume_from_checkpoint": checkpoint, "max_steps": number}
        code, _, err = run(["train", *flags(given | more)], capsys)
        assert code == 0, err
        assert len(history(given["output_dir"])) == number
    elsewhere = Path(given["output_dir"]).with_name("elsewhere")
    save_model(elsewhere)
    more = {"resume_from_checkpoint": Path(given["output_dir"]) / "checkpoint-2", "output_dir": elsewhere}
    assert "holds a model" in refused(["train", *flags(given | more)], capsys)


@pytest.mark.parametrize("file", ["config.json", "notes.txt", "data/train.parquet"])
def test_contexts_go_to_a_folder_of_their_own(options, capsys, file):
    folder = Path(options["contexts"]["output_dir"])
    write(folder / file)
    line = refused(["contexts", *flags(options["contexts"])], capsys)
    assert f"{folder} holds other files, and no contexts ({file})" in line
    assert contents(folder) == {file: b"{}"}


def test_a_record_of_another_program(options, capsys):
    folder = Path(options["contexts"]["output_dir"])
    write(folder / "provenance.json")
    assert "provenance.json is no record of contexts" in refused(["contexts", *flags(options["contexts"])], capsys)


def test_answers_are_not_added_to_other_files(options, capsys):
    file = Path(options["generate"]["output_file"])
    file.parent.mkdir()
    write_jsonl(file)
    line = refused(["generate", *flags(options["generate"])], capsys)
    assert f"selfgen did not write {file}" in line
    assert read_jsonl(file) == ROWS
    own = flags(options["generate"] | {"output_file": options["generate"]["dataset"]})
    assert "selfgen did not write" in refused(["generate", *own], capsys)
    folder = flags(options["generate"] | {"output_file": file.parent})
    assert f"{file.parent}', which is a folder" in refused(["generate", *folder], capsys)


def test_broken_journals_are_named(options, capsys):
    file = Path(options["generate"]["output_file"])
    assert run(["generate", *flags(options["generate"])], capsys)[0] == 0
    content = file.read_text()
    file.write_text("{\n" + content)
    assert f"{file}, line 1: broken JSON" in refused(["generate", *flags(options["generate"])], capsys)
    file.write_text(content)
    file.with_name(f"{file.name}.settings.json").write_text("{")
    assert "answers.jsonl.settings.json, line 1" in refused(["generate", *flags(options["generate"])], capsys)


@pytest.mark.parametrize("content", ["{}", "[1]", "no JSON"])
def test_results_of_another_program(options, capsys, content):
    file = Path(options["eval"]["output_dir"]) / "results.json"
    write(file)
    file.write_text(content)
    assert f"selfgen eval did not write {file}" in refused(["eval", *flags(options["eval"])], capsys)
    assert file.read_text() == content


# JSON has no NaN


def strict(text: str):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_losses_that_are_no_numbers(options, capsys, tmp_path):
    """A model whose losses are NaN: null in all files, and again NaN for what is computed from them."""
    save_model(tmp_path / "broken")
    model = t.AutoModelForCausalLM.from_pretrained(tmp_path / "broken")
    model.lm_head.weight.data[3] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    given = options["eval"] | {"model": tmp_path / "broken", "self_prob": 0, "context_method": "sequential"}
    for _ in range(2):  # from the model, and from the rows that are there
        code, _, err = run(["eval", *flags(given)], capsys)
        assert code == 0, err
        for file in Path(given["output_dir"]).glob("*.json*"):
            for line in [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines():
                strict(line)
        assert json.loads((Path(given["output_dir"]) / "results.json").read_text())["loss"]["reference"]["loss"] is None


def test_a_journal_is_strict(tmp_path):
    journal = Journal(tmp_path / "rows.jsonl", {"temperature": float("inf")})
    line = {"x": float("nan"), "y": [float("-inf"), 1.5], "z": b"a\xff"}
    journal.complete(Dataset.from_list([{"row": 0}]), 1, lambda part, _: [line], "Rows")
    strict((tmp_path / "rows.jsonl.settings.json").read_text())
    assert strict((tmp_path / "rows.jsonl").read_text()) == {"x": None, "y": [None, 1.5], "z": "a\\xff"}
    assert read(tmp_path / "rows.jsonl")[0] == {"temperature": None, "chunk_rows": 1}
    Journal(tmp_path / "rows.jsonl", {"temperature": float("inf")})  # the same settings


# Models from folders


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "{", "tokenizer.json, line 1: broken JSON"),
        ("tokenizer.json", "", "tokenizer.json, line 1: broken JSON"),
        ("tokenizer.json", "{}", "tokenizer.json can't be read"),
        ("tokenizer_config.json", "{\n]", "tokenizer_config.json, line 2: broken JSON"),
        ("config.json", "{", "config.json, line 1: broken JSON"),
        ("config.json", "[]", "config.json is no JSON object"),
        ("generation_config.json", "{", None),  # transformers does without
        ("model.safetensors", "{", "model.safetensors holds no whole weights"),
        ("model.safetensors.index.json", "{", "model.safetensors.index.json, line 1: broken JSON"),
        ("model.safetensors.index.json", "{}", "model.safetensors.index.json has no weight_map"),
    ],
)
def test_a_broken_file_is_named(options, model_dir, tmp_path, capsys, name, content, words):
    folder = tmp_path / "broken"
    shutil.copytree(model_dir, folder)
    (folder / name).write_text(content)
    write(folder / "notes.json")
    (folder / "notes.json").write_text("{")  # is none of the model's
    if "index" in name:
        (folder / "model.safetensors").unlink()
    if words is None:
        assert run(["generate", *flags(options["generate"] | {"model": folder})], capsys)[0] == 0
    else:
        line = refused(["generate", *flags(options["generate"] | {"model": folder})], capsys)
        assert words in line
        assert str(folder) in line


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def with_code(model_dir, tmp_path, monkeypatch):
    """A checkpoint whose classes come with it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "mine"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mine"}
    config["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(CODE)
    return folder


def test_code_that_comes_with_a_model(options, with_code, capsys):
    for command in COMMANDS:
        line = refused([command, *flags(options[command] | {"model": with_code})], capsys)
        assert "comes with code of its own" in line
        assert "--trust-remote-code yes" in line
    given = options["generate"] | {"model": with_code, "trust_remote_code": True}
    code, _, err = run(["generate", *flags(given)], capsys)
    assert code == 0, err


def test_the_doctor_looks_at_code_that_comes_with_a_model(with_code, capsys, monkeypatch):
    for part in ("_versions", "_devices", "_kernels", "_exactness", "_cost"):
        monkeypatch.setattr(f"selfgen.cli.doctor.{part}", lambda: iter(()))
    code, out, _ = run(["doctor", str(with_code)], capsys)
    assert code == 1
    assert "give --trust-remote-code yes" in " ".join(out.split())
    code, out, _ = run(["doctor", str(with_code), "--trust-remote-code"], capsys)
    assert code == 0
    assert "MineForCausalLM" in out


def test_code_that_comes_with_a_model_in_python(with_code, tmp_path):
    config = BSSConfig(str(tmp_path / "out"), use_cpu=True, max_length=32, kl_model=str(with_code), kl_weight=0.1)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        BSSTrainer(str(with_code), config, train_dataset=Dataset.from_list(ROWS))
    trainer = BSSTrainer(str(with_code), config, train_dataset=Dataset.from_list(ROWS), trust_remote_code=True)
    assert trainer.model.config.model_type == "mine"


def test_where_answers_end_is_told_with_an_adapter(model_dir, tmp_path):
    """PEFT loads the generation configuration of the base model, so the one of the answers is next to the adapter."""
    peft = pytest.importorskip("peft")
    tokenizer = make_tokenizer(TEMPLATE.replace("<eos>", "<system>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<system>"]})
    model = t.AutoModelForCausalLM.from_pretrained(model_dir)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    config = BSSConfig(
        str(tmp_path / "out"), use_cpu=True, max_steps=1, max_length=32, save_strategy="steps", save_steps=1
    )
    trainer = BSSTrainer(model, config, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    end = tokenizer.convert_tokens_to_ids("<system>")
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        assert t.GenerationConfig.from_pretrained(folder).eos_token_id == [EOS, end]
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    prompt = torch.tensor([[3, 7]])
    loaded.get_output_embeddings().register_forward_hook(lambda *_: always(end))
    loaded.generation_config = t.GenerationConfig.from_pretrained(tmp_path / "out")  # as the docs say
    assert loaded.generate(input_ids=prompt, max_new_tokens=8)[0].tolist() == [3, 7, end]


def always(token: int) -> torch.Tensor:
    """Logits [1, 1, V] of one token."""
    logits = torch.full((1, 1, 15), -9.0)
    logits[..., token] = 9.0
    return logits
