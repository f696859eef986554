"""The command line of RAC: training on corrections, answering and correcting, going on after a kill."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from datasets import Dataset
from helpers.cli import flags, history, run
from helpers.data import ROWS, TEMPLATE, make_tokenizer, read_jsonl, write_jsonl

from selfgen.cli.journal import Journal

RAC = {"method": "rac", "max_new_tokens": 5, "correction_cue": "a b"}


@pytest.fixture(scope="module")
def chat(model_dir, tmp_path_factory):
    """The tiny checkpoint with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(model_dir, folder)
    make_tokenizer(TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture
def correcting(arguments, chat):
    """Arguments of ``selfgen train --method rac``."""
    return arguments | RAC | {"model": str(chat)}


def test_train_rac(correcting, capsys):
    code, out, err = run(["train", *flags(correcting)], capsys)
    assert code == 0, err
    assert correcting["output_dir"] in out
    logs = history(correcting["output_dir"])
    assert len(logs) == 3
    assert logs[0]["self_share"] == 0  # the correction's context is the reference
    assert logs[0]["context_seconds"] > 0  # own answers were made


def test_train_rac_from_a_file(correcting, tmp_path, capsys):
    file = tmp_path / "rac.yaml"
    file.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in correcting.items()))
    code, _, err = run(["train", str(file), "--self_prob", "0.5"], capsys)
    assert code == 0, err
    assert history(correcting["output_dir"])[0]["self_share"] > 0


def test_options_of_rac_are_those_of_rac(arguments, capsys):
    code, out, _ = run(["train", "--method", "rac", "--help"], capsys)
    assert code == 0
    assert "--correction-cue" in out
    code, _, err = run(["train", *flags(arguments), "--correction_cue", "a"], capsys)
    assert code == 2
    assert "correction_cue" in err


@pytest.fixture
def generation(chat, tmp_path):
    file = tmp_path / "test.jsonl"
    write_jsonl(file, ROWS * 6)
    return {
        "model": str(chat),
        "dataset": str(file),
        "output_file": str(tmp_path / "answers.jsonl"),
        "max_new_tokens": 6,
        "chunk_rows": 5,
        "use_cpu": True,
    }


def lines(arguments) -> list[dict]:
    return read_jsonl(arguments["output_file"])


def test_generate(generation, capsys):
    code, out, err = run(["generate", *flags(generation)], capsys)
    assert code == 0, err
    assert generation["output_file"] in out
    found = lines(generation)
    assert [row["sample_id"] for row in found] == list(range(12))
    assert found[0].keys() == {"sample_id", "prompt", "completion", "own_answer", "finished"}
    assert found[0]["completion"] == "c d"
    assert found[0]["own_answer"] == found[2]["own_answer"]  # greedy, the same prompt


@pytest.mark.slow
def test_answers_that_do_not_depend_on_their_batch(generation, tmp_path, capsys):
    code, _, err = run(["generate", *flags(generation), "--context-precision", "invariant"], capsys)
    assert (code, "is for bf16 and fp16" in err) == (2, True)
    found = []
    for batch_size in (1, 7):
        given = generation | {"output_file": str(tmp_path / f"{batch_size}.jsonl"), "batch_size": batch_size}
        given |= {"dtype": "bfloat16", "context_precision": "invariant", "temperature": 1}
        code, _, err = run(["generate", *flags(given)], capsys)
        assert code == 0, err
        found.append(lines(given))
    assert found[0] == found[1]
    assert "'x'" in run(["generate", *flags(generation), "--context-precision", "x"], capsys)[2]


def test_generate_corrected(generation, capsys):
    code, _, err = run(["generate", "--correct", *flags(generation)], capsys)
    assert code == 0, err
    assert all(isinstance(row["corrected"], str) for row in lines(generation))


def test_options_of_corrections_go_with_them(generation, capsys):
    for option in ({"rounds": 2}, {"correction_cue": "Again"}):
        code, _, err = run(["generate", *flags(generation | option)], capsys)
        assert code == 2
        assert "need --correct" in err


def test_prompts_need_no_references(generation, capsys):
    run(["generate", *flags(generation)], capsys)
    write_jsonl(Path(generation["dataset"]), [{"prompt": row["prompt"]} for row in ROWS * 6])
    other = generation | {"output_file": generation["output_file"] + "l"}
    code, _, err = run(["generate", *flags(other)], capsys)
    assert code == 0, err
    assert [row["own_answer"] for row in lines(other)] == [row["own_answer"] for row in lines(generation)]
    assert "completion" not in lines(other)[0]


@pytest.mark.parametrize("blank", ["", None])
@pytest.mark.parametrize("kept", [0, 1])
def test_references_may_be_blank(generation, capsys, blank, kept):
    """As in the test split of a data set whose labels are not public."""
    run(["generate", *flags(generation)], capsys)
    rows = [row | {"completion": row["completion"] if place < kept else blank} for place, row in enumerate(ROWS * 6)]
    write_jsonl(Path(generation["dataset"]), rows)
    other = generation | {"output_file": generation["output_file"] + "l"}
    code, _, err = run(["generate", *flags(other)], capsys)
    assert code == 0, err
    assert [row["own_answer"] for row in lines(other)] == [row["own_answer"] for row in lines(generation)]
    assert [row["completion"] for row in lines(other)] == [row["completion"] for row in rows]


