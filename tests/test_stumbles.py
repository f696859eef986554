"""What newcomers stumbled over: it is refused before weights are loaded, leaves nothing, and says what to do."""

from __future__ import annotations

import io
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers as t
from datasets import Dataset
from helpers.cli import flags, refused, run
from helpers.data import WORDS, make_tokenizer, read_jsonl, write_jsonl
from models import tiny_model

from selfgen import answer, generate_corrected
from selfgen.cli import main
from selfgen.cli.generate import GenerateArguments
from selfgen.cli.help import known_help
from selfgen.cli.options import make_parser, parse
from selfgen.data import DataError, DataReport, RowOptions, load_rows, loading
from selfgen.evaluation.inspection import TokenTexts
from selfgen.evaluation.report import table
from selfgen.training.config import BSSConfig
from selfgen.training.metrics import METRICS, counted

COMMANDS = ("train", "contexts", "generate", "eval", "inspect")


@pytest.fixture
def options(arguments) -> dict[str, dict]:
    """Few and quick arguments of each command, by its name; what it writes is in a folder that is not there."""
    common = {name: arguments[name] for name in ("model", "dataset", "max_length", "use_cpu")}
    out = Path(arguments["output_dir"]) / "deep"
    return {
        "train": arguments | {"output_dir": out, "max_steps": 1},
        "contexts": common | {"output_dir": out},
        "generate": common | {"output_file": out / "answers.jsonl", "max_new_tokens": 2},
        "eval": common | {"output_dir": out, "metrics": "loss", "limit": 4},
        "inspect": common | {"output_file": out / "inspect.html", "max_new_tokens": 2},
    }


@pytest.fixture
def no_weights(monkeypatch):
    """Weights must not be loaded."""
    monkeypatch.setattr("selfgen.cli.options.auto_class_of", lambda *_, **__: pytest.fail("loads weights"))


def refused_at_once(command: str, given: dict, capsys, said: bool = False) -> str:
    """The line of the error; nothing is left where the output should go."""
    line = refused([command, *flags(given)], capsys, said)
    place = Path(given.get("output_dir") or given["output_file"]).parents
    assert not any(one.name == "out" and one.exists() for one in place)
    return line


def write_rows(folder: Path, *columns: str) -> Path:
    write_jsonl(folder / "rows.jsonl", [dict.fromkeys(columns, "a") for _ in range(4)])
    return folder / "rows.jsonl"


@pytest.mark.parametrize("command", COMMANDS)
def test_columns_are_looked_for_before_weights_are_loaded(options, no_weights, command, tmp_path, capsys):
    rows = write_rows(tmp_path, "question", "answer")
    line = refused_at_once(command, options[command] | {"dataset": rows}, capsys)
    assert "the data set has the columns question, answer, but no 'prompt' (prompt_column)" in line
    assert line.endswith(
        f"give --prompt-column question{'' if command == 'generate' else ' --completion-column answer'}"
    )


@pytest.mark.parametrize(
    ("columns", "given", "said"),
    [
        (["prompt", "answer"], {}, "no 'completion' (completion_column) of texts"),
        (["prompt", "answer"], {}, "give --completion-column answer"),
        (
            ["question", "answer"],
            {"prompt_column": "asked"},
            "give --prompt-column question --completion-column answer",
        ),
        (["id", "conversations"], {}, "to read another column as such, give --messages-column conversations"),
        (["one", "two"], {"prompt_column": "a", "completion_column": "b"}, "no 'a' (prompt_column) and no 'b' "),
        (["one", "two"], {}, "by --prompt-column NAME --completion-column NAME, or by --messages-column NAME"),
        (["prompt", "two"], {}, "by --completion-column NAME, or by --messages-column NAME"),
        (["one", "two", "messages"], {"prompt_column": "on"}, "with prompt_column given: say which column to read by"),
        (
            ["one", "two", "messages"],
            {"prompt_column": "one"},
            "no 'completion' (completion_column), with prompt_",
        ),
        (["messages"], {"completion_column": "two"}, "leave completion_column out, to read the conversations of 'mess"),
    ],
)
def test_the_error_of_columns_says_what_to_give(columns, given, said):
    rows = Dataset.from_list([dict.fromkeys(columns, "a")])
    with pytest.raises(DataError) as error:
        RowOptions(**given).check_columns(rows)
    assert f"the columns {', '.join(columns)}" in str(error.value)
    assert said in str(error.value)
    assert not any(f"{name.replace('_', '-')} {value}" in str(error.value) for name, value in given.items())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"eval_strategy": "steps"}, "there is no evaluation data"),
        ({"eval_dataset": "{rows}"}, "eval data: the data set has the columns one"),
        ({"eval_dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"kl_model": "nowhere/at/all", "kl_weight": 1}, "there is no folder 'nowhere/at/all'"),
        (
            {"method": "rac", "own_answer": "column"},
            "no column 'own_answer' with own answers (it has prompt, completion)",
        ),
        ({"method": "bash", "eval_dataset": "{rows}"}, "eval data: the data set has the columns one"),
        ({"method": "bash", "contexts": "nowhere", "dataset": None}, "nowhere"),
    ],
)
def test_what_training_lacks_is_told_before_weights_are_loaded(options, no_weights, more, said, tmp_path, capsys):
    rows = write_rows(tmp_path, "one")
    more = {name: rows if value == "{rows}" else value for name, value in more.items()}
    given = {name: value for name, value in (options["train"] | more).items() if value is not None}
    assert said in refused_at_once("train", given, capsys)


