"""The command line: runs, YAML files, resuming after a kill, one line and exit code 2 for an error."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as t
from helpers.cli import ROOT, flags, history, run
from helpers.data import ROWS, WORDS, make_tokenizer, write_jsonl
from helpers.processes import in_ranks, kill_command
from safetensors.torch import load_file, save_file

import selfgen
from selfgen import BSSConfig
from selfgen.cli import COMMANDS, main
from selfgen.cli.options import parse
from selfgen.cli.train import _parser
from selfgen.context.models import MissingWeightsError, load_whole
from selfgen.evaluation import Gap


def test_help(capsys):
    code, out, _ = run(["--help"], capsys)
    assert code == 0
    assert "selfgen train" in out
    code, short, _ = run(["train", "--help"], capsys)
    assert code == 0
    for option in ("--model", "--dataset", "--self-prob", "--learning-rate", "--resume-from-checkpoint"):
        assert option in short
    assert "--adam-beta1" not in short
    for flag in ("--help-all", "--help_all"):
        code, everything, _ = run(["train", flag], capsys)
        assert code == 0
        assert "--adam-beta1" in everything


def parsed(tmp_path, *options: str) -> BSSConfig:
    required = ["--model", "m", "--dataset", "d", "--output-dir", str(tmp_path), "--use-cpu"]
    return parse(_parser(BSSConfig, everything=False), [*required, *options])[3]


def test_a_flag_that_may_be_left_open_is_yes_by_itself(tmp_path):
    """Whatever follows it."""
    assert [parsed(tmp_path, *options).lean_loss for options in ((), ("--lean-loss",), ("--lean-loss", "no"))] == [
        None,
        True,
        False,
    ]
    assert parsed(tmp_path, "--lean_loss", "--seed", "7").seed == 7


def test_the_comparison_that_is_advised_is_one_that_runs(tmp_path):
    """By `selfgen eval` and by the pages."""
    lines = {"tokens": 10, "right_under_references": 9, "right_running_freely": 5, "self_tokens": 10}
    advice = Gap.of([lines | {"self_tokens_right": 3}] * 10).advice
    advised = re.search(r"compare with (--.*?) \(", advice)[1]
    found = parsed(tmp_path, *advised.split())
    assert (found.self_prob, found.lean_loss) == (0.0, True)
    for page in ("README.md", "docs/evaluation.md", "docs/results.md", "docs/bss.md"):
        assert advised in (ROOT / page).read_text()


def test_version(capsys):
    assert run(["--version"], capsys) == (0, f"selfgen {selfgen.__version__}\n", "")


def test_train_from_flags(arguments, capsys, terminal):
    code, out, err = run(["train", *flags(arguments)], capsys)
    assert code == 0
    assert arguments["output_dir"] in out
    logs = history(arguments["output_dir"])
    assert len(logs) == 3
    assert {"self_share", "passes", "computed_per_token", "context_seconds", "training_seconds"} <= set(logs[0])
    assert "agreement" in logs[-1]
    assert "agreement" not in logs[0]  # nothing is mixed in the first step
    assert t.AutoModelForCausalLM.from_pretrained(arguments["output_dir"]).config.vocab_size == len(WORDS)
    assert t.AutoTokenizer.from_pretrained(arguments["output_dir"]).eos_token == "<eos>"
    assert "%" in err  # the progress bar, with the time left
    assert "<" in err


def test_a_file_has_lines_and_no_bars(arguments, capsys):
    code, out, err = run(["train", *flags(arguments)], capsys)
    assert code == 0
    assert "%|" not in err
    assert "\r" not in err
    assert "trained to step 3 of 3" in out


def test_yaml_and_flags_give_the_same_run(arguments, tmp_path, capsys):
    run(["train", *flags(arguments), "--self_prob", "0.5"], capsys)
    yaml = tmp_path / "bss.yaml"
    other = {**arguments, "output_dir": str(tmp_path / "other"), "self_prob": 0.1, "learning_rate": "5e-5"}
    other |= {
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": ["none"],
        "bf16": False,
        "dataset_config": "null",
    }
    yaml.write_text("".join(f"{key}: {value}\n" for key, value in other.items()))
    code, _, _ = run(["train", str(yaml), "--self_prob", "0.5"], capsys)  # flags win
    assert code == 0
    losses = [[e["loss"] for e in history(folder)] for folder in (arguments["output_dir"], other["output_dir"])]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ([], 1),  # at the end
        (["--eval_strategy", "steps", "--eval_steps", "1"], 3),
        (
            ["--method", "bash", "--rounds", "2", "--num_train_epochs", "1", "--max_steps", "-1"],
            1,
        ),
    ],
    ids=["end", "steps", "rounds"],
)
def test_evaluation_split(arguments, capsys, options, count):
    code, _, _ = run(["train", *flags(arguments), "--eval_split", "train[:4]", *options], capsys)
    assert code == 0
    states = list(Path(arguments["output_dir"]).glob("round-*/trainer_state.json"))
    for state in states or [Path(arguments["output_dir"]) / "trainer_state.json"]:
        assert sum("eval_loss" in entry for entry in json.loads(state.read_text())["log_history"]) == count


def test_a_run_before_is_not_taken_for_this_one(arguments, capsys):
    """Checkpoints of another run in the folder would be resumed from, as they may be further on."""
    assert run(["train", *flags(arguments), "--save_steps", "1"], capsys)[0] == 0
    before = (Path(arguments["output_dir"]) / "model.safetensors").read_bytes()
    code, _, err = run(["train", *flags(arguments), "--learning_rate", "1e-3"], capsys)
    assert code == 2
    assert "--resume-from-checkpoint last" in err
    code, _, err = run(["train", *flags(arguments), "--resume_from_checkpoint", "last", "--self_prob", "0.7"], capsys)
    assert code == 2
    assert "self_prob was 0.5, is 0.7" in err
    assert (Path(arguments["output_dir"]) / "model.safetensors").read_bytes() == before
    more = {**arguments, "max_steps": 5, "token_budget": 9}  # changes no contexts
    assert run(["train", *flags(more), "--resume_from_checkpoint", "last"], capsys)[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--direct_weight", "1"], "'--direct_weight', which goes with --method rac"),
        (["--lerning-rate", "1"], "did you mean '--learning-rate'?"),
        (["--replay", "no"], "the option '--replay' is called '--reuse-passes' now"),
        (["nothing"], "'nothing' is not an option"),
        (["c.yaml"], "c.yaml first"),
    ],
)
def test_unknown_options(arguments, capsys, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("max_steps: 1\n")
    code, _, err = run(["train", *flags(arguments), *options], capsys)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_process_of_a_machine_tells_an_error(tmp_path, capsys, monkeypatch, rank):
    """The others wait, as torchrun ends them when the first one ends; it repeats what the file says."""
    waited = []
    monkeypatch.setattr("selfgen.cli.terminal.time.sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    code, _, err = run(["train", "--self-probb", "0.1"], capsys)
    assert code == 2
    assert len(waited) == int(rank)
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert told["message"] == err.strip()
    assert int(told["extraInfo"]["timestamp"]) > 0


def test_a_failed_evaluation_costs_no_model(arguments, capsys, monkeypatch):
    """Full logits may not fit where training, which has none, did."""

    def evaluate(*_, **__):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr("selfgen.training.bss.BSSTrainer.evaluate", evaluate)
    with pytest.raises(torch.OutOfMemoryError):
        main(["train", *flags(arguments), "--eval_split", "train[:4]", "--save_strategy", "no"])
    assert t.AutoModelForCausalLM.from_pretrained(arguments["output_dir"]).config.vocab_size == len(WORDS)


@pytest.mark.parametrize(("options", "dtype"), [([], torch.float32), (["--dtype", "auto"], torch.bfloat16)])
def test_weights_are_trained_in_fp32(arguments, model_dir, tmp_path, capsys, options, dtype):
    """Whatever the checkpoint has, if nothing else is asked for: half precision rounds small updates away."""
    folder = tmp_path / "half"
    shutil.copytree(model_dir, folder)
    t.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).save_pretrained(folder)
    code, _, _ = run(["train", *flags({**arguments, "model": str(folder)}), *options], capsys)
    assert code == 0
    assert t.AutoModelForCausalLM.from_pretrained(arguments["output_dir"]).dtype == dtype


def test_a_broken_checkpoint_of_the_model(arguments, model_dir, tmp_path, capsys):
    folder = tmp_path / "broken"
    shutil.copytree(model_dir, folder)
    (folder / "model.safetensors").write_bytes(b"no tensors in here")
    code, _, err = run(["train", *flags({**arguments, "model": str(folder)})], capsys)
    assert code == 2
    assert "model.safetensors holds no whole weights" in err


def test_a_checkpoint_that_lacks_weights(arguments, model_dir, tmp_path, capsys):
    """transformers would put random ones in their place."""
    folder = tmp_path / "incomplete"
    shutil.copytree(model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    lacking = next(name for name in weights if "up_proj" in name)
    del weights[lacking]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run(["train", *flags({**arguments, "model": str(folder)})], capsys)
    assert code == 2
    assert f"lacks 1 weight of LlamaForCausalLM, which would be random ({lacking}): get the whole" in err


def test_an_adapter_whose_base_lacks_weights(model_dir, tmp_path):
    """transformers tells what the adapter lacks, and of the base nothing."""
    peft = pytest.importorskip("peft")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(model_dir, base)
    model = t.AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, settings).save_pretrained(adapter)
    load_whole(t.AutoModelForCausalLM, str(adapter))
    weights = load_file(base / "model.safetensors")
    lacking = next(name for name in weights if "up_proj" in name)
    del weights[lacking]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingWeightsError, match=f"base' lacks 1 weight of LlamaForCausalLM.*{lacking}"):
        load_whole(t.AutoModelForCausalLM, str(adapter))


def test_a_model_without_tokenizer(arguments, model_dir, tmp_path, capsys):
    folder = tmp_path / "alone"
    shutil.copytree(model_dir, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    code, _, err = run(["train", *flags({**arguments, "model": str(folder)})], capsys)
    assert code == 2
    assert "has no tokenizer (" in err
    assert "put it there with tokenizer.save_pretrained(" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_ends_a_command_with_one_line(command, capsys, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"selfgen.cli.{command}.run", stop)
    monkeypatch.setattr("sys.argv", ["selfgen", command])
    again = " with --resume-from-checkpoint last" if command == "train" else ""
    is_resumed = command not in ("inspect", "doctor")
    how = f"; the same command{again} goes on from what is written" if is_resumed else ""
    assert main() == 130
    assert capsys.readouterr().err == f"selfgen {command}: stopped{how}\n"


@pytest.mark.slow
def test_data_report_is_shown(arguments, tmp_path):
    write_jsonl(
        tmp_path / "train.jsonl", [*ROWS, {"prompt": "a", "completion": " "}, {"prompt": "a", "completion": "b " * 40}]
    )
    result = subprocess.run(
        [sys.executable, "-m", "selfgen", "train", *flags(arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert (
        "train data: 4 rows: 3 kept, 1 answer truncated to 32 tokens, 1 dropped (1 empty answer: row 2)"
        in result.stderr
    )


BROKEN = '{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n'


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"self_prob": "2"}, "self_prob is 2.0; a probability must be in [0, 1]"),
        ({"self_prob": "half"}, "--self_prob"),
        ({"sampling_temperature": "-1"}, "sampling_temperature is -1.0"),
        ({"max_length": "1000"}, "max_length is 1000, but the model has 64 positions"),
        ({"dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"dataset": BROKEN}, "line 2: broken JSON"),
        ({"dataset": '{"question": "a", "answer": "b"}\n'}, "columns question, answer"),
        ({"dataset": '{"prompt": "a", "completion": ""}\n'}, "no row is left"),
        ({"dataset": '{"prompt": "a", "completion": null}\n'}, "'completion' is empty (None): row 0"),
        ({"dataset_split": "validation"}, "no split 'validation'"),
        ({"model": "nowhere/model"}, "nowhere/model"),
        ({"dtype": "int8"}, "dtype is 'int8'; accepted: auto"),
        ({"resume_from_checkpoint": "nowhere"}, "'nowhere': no checkpoint there"),
        ({"bogus": "1"}, "--bogus"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, changes, words, tmp_path, capsys):
    if changes.get("dataset", "").startswith("{"):
        file = tmp_path / "data.jsonl"
        file.write_text(changes["dataset"])
        changes = {"dataset": str(file)}
    code, out, err = run(["train", *flags({**arguments, **changes})], capsys)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("selfgen train: error: ")
    assert words in last
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("self_probb: 0.5\n", "unknown option 'self_probb'; did you mean 'self_prob'?"),
        ("replay: no\n", "the option 'replay' is called 'reuse_passes' now"),
        ("- a\n", "must map options to values"),
        ("a: [\n", "is not valid YAML"),
        ("max_steps: 1.5\n", "--max_steps"),
        ("max_length: null\n", "max_length has no value; give one, or remove the line: default 1024"),
        ("context_method: magic\n", "magic"),
        (None, "there is no configuration file"),
    ],
)
def test_bad_yaml(content, words, arguments, tmp_path, capsys):
    file = tmp_path / "bss.yaml"
    if content is not None:
        file.write_text(content)
    code, _, err = run(["train", str(file), *flags(arguments)], capsys)
    assert code == 2
    assert words in err


def test_missing_arguments_and_commands(capsys):
    code, _, err = run(["train"], capsys)
    assert code == 2
    assert "--model" in err
    code, _, err = run(["brew"], capsys)
    assert code == 2
    accepted = f"accepted: {', '.join(COMMANDS)} (selfgen --help tells what they do)"
    assert err == f"selfgen: error: unknown command 'brew'; {accepted}\n"


def test_tokenizer_without_eos_and_pad(arguments, model_dir, tmp_path, capsys):
    folder = tmp_path / "no-eos"
    t.AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(folder)
    make_tokenizer(eos_token=None).save_pretrained(folder)
    code, _, err = run(["train", *flags({**arguments, "model": str(folder)})], capsys)
    assert code == 2
    assert "set tokenizer.eos_token" in err


def test_a_model_that_the_fast_path_refuses(arguments, tmp_path, capsys):
    folder = tmp_path / "bloom"
    t.BloomForCausalLM(t.BloomConfig(vocab_size=len(WORDS), hidden_size=16, n_layer=1, n_head=2)).save_pretrained(
        folder
    )
    make_tokenizer().save_pretrained(folder)
    code, _, err = run(["train", *flags({**arguments, "model": str(folder)})], capsys)
    assert code == 2
    assert "positions that can't be given" in err
    assert err.count("Traceback") == 0
    code, _, _ = run(["train", *flags({**arguments, "model": str(folder)}), "--context_method", "sequential"], capsys)
    assert code == 0


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(arguments, tmp_path, capsys):
    """SIGKILL in the middle, then `--resume_from_checkpoint last`: the losses of the run that was not killed."""
    steps = {"max_steps": 40, "save_steps": 2, "lr_scheduler_type": "constant", "learning_rate": "1e-3"}
    options = {**arguments, **steps, "output_dir": str(tmp_path / "killed"), "save_total_limit": 2}
    command = ["train", *flags(options), "--resume_from_checkpoint", "last"]
    kill_command(command, lambda: any((tmp_path / "killed").glob("checkpoint-*/trainer_state.json")))
    assert not (tmp_path / "killed" / "config.json").exists()
    assert run(command, capsys)[0] == 0
    assert run(["train", *flags({**arguments, **steps})], capsys)[0] == 0
    assert [e["loss"] for e in history(tmp_path / "killed")] == [e["loss"] for e in history(arguments["output_dir"])]


def train(rank, folder, options):
    assert main(["train", *flags(options)]) == 0


def launch(folder, options):
    """As the README does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "selfgen"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "train", *flags(options)], cwd=ROOT, env=environment, check=True, capture_output=True)


