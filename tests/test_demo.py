"""The demo's promises: what it prints is measured, its checkpoints are ordinary ones, and no process outlives it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import side
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import demo
from examples.demo import Show, chosen, first_slip, tokenizer_of, verdict
from examples.side_by_side import Failed, side_by_side
from selfgen import MixedContext, cli
from selfgen.context import ContextStats
from selfgen.evaluation import Gap
from tools import real_parts

ROOT = Path(__file__).parents[1]
SMALL = ["--steps", "20", "--batch", "4", "--words", "8", "--held-out", "16", "--width", "32", "--layers", "1"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(folder, what was printed, figures) of a small demo, whose runs were trained one after the other."""
    folder = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *texts, **_: printed.extend(map(str, texts)))
        try:
            assert demo.main([*SMALL, "--processes", "1", "--output-dir", str(folder)]) == 0
        finally:
            torch.set_num_threads(threads)
    return folder, "\n".join(printed), json.loads((folder / "demo.json").read_text())


def test_figures_are_those_measured(ran):
    folder, out, figures = ran
    runs = figures["results"]
    assert list(runs) == ["SFT", "BSS"]
    for run in runs.values():
        assert [point["step"] for point in run["points"]] == [0, 2, 5, 8, 10, 12, 15, 18, 20]
        last, gap = run["points"][-1], run["gap"]
        assert last["whole_answers"] == gap["whole_answers"]["value"]
        assert all(last[key] == gap[key] for key in ("under_references", "running_freely"))
        for key, text in demo.MEASURES.items():
            assert f"{last[key]:.1%}" in re.search(f"^{text} .*$", out, re.MULTILINE)[0]
    assert runs["SFT"]["points"][0] == runs["BSS"]["points"][0]  # the same start
    assert runs["SFT"]["points"][-1] != runs["BSS"]["points"][-1]
    assert {entry["self_prob"] for entry in runs["SFT"]["log"]} == {0.0}
    assert (folder / "demo.png").stat().st_size > 10_000
    assert "\033" not in out
    assert max(len(line) for line in out.splitlines() if str(folder) not in line) <= demo.COLUMNS