@pytest.mark.parametrize(
    ("command", "file", "said"),
    [
        ("generate", "answers.jsonl", "selfgen did not write"),
        ("eval", "losses.jsonl", "selfgen did not write"),
        ("eval", "results.json", "selfgen eval did not write"),
        ("generate", "answers.jsonl/", "is a folder"),
        ("inspect", "inspect.html", "selfgen inspect did not write"),
    ],
)
def test_other_files_are_seen_before_weights_are_loaded(options, no_weights, command, file, said, capsys):
    given = options[command]
    folder = Path(given.get("output_dir") or given["output_file"].parent)
    folder.mkdir(parents=True)
    (folder / file).mkdir() if file.endswith("/") else (folder / file).write_text("mine\n")
    assert said in refused([command, *flags(given)], capsys)
    assert [one.name for one in folder.iterdir()] == [Path(file).name]


def test_other_settings_are_seen_before_weights_are_loaded(options, request, capsys):
    given = options["generate"]
    assert run(["generate", *flags(given)], capsys)[0] == 0
    request.getfixturevalue("no_weights")
    assert "temperature was 0.0, is 0.5" in refused(["generate", *flags(given | {"temperature": 0.5})], capsys)


@pytest.mark.parametrize("command", ["train", "contexts", "eval"])
def test_a_refused_model_leaves_nothing(options, command, tmp_path, capsys):
    folder = tmp_path / "bloom"
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "n_layer": 1, "n_head": 2}
    t.BloomForCausalLM(t.BloomConfig(**sizes)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    given = options[command] | {"model": folder} | ({"self_prob": 0.5} if command == "train" else {})
    assert "positions that can't be given" in refused_at_once(command, given, capsys, said=command == "train")


def test_an_evaluation_has_one_bar_per_file(options, capsys, terminal):
    code, _, err = run(["eval", *flags(options["eval"] | {"metrics": "exact_match", "max_new_tokens": 2})], capsys)
    assert code == 0
    assert len(re.findall(r"Answers: +0%", err)) == 1
    assert "4/4" in err


@pytest.mark.parametrize("rounds", [0, 2])
def test_every_row_is_told_once_when_it_is_done(rounds):
    told: list[int] = []
    how = {"max_new_tokens": 3, "progress": lambda: told.append(1)}
    model, prompts = tiny_model("llama"), [[5, 6], [7], [8]]
    if rounds:
        generate_corrected(model, make_tokenizer(), prompts, rounds=rounds, cue="a", **how)
    else:
        answer(model, prompts, **how)
    assert len(told) == 3


def test_fields_without_a_value_are_left_out(options, tmp_path, capsys):
    """Whole texts are compared where the reference has no answer of its own. Of the user's columns all stay."""
    write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "x": 1}]
    )
    more = {"dataset": tmp_path / "rows.jsonl", "max_new_tokens": 2}
    given = {command: options[command] | more for command in ("eval", "generate")}
    assert run(["eval", *flags(given["eval"] | {"metrics": "exact_match"})], capsys)[0] == 0
    fields = ["sample_id", "prompt", "reference", "generated", "generated_right", "finished"]
    assert [list(line) for line in read_jsonl(given["eval"]["output_dir"] / "answers.jsonl")] == [fields] * 2
    given["generate"]["output_file"] = tmp_path / "answers.jsonl"
    assert run(["generate", *flags(given["generate"])], capsys)[0] == 0
    lines = read_jsonl(tmp_path / "answers.jsonl")
    assert [line["x"] for line in lines] == [None, 1]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["tarin"], "unknown command 'tarin'; did you mean 'train'? accepted: train, contexts"),
        (["train"], "arguments are required: --model, --output-dir, --dataset"),
        (["train", "--contexts", "c"], "arguments are required: --model, --output-dir"),
        (["train", "{file}"], "arguments are required: --model, --output-dir"),
        (["eval", "--modle", "m"], "unknown option '--modle'; did you mean '--model'?"),
        (["train", "--learning-rat", "1e-5"], "unknown option '--learning-rat'; did you mean '--learning-rate'?"),
        (["doctor", "--weight"], "unknown argument '--weight'; did you mean '--weights'?"),
        (["train", "--output-dri=o"], "unknown option '--output-dri'; did you mean '--output-dir'?"),
        (["doctor", "--wieghts"], "unknown argument '--wieghts'; did you mean '--weights'?"),
    ],
)
def test_what_is_mistyped_or_missing_is_named(typed, said, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text("dataset: rows.jsonl\n")
    code, _, err = run([one.format(file=file) for one in typed], capsys)
    assert code == 2
    assert said in err
    assert "required" not in said or err.rstrip().endswith(said)


def test_a_value_may_begin_with_dashes():
    """Where it is more than one word, as no option is."""
    parser = make_parser((GenerateArguments,), prog="x", usage="x", description="x")
    flags = ["--output-file", "f", "--correct", "--correction-cue", "-- Look again.", "--rounds", "2"]
    (found,) = parse(parser, flags)
    assert (found.correction_cue, found.rounds) == ("-- Look again.", 2)


def test_lines_of_the_doctor_fit_the_terminal(monkeypatch, capsys):
    for part in ("_versions", "_devices", "_exactness", "_cost"):
        monkeypatch.setattr(f"selfgen.cli.doctor.{part}", lambda: iter(()))
    monkeypatch.setenv("COLUMNS", "70")
    code, out, _ = run(["doctor"], capsys)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 70
    assert "cpu, by " in out


def test_a_report_that_fails_costs_no_training(options, monkeypatch, capsys, caplog):
    def fails(*_, **__):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("selfgen.cli.train.write_report", fails)
    given = options["train"] | {"report": True}
    assert run(["train", *flags(given)], capsys)[0] == 0
    assert "there is no report: RuntimeError: no fonts" in caplog.text
    assert (given["output_dir"] / "model.safetensors").exists()


def test_stored_contexts_wait_for_no_loss_to_settle(options, capsys, caplog):
    contexts = options["contexts"]["output_dir"].with_name("contexts")
    assert run(["contexts", *flags(options["contexts"] | {"output_dir": contexts})], capsys)[0] == 0
    given = options["train"] | {"method": "bash", "contexts": contexts, "dataset": None}
    given = {name: value for name, value in given.items() if value is not None and name != "self_prob"}
    code, out, err = run(["train", *flags(given)], capsys)
    assert code == 0
    assert "contexts will be mixed" not in out + err + caplog.text


def test_rows_and_tokens_count_from_one(options, capsys):
    code, out, _ = run(["inspect", *flags(options["inspect"] | {"rows": 2})], capsys)
    assert code == 0
    assert "Row 1 (sample_id 0)" in out
    assert "Row 2 (sample_id 1)" in options["inspect"]["output_file"].read_text()


def test_a_pipe_that_lacks_signs_breaks_nothing(options, monkeypatch):
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", pipe)
    assert main(["inspect", *flags(options["inspect"] | {"rows": 1})]) == 0
    pipe.flush()
    assert b"the page is in" in pipe.buffer.getvalue()


def test_pieces_of_a_byte_tokenizer_can_be_read():
    tokenizer = t.ByT5Tokenizer()
    texts = TokenTexts(tokenizer)
    assert [texts.of(one).text for one in tokenizer("a é", add_special_tokens=False).input_ids] == [
        "a",
        "␣",
        "C3",
        "A9",
    ]
    assert texts.of(tokenizer.convert_tokens_to_ids(chr(0x80))).text == "80"


def test_a_hub_that_is_silent_is_asked_once(monkeypatch, capsys, caplog):
    asked = []

    def ask(url, timeout):
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading.datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading, "get_hf_file_metadata", ask)
    with pytest.raises(FileNotFoundError, match=r"can't be reached \(no network\).*local file, or set HF_HOME"):
        load_rows("nobody/nothing")
    assert len(asked) == 1
    assert "Retrying" not in caplog.text + capsys.readouterr().err
    assert not loading.constants.HF_HUB_OFFLINE