@pytest.mark.parametrize(
    "completions",
    [
        [[], []],
        [None, [{"role": "assistant", "content": "b"}]],
        [[{"role": "assistant", "content": ""}], [{"role": "assistant", "content": "b"}]],
        [["b", "c"], ["d"]],
    ],
    ids=["no turns", "none", "an empty turn", "several references"],
)
def test_references_of_any_form_are_not_needed(generation, capsys, completions):
    turns = [[{"role": "user", "content": text}] for text in ("a", "a b")]
    rows = [{"prompt": turn, "completion": given} for turn, given in zip(turns, completions, strict=True)]
    Path(generation["dataset"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run(["generate", *flags(generation)], capsys)
    assert code == 0, err
    write_jsonl(Path(generation["dataset"]), [{"prompt": "a"}, {"prompt": "a b"}])
    other = generation | {"output_file": generation["output_file"] + "l"}
    assert run(["generate", *flags(other)], capsys)[0] == 0
    assert [row["own_answer"] for row in lines(other)] == [row["own_answer"] for row in lines(generation)]


def test_turns_before_the_answer_are_of_the_prompt(generation, capsys):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    answer = [{"role": "assistant", "content": "d"}]
    found = []
    for number, cut in enumerate((1, 3)):
        row = {"prompt": turns[:cut], "completion": turns[cut:] + answer}
        Path(generation["dataset"]).write_text(json.dumps(row) + "\n")
        one = generation | {"output_file": f"{generation['output_file']}{number}"}
        assert run(["generate", *flags(one)], capsys)[0] == 0
        found.append(lines(one)[0]["own_answer"])
    assert found[0] == found[1]


def test_columns_that_json_does_not_have_are_kept_as_text(generation, tmp_path, capsys):
    file = tmp_path / "test.parquet"
    Dataset.from_list([row | {"when": datetime(2020, 1, 2)} for row in ROWS]).to_parquet(file)
    code, _, err = run(["generate", *flags(generation | {"dataset": str(file)})], capsys)
    assert code == 0, err
    assert [row["when"] for row in lines(generation)] == ["2020-01-02 00:00:00"] * 2


def test_written_answers_are_data_for_rac(generation, correcting, capsys):
    run(["generate", *flags(generation)], capsys)
    asked = correcting | {"dataset": generation["output_file"], "own_answer": "column"}
    code, _, err = run(["train", *flags(asked)], capsys)
    assert code == 0, err
    assert len(history(correcting["output_dir"])) == 3


def test_conversations_may_end_with_a_question(generation, capsys):
    question = [{"role": "user", "content": "a"}]
    rows = [{"messages": question}, {"messages": [*question, {"role": "assistant", "content": "b"}]}]
    Path(generation["dataset"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(["generate", *flags(generation)], capsys)[0] == 0
    answers = [row["own_answer"] for row in lines(generation)]
    assert len(answers) == 2
    assert answers[0] == answers[1]


def test_the_name_of_a_folder_is_no_setting(generation, capsys, monkeypatch):
    assert run(["generate", *flags(generation)], capsys)[0] == 0
    monkeypatch.chdir(Path(generation["model"]).parent)
    code, _, err = run(["generate", *flags(generation | {"model": f"./{Path(generation['model']).name}"})], capsys)
    assert code == 0, err


@pytest.mark.parametrize("kept", [0, 5, 7])
def test_a_killed_generation_goes_on(generation, kept, capsys):
    """With half a line at its end, too; no row twice, none missing."""
    run(["generate", *flags(generation)], capsys)
    whole = lines(generation)
    content = "".join(json.dumps(row) + "\n" for row in whole[:kept]) + json.dumps(whole[kept])[:20]
    with open(generation["output_file"], "w") as file:
        file.write(content)
    code, _, err = run(["generate", *flags(generation)], capsys)
    assert code == 0, err
    assert lines(generation) == whole


def test_other_settings_need_another_file(generation, capsys):
    run(["generate", *flags(generation)], capsys)
    before = lines(generation)
    code, _, err = run(["generate", *flags(generation | {"temperature": 0.5})], capsys)
    assert code == 2
    assert "temperature" in err
    assert lines(generation) == before
    assert run(["generate", *flags(generation | {"batch_size": 2})], capsys)[0] == 0  # changes no answer


def test_answers_of_other_noise_need_another_file(generation, capsys, monkeypatch):
    run(["generate", *flags(generation)], capsys)
    monkeypatch.setattr("selfgen.cli.generate.NOISE_VERSION", 3)
    code, _, err = run(["generate", *flags(generation)], capsys)
    assert (code, "noise_version was 2, is 3" in err) == (2, True), err


def test_a_journal_keeps_whole_lines(tmp_path):
    journal = Journal(tmp_path / "rows.jsonl", {"a": 1})
    rows = Dataset.from_list([{"x": 1}, {"x": 2}, {"x": 3}])
    journal.complete(rows.select(range(2)), 1, lambda part, _: part, "Rows")
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"x": ')
    again = Journal(tmp_path / "rows.jsonl", {"a": 1})
    again.complete(rows, 1, lambda part, _: part, "Rows")
    assert again.rows() == [{"x": 1}, {"x": 2}, {"x": 3}]
    with pytest.raises(ValueError, match="other settings"):
        Journal(tmp_path / "rows.jsonl", {"a": 2})