@pytest.mark.parametrize("option", ["--steps", "--batch", "--words", "--held-out", "--width", "--layers"])
def test_sizes_that_there_can_not_be(tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        demo.main([option, "0", "--output-dir", str(tmp_path)])
    assert f"{option} is 0; it must be at least 1" in capsys.readouterr().err


def test_other_sizes_that_there_can_not_be(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--width", "17", "--output-dir", str(tmp_path)])
    assert demo.main(["--words", "5000", "--output-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "--width is 17; it must be a multiple of 16" in said
    assert re.search(r"--words is 5000, but hardly a text is so long \(the longest has \d+\): give fewer", said)


@pytest.mark.slow
def test_figures_can_be_measured_again(ran):
    """The table's figures are those of the checkpoint, which loads as any does."""
    folder, _, figures = ran
    model = AutoModelForCausalLM.from_pretrained(folder / "BSS")
    tokenizer = AutoTokenizer.from_pretrained(folder / "BSS")
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    right = total = 0
    for row in rows:
        prompt = tokenizer(row["prompt"], return_tensors="pt").input_ids
        reference = [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]
        free = model.generate(prompt, max_new_tokens=len(reference), do_sample=False)[0, prompt.shape[1] :].tolist()
        right += sum(a == b for a, b in zip(free, reference, strict=False))
        total += len(reference)
    assert figures["results"]["BSS"]["gap"]["running_freely"] == pytest.approx(right / total)


@pytest.mark.parametrize("name", ["SFT", "BSS"])
def test_scoring_leaves_the_training_as_it_is(ran, tmp_path, monkeypatch, name):
    """Weights are equal bit for bit with curves and without."""
    folder, _, _ = ran
    for part in ("start", "train.jsonl", "held_out.jsonl"):
        (tmp_path / part).symlink_to(folder / part)
    monkeypatch.setattr(demo.Curve, "_score", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    demo.train(name, demo.parse([*SMALL, "--output-dir", str(tmp_path)]), lambda _: None)
    weights = [load_file(one / name / "model.safetensors") for one in (folder, tmp_path)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    start = load_file(folder / "start" / "model.safetensors")
    assert not all(torch.equal(value, start[key]) for key, value in weights[0].items())


def test_rows_are_sorted_and_of_other_texts(ran):
    folder, _, _ = ran
    rows = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    }
    assert (len(rows["train"]), len(rows["held_out"])) == (80, 16)
    for row in (*rows["train"], *rows["held_out"]):
        *words, cue = row["prompt"].split()
        assert (cue, len(words)) == (demo.CUE, 8)
        assert row["completion"].split() == sorted(words)
    assert not {row["prompt"] for row in rows["train"]} & {row["prompt"] for row in rows["held_out"]}


def test_next_steps_run(ran, monkeypatch, capsys):
    folder, out, _ = ran
    monkeypatch.chdir(ROOT)
    commands = out[out.index("Next steps:\n") :].split("\n", 1)[1].replace("\\\n", " ").splitlines()
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)
        program = words.index(next(word for word in words if word in ("eval", "generate")))
        assert cli.main([*words[program:], "--use-cpu"]) == 0
    assert "your model " in capsys.readouterr().out
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 16


def counted(*right):
    """Rows of three tokens, of which so many are right running freely."""
    names = ("tokens", "right_under_references", "right_running_freely", "self_tokens", "self_tokens_right")
    return [dict(zip(names, (3, 3, one, 0, 0), strict=True)) for one in right]


def test_a_row_is_chosen_by_rule():
    place, why = chosen([counted(3, 2, 2, 1), counted(3, 1, 3, 3)])
    assert (place, why) == (
        2,
        "the first one where SFT slips and BSS does not (SFT alone slips in 2 of 4 rows, BSS alone in 0)",
    )
    place, why = chosen([counted(3, 2, 3), counted(3, 2, 1)])
    assert place == 2
    assert "the first one where BSS slips and SFT does not" in why
    assert chosen([counted(3, 1), counted(3, 0)])[0] == 0


@pytest.mark.parametrize(
    ("sft", "bss", "said"),
    [
        ((3, 1, 1), (3, 3, 1), "+22.2 points of tokens, +33.3 of whole answers. BSS wins."),
        ((3, 3, 1), (3, 1, 1), "-22.2 points of tokens, -33.3 of whole answers. SFT wins."),
        ((3, 0, 0), (2, 2, 2), "+33.3 points of tokens, -33.3 of whole answers. Neither wins both."),
        ((3, 0, 0), (3, 0, 0), "+0.0 points of tokens, +0.0 of whole answers. Neither wins both."),
    ],
)
def test_who_wins_is_what_was_measured(sft, bss, said):
    gaps = {"SFT": Gap.of(counted(*sft)), "BSS": Gap.of(counted(*bss))}
    assert verdict(gaps) == f"BSS minus SFT, running freely: {said}"


@pytest.mark.parametrize(
    ("found", "place"), [([5, 6, 1], None), ([5, 7, 1], 1), ([5], 1), ([5, 6, 1, 4], 3), ([], 0), ([6, 6, 1], 0)]
)
def test_first_slip(found, place):
    assert first_slip(found, [5, 6, 1]) == place


def test_slips_and_contexts_are_marked():
    """With colours on a terminal, and with plain markers elsewhere."""
    tokenizer = tokenizer_of(["a", "b", "c"])
    a, b, c, end = tokenizer.convert_tokens_to_ids(["a", "b", "c", demo.END])
    row = {"prompt_ids": [c, a], "answer_ids": [a, c, end]}
    plain, coloured = Show(tokenizer, colours=False), Show(tokenizer, colours=True)
    answers = {"right": [a, c, end], "slips": [a, b, b], "stops": [a, end], "goes on": [a, c, end, b], "cut": [a, c]}
    lines = dict(re.split(r" {2,}", line) for line in plain.answers(row, answers).splitlines())
    assert lines == {
        "prompt": "c a",
        "reference": "a c <end>",
        "right": "a c <end>",
        "slips": "a *b[c]* b",
        "stops": "a *<end>[c]*",
        "goes on": "a c <end> *b[nothing]*",
        "cut": "a c *(no end)[<end>]*",
    }
    assert "a \033[1;31mb[c]\033[0m b" in coloured.answers(row, answers)
    is_self = torch.tensor([False, True, True])
    mixed = MixedContext([torch.tensor([a, c, b])], [is_self], ContextStats.untouched([2], [3]))
    assert plain.context(mixed, row["answer_ids"]).split() == ["context", "a", "_c_", "*b[<end>]*"]
    assert coloured.context(mixed, row["answer_ids"]).endswith("a \033[32mc\033[0m \033[1;31mb[<end>]\033[0m")
    long = [(f"word{number}", "self" * (number % 2)) for number in range(60)]
    for show in (plain, coloured):
        text = re.sub(r"\033\[[0-9;]*m", "", show._paragraph("name", long))
        assert max(map(len, text.splitlines())) <= demo.COLUMNS
        assert len(text.split()) == 61


def test_colours_are_for_terminals(ran, monkeypatch, capsys):
    """And not where NO_COLOR is set; only what is shown of trained models is run again."""
    folder, _, _ = ran
    rows = counted(*[3] * 16)
    results = {name: {"rows": rows, "points": [], "log": [{"self_share": 0.0}], "seconds": 0.0} for name in demo.RUNS}
    monkeypatch.setattr(demo, "train_both", lambda _: results)
    monkeypatch.setattr(demo, "plot", lambda *_: None)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for no_colour in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_colour)
        assert demo.main([*SMALL, "--output-dir", str(folder)]) == 0
        assert ("\033[1;31m" in capsys.readouterr().out) == (not no_colour)


@pytest.mark.parametrize(
    ("error", "status", "told"), [(Failed("BSS failed: no luck"), 1, "no luck"), (KeyboardInterrupt(), 130, "stopped")]
)
def test_a_failure_has_a_status(tmp_path, monkeypatch, capsys, error, status, told):
    def fail(*_):
        raise error

    monkeypatch.setattr(demo, "side_by_side", fail)
    assert demo.main([*SMALL, "--processes", "2", "--output-dir", str(tmp_path)]) == status
    assert told in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Side by side


def test_results_and_what_is_told_come_in_order():
    told = {"one": [], "other": []}
    work = {"one": partial(side.counts, 3), "other": partial(side.counts, 5)}
    assert side_by_side(work, lambda name, message: told[name].append(message)) == {"one": 3, "other": 5}
    assert told == {"one": [0, 1, 2], "other": [0, 1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (side.fails, r"(?s)one failed:.*ValueError: no luck"),
        (side.ends, "one ended before it was done: exit status 3"),
        (side.killed, "one ended before it was done: SIGKILL"),
    ],
)
def test_a_failure_stops_the_other(function, message):
    pids = []
    started = time.monotonic()
    with pytest.raises(Failed, match=message):
        side_by_side({"one": function, "other": side.waits}, lambda _, pid: pids.append(pid))
    assert time.monotonic() - started < 50
    assert not any(map(is_running, pids))


def test_an_interrupt_stops_all():
    pids = []

    def told(name, pid):
        pids.append(pid)
        if len(pids) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side({"one": side.waits, "other": side.waits}, told)
    assert len(pids) == 2
    assert not any(map(is_running, pids))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_one_that_started_it(tmp_path, how):
    file = tmp_path / "pids"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.Popen([sys.executable, side.__file__, file], env=environment, stderr=subprocess.DEVNULL)
    wait_until(lambda: file.is_file() and len(file.read_text().splitlines()) == 2)
    process.send_signal(how)
    assert process.wait(20) != 0
    pids = [int(line) for line in file.read_text().splitlines()]
    wait_until(lambda: not any(map(is_running, pids)))


def wait_until(holds) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_bss_wins(tmp_path, seed):
    """The whole demo, as `make demo` runs it."""
    arguments = [sys.executable, "-m", "examples.demo", "--seed", str(seed), "--output-dir", str(tmp_path)]
    out = subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    sft, bss = (json.loads((tmp_path / "demo.json").read_text())["results"][name]["gap"] for name in ("SFT", "BSS"))
    assert sft["rows"] >= 100
    assert bss["running_freely"] > sft["running_freely"]
    assert bss["whole_answers"]["value"] > sft["whole_answers"]["value"]
    assert "BSS wins." in out


def test_a_killed_conversion_leaves_nothing_half_done(tmp_path, monkeypatch):
    """The converted model appears whole or not at all, and other processes' leftovers don't matter."""
    monkeypatch.setenv("SELFGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(real_parts.AutoTokenizer, "from_pretrained", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        real_parts.smollm2_path()
    assert list(tmp_path.iterdir()) == []