def shown(command: str) -> str:
    """The help of a command, as one line."""
    return " ".join((known_help(command, ["--help"]) or "").split())


@pytest.mark.parametrize("command", ["eval", "inspect"])
def test_the_default_temperature_is_not_that_of_every_training(command, tmp_path):
    told = "0.7 is that of training without --self-prob; give 1 for a model that was trained with a number for it."
    assert told in shown(command)
    used = [BSSConfig(str(tmp_path), use_cpu=True, **p).sampling_temperature for p in ({}, {"self_prob": 0.25})]
    assert used == [0.7, 1.0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_no_option_of_which_one_value_is_accepted(command, options, no_weights, capsys):
    """All turns are for training alone."""
    trains = command == "train"
    assert ("--assistant-turns" in shown(command)) == trains
    if not trains:
        line = refused_at_once(command, options[command] | {"assistant_turns": "all"}, capsys)
        assert "assistant_turns=all" in line


def test_the_log_and_the_table_say_what_a_loss_is_of():
    assert "under mixed contexts" in METRICS["loss"].says
    bucket = {"first": 0, "last": 1, "tokens": 3, "reference": 2.5, "own": 3.0, "gap": 0.5}
    head, line = table({"curve": [bucket]}).splitlines()[1:]
    assert head.split()[-3:] == ["reference", "self", "difference"]  # which is in nats, as no gap is
    assert line.split()[-3:] == ["2.5000", "3.0000", "0.5000"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optim": "adamw_bnb_8bit"}, "optim is 'adamw_bnb_8bit', whose package is missing: install it, or leave"),
        ({"optim": "grokadamw"}, "optim is 'grokadamw', whose package is missing"),
        ({"dtype": "float16"}, "dtype is 'float16', in which small updates are rounded away: leave --dtype out"),
        ({"dtype": "half"}, "dtype is 'half'; accepted: auto, float32, bfloat16"),
    ],
)
def test_what_can_not_train_is_told_before_weights_are_loaded(options, no_weights, given, said, capsys):
    if any(map(find_spec, ("bitsandbytes", "grokadamw"))) and "optim" in given:
        pytest.skip("the package is installed")
    line = refused_at_once("train", options["train"] | given, capsys)
    assert said in line
    assert "float16," not in line.replace("bfloat16", "")  # which is not offered