@pytest.mark.parametrize(
    "start", [partial(in_ranks, train), pytest.param(launch, marks=pytest.mark.slow)], ids=["forked", "launched"]
)
def test_data_parallel_training(arguments, tmp_path, capsys, start):
    """Two processes with half the batch each train as one process does: a row's context knows nothing of ranks."""
    half = {**arguments, "output_dir": str(tmp_path / "ddp"), "per_device_train_batch_size": 2, "learning_rate": "1e-2"}
    start(tmp_path, half)
    whole = {**arguments, "per_device_train_batch_size": 4, "learning_rate": "1e-2"}
    assert run(["train", *flags(whole)], capsys)[0] == 0
    losses = [[e["loss"] for e in history(folder)] for folder in (half["output_dir"], whole["output_dir"])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_half_written_checkpoint_is_passed_over(arguments, capsys):
    """A kill while a checkpoint is being saved leaves a folder without a whole trainer_state.json."""
    assert run(["train", *flags(arguments), "--save_steps", "1"], capsys)[0] == 0
    out = Path(arguments["output_dir"])
    (out / "checkpoint-3" / "trainer_state.json").write_text('{"global_st')
    (out / "checkpoint-9").mkdir()
    losses = [e["loss"] for e in history(out)]
    assert run(["train", *flags(arguments), "--resume_from_checkpoint", "last"], capsys)[0] == 0
    assert [e["loss"] for e in history(out)] == losses


def test_refusal_happens_before_the_data_is_touched(arguments, monkeypatch, capsys):
    monkeypatch.setattr("selfgen.cli.train.load_rows", lambda *a, **k: pytest.fail("must not read the data"))
    assert run(["train", *flags({**arguments, "self_prob": "3"})], capsys)[0] == 2