def test_an_optimizer_that_needs_the_model_is_not_refused(tmp_path, monkeypatch):
    def make(_):
        raise ValueError("You need to pass a model to initialize it")

    monkeypatch.setattr(t.Trainer, "get_optimizer_cls_and_kwargs", make)
    BSSConfig(str(tmp_path), use_cpu=True)


@pytest.mark.parametrize("command", ["train", "eval"])
def test_attention_that_can_not_run_is_told_with_what_to_do(options, command, monkeypatch, capsys):
    def load(*_, **__):
        raise ImportError("FlashAttention2 has been toggled on")

    monkeypatch.setattr("selfgen.cli.pretrained.load_whole", load)
    line = refused([command, *flags(options[command] | {"attn_implementation": "flash_attention_2"})], capsys)
    assert "attn_implementation is 'flash_attention_2', which can't run here: leave --attn-implementation out, " in line
    assert "or install flash-attn (NVIDIA GPUs) (FlashAttention2 has been" in line


def test_one_thing_is_one_thing(options, caplog, capsys):
    """In the lines that begin a training of one step, and in those of data."""
    assert [counted(number, "row") for number in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert str(DataReport(1, 1, 1, {}, 8)) == "1 row: 1 kept, 1 answer truncated to 8 tokens"
    assert "training: 1 step of 8 rows" in run(["train", *flags(options["train"])], capsys)[1]
