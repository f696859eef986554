"""The demo: does training on own tokens help? Two small models learn to put words in alphabetical order, in minutes.

    python -m examples.demo            (or: make demo)

Both begin with the same random weights and see the same rows in the same order. SFT learns from references alone, BSS
with the default settings of selfgen from contexts that it has mixed with its own tokens. Held-out rows are scored along
the way, under references and running freely. Everything printed is measured in this run, whoever wins.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils import logging as transformers_logging

from selfgen import BSSConfig, BSSTrainer, ContextGenerator, MixedContext, answer
from selfgen.data import load_rows, tokenize_rows
from selfgen.evaluation import Gap, greedy_of, row_gaps
from selfgen.evaluation.gap import SELF_TEMPERATURE
from selfgen.files import write_json
from selfgen.provenance import versions
from tools.real_parts import common_words, passage, problem_statements, small_llama

from .side_by_side import Failed, Tell, side_by_side

RUNS: dict[str, dict[str, Any]] = {"SFT": {"self_prob": 0.0}, "BSS": {}}
"""What tells the two from each other; BSS with {} has the default settings."""

WORDS = 100  # that are common
PAD, END, UNKNOWN, CUE = "<pad>", "<end>", "<unknown>", "=>"
SHOWN_SELF_PROB = 0.5  # of the mixed context that is shown; at that of training, there is less to see
POINTS = 8  # of the curves, besides the one before training
COLUMNS, INDENT = 100, 11  # of what is printed


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    started = time.perf_counter()
    be_quiet()
    print(introduction(arguments), flush=True)
    try:
        rows = prepare(arguments)
        first = rows["train"][0]
        print(f"\n{paragraph('prompt', first['prompt'])}\n{paragraph('answer', first['completion'])}\n", flush=True)
        results = train_both(arguments)
        report(arguments, rows["held_out"], results)
    except Failed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print(f"total       {time.perf_counter() - started:.0f} s")
    print("\nNext steps:\n" + "\n".join(next_steps(Path(arguments.output_dir))))
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each run")
    parser.add_argument("--batch", type=int, default=32, help="rows per step")
    parser.add_argument("--words", type=int, default=20, help="words of a row")
    parser.add_argument("--held-out", type=int, default=400, help="held-out rows")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="learning rate of both runs, at its highest")
    parser.add_argument("--width", type=int, default=64, help="hidden size of the models, a multiple of 16")
    parser.add_argument("--layers", type=int, default=3, help="layers of the models")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, rows, order and contexts")
    parser.add_argument(
        "--processes",
        type=int,
        choices=(1, 2),
        default=min(2, os.cpu_count() or 1),
        help="2 trains both at once, on a core each, 1 one after the other; by default as many as there are cores",
    )
    parser.add_argument("--output-dir", default="outputs/demo", help="folder for rows, checkpoints, plot and figures")
    arguments = parser.parse_args(argv)
    for name in ("steps", "batch", "words", "held_out", "width", "layers"):
        if (value := getattr(arguments, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if arguments.width % 16:
        parser.error(f"--width is {arguments.width}; it must be a multiple of 16")
    return arguments


def be_quiet() -> None:
    """Leave out what the libraries below tell of their own: what is trained is small, and known."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


def introduction(arguments: argparse.Namespace) -> str:
    return (
        f"Two small models learn to put {arguments.words} words of a text in alphabetical order, from the same rows.\n"
        "SFT learns from right answers; BSS from answers in which some words are its own, right or wrong.\n"
        'Look at "running freely": there a model goes on from its own words, and a slip leads to another.'
    )


def paragraph(name: str, text: str) -> str:
    return textwrap.fill(text, COLUMNS, initial_indent=f"{name:{INDENT}}", subsequent_indent=" " * INDENT)


# ---------------------------------------------------------------------------------------------------------------------
# Rows and the start


def prepare(arguments: argparse.Namespace) -> dict[str, Dataset]:
    """Write the rows and the model that both runs begin with; held-out rows are of other texts."""
    out = Path(arguments.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    common, texts = common_words(problem_statements(), WORDS)
    longest = max(map(len, texts))
    texts = [text for text in texts if len(text) >= arguments.words]
    border = len(texts) * 9 // 10
    if not border:
        raise Failed(
            f"--words is {arguments.words}, but hardly a text is so long (the longest has {longest}): give fewer"
        )
    draw = random.Random(f"demo {arguments.seed}")
    rows = {
        "train": draw_rows(draw, texts[:border], arguments.steps * arguments.batch, arguments.words),
        "held_out": draw_rows(draw, texts[border:], arguments.held_out, arguments.words),
    }
    for name, part in rows.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    tokenizer = tokenizer_of(common)
    torch.manual_seed(arguments.seed)
    pad, end, cue = tokenizer.convert_tokens_to_ids([PAD, END, CUE])
    model = small_llama(len(tokenizer), arguments.width, arguments.layers, positions=1024, pad=pad, bos=cue, eos=end)
    model.save_pretrained(out / "start")
    tokenizer.save_pretrained(out / "start")
    return rows


def draw_rows(draw: random.Random, texts: list[list[str]], count: int, length: int) -> Dataset:
    """Rows as ``prompt``/``completion``: a passage of one of the texts, and its words in alphabetical order."""
    rows = []
    for _ in range(count):
        drawn = passage(draw, texts, length)
        rows.append({"prompt": " ".join([*drawn, CUE]), "completion": " ".join(sorted(drawn))})
    return Dataset.from_list(rows)


def tokenizer_of(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A token for each word."""
    vocabulary = {word: place for place, word in enumerate([PAD, END, UNKNOWN, CUE, *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train_both(arguments: argparse.Namespace) -> dict[str, Any]:
    """The results of both runs, which are trained at once or one after the other."""
    work = {name: partial(train, name, arguments) for name in RUNS}
    with Progress(arguments.steps) as progress:
        if arguments.processes > 1:
            return side_by_side(work, progress.told)
        return {name: run(partial(progress.told, name)) for name, run in work.items()}


class Progress:
    """A bar for each run; where there is no terminal, a line for each point of its curve."""

    def __init__(self, steps: int):
        self.is_terminal = sys.stderr.isatty()
        self.bars = {
            name: tqdm(total=steps, desc=name, position=place, ncols=COLUMNS, nrows=20, disable=not self.is_terminal)
            for place, name in enumerate(RUNS)
        }

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        for bar in self.bars.values():
            bar.close()

    def told(self, name: str, message: dict[str, Any]) -> None:
        if "running_freely" not in message:
            self.bars[name].update()
        elif self.is_terminal:
            self.bars[name].set_postfix_str(f"running freely {message['running_freely']:.0%}")
        else:
            print(
                f"{name}, step {message['step']:5}: {message['under_references']:4.0%} of tokens right under "
                f"references, {message['running_freely']:4.0%} running freely",
                flush=True,
            )


def train(name: str, arguments: argparse.Namespace, tell: Tell) -> dict[str, Any]:
    """Train a run, and save its model; returns its figures."""
    torch.set_num_threads(1)  # such small models are slower on more
    be_quiet()
    out = Path(arguments.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(out / "start")
    config = BSSConfig(
        str(out / name),
        **RUNS[name],
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, arguments.steps // 10),
        token_budget=2048,  # by default this and the next one are measured, which takes seconds
        balance=256,
        seed=arguments.seed,
        logging_steps=max(1, arguments.steps // 20),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = BSSTrainer(
        AutoModelForCausalLM.from_pretrained(out / "start"),
        config,
        train_dataset=load_rows(str(out / "train.jsonl")),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    held_out, _ = tokenize_rows(load_rows(str(out / "held_out.jsonl")), tokenizer, max_length=None)
    curve = Curve(trainer.generator, [*held_out], tell)
    trainer.add_callback(curve)
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started - curve.seconds
    trainer.save_model()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"points": curve.points, "rows": curve.rows, "log": log, "seconds": round(seconds, 1)}


class Curve(TrainerCallback):
    """Scores the held-out rows before the first step, along the way and at the end; the training goes on as without.

    ``rows`` has what was counted of each row at last, and ``seconds`` is what the scoring took, in processor time.
    """

    def __init__(self, generator: ContextGenerator, held_out: list[dict[str, Any]], tell: Tell):
        self.generator, self.greedy = generator, greedy_of(generator)
        self.held_out, self.tell = held_out, tell
        self.points: list[dict[str, float]] = []
        self.rows: list[dict[str, int]] = []
        self.seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._score(0)

    def on_step_end(self, args, state, control, **kwargs):
        self.tell({"step": state.global_step})
        if state.global_step in {round(point * state.max_steps / POINTS) for point in range(1, POINTS + 1)}:
            self._score(state.global_step)

    def _score(self, step: int) -> None:
        started = time.process_time()
        self.rows = row_gaps(self.generator, self.held_out, greedy=self.greedy, batch_size=100, answer_batch_size=400)
        gap = Gap.of(self.rows)
        self.points.append({"step": step, **shares(gap)})
        self.tell(self.points[-1])
        self.seconds += time.process_time() - started


def shares(gap: Gap) -> dict[str, float]:
    found = gap.to_dict()
    return {
        "under_references": found["under_references"],
        "running_freely": found["running_freely"],
        "whole_answers": found["whole_answers"]["value"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# What came out


def report(arguments: argparse.Namespace, held_out: Dataset, results: dict[str, Any]) -> None:
    """Print one held-out row as both models answer it, a mixed context of it, and the table; write figures and plot."""
    out = Path(arguments.output_dir)
    # As any checkpoints are loaded.
    models = {name: AutoModelForCausalLM.from_pretrained(out / name) for name in RUNS}
    tokenizer = AutoTokenizer.from_pretrained(out / "BSS")
    show = Show(tokenizer, colours=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    place, why = chosen([result["rows"] for result in results.values()])
    row = tokenize_rows(held_out, tokenizer, max_length=None)[0][place]
    prompts, references = [row["prompt_ids"]], [row["answer_ids"]]
    answers = {
        name: answer(model, prompts, max_new_tokens=len(references[0])).tokens[0].tolist()
        for name, model in models.items()
    }
    print(f"\nHeld-out row {place}: {why}.\n{show.legend_of_answers()}\n\n{show.answers(row, answers)}")
    mixed = ContextGenerator(models["BSS"], temperature=SELF_TEMPERATURE).contexts(
        prompts, references, SHOWN_SELF_PROB, seed=2, sample_ids=[row["sample_id"]]
    )
    print(f"\nA context of BSS for that row, mixed as in training, but with p = {SHOWN_SELF_PROB}, to see more of it:")
    print(f"{show.legend_of_context()}\n\n{show.context(mixed, references[0])}")

    gaps = {name: Gap.of(result["rows"]) for name, result in results.items()}
    print(f"\n{table(gaps, results)}\n\n{verdict(gaps)}")
    plot(results, out / "demo.png")
    write_json(out / "demo.json", record(arguments, results, gaps, place))
    print(f"\ncurves      {out / 'demo.png'}, {out / 'demo.json'}")
    print(f"checkpoint  {out / 'BSS'}, of which AutoModelForCausalLM and AutoTokenizer loaded what is above")


def chosen(counts: Sequence[Sequence[dict[str, int]]]) -> tuple[int, str]:
    """The place of the held-out row that is shown, and why it is: SFT slips there and BSS does not, if there is one."""
    sft, bss = ([row["right_running_freely"] == row["tokens"] for row in rows] for rows in counts)
    kinds = [(not a and b, a and not b) for a, b in zip(sft, bss, strict=True)]
    only_sft, only_bss = (sum(kind[which] for kind in kinds) for which in (0, 1))
    others = f"(SFT alone slips in {only_sft} of {len(kinds)} rows, BSS alone in {only_bss})"
    if only_sft:
        return kinds.index((True, False)), f"the first one where SFT slips and BSS does not {others}"
    if only_bss:
        return kinds.index((False, True)), f"the first one where BSS slips and SFT does not {others}"
    return 0, "the first one, as there is none where one of the two slips and the other does not"


class Show:
    """Answers and contexts as lines of at most COLUMNS characters, coloured or with plain markers."""

    CODES = {"self": "\033[32m", "differs": "\033[1;31m"}  # noqa: RUF012
    MARKS = {"self": "_{}_", "differs": "*{}*"}  # noqa: RUF012

    def __init__(self, tokenizer: PreTrainedTokenizerBase, colours: bool):
        self.tokenizer, self.colours = tokenizer, colours

    def legend_of_answers(self) -> str:
        return f"The {self._marked('first slip', 'differs')} is marked, with the reference in brackets."

    def legend_of_context(self) -> str:
        kinds = (
            ("reference token", ""),
            ("own token that equals the reference", "self"),
            ("own token that differs[reference]", "differs"),
        )
        return ", ".join(self._marked(text, kind) for text, kind in kinds)

    def answers(self, row: dict[str, Any], answers: dict[str, list[int]]) -> str:
        """The row, and each answer with its first slip marked."""
        reference = row["answer_ids"]
        lines = [
            paragraph("prompt", " ".join(self._words(row["prompt_ids"]))),
            paragraph("reference", " ".join(self._words(reference))),
        ]
        for name, found in answers.items():
            words = [(word, "") for word in self._words(found)]
            slip = first_slip(found, reference)
            if slip is not None:
                was = self._words(found[slip : slip + 1]) or ["(no end)"]
                expected = self._words(reference[slip : slip + 1]) or ["nothing"]
                words[slip : slip + 1] = [(f"{was[0]}[{expected[0]}]", "differs")]
            lines.append(self._paragraph(name, words))
        return "\n".join(lines)

    def context(self, mixed: MixedContext, reference: list[int]) -> str:
        """A context, by where its tokens come from."""
        words = []
        for token, is_self, expected in zip(
            self._words(mixed.tokens[0].tolist()), mixed.is_self[0].tolist(), self._words(reference), strict=True
        ):
            differs = token != expected
            words.append((f"{token}[{expected}]" if differs else token, "differs" if differs else "self" * is_self))
        return self._paragraph("context", words)

    def _words(self, ids: list[int]) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(ids)

    def _marked(self, text: str, kind: str) -> str:
        if not kind:
            return text
        return f"{self.CODES[kind]}{text}\033[0m" if self.colours else self.MARKS[kind].format(text)

    def _paragraph(self, name: str, words: list[tuple[str, str]]) -> str:
        lines, length = [f"{name:{INDENT}}"], INDENT
        for text, kind in words:
            width = len(text) + 1 + 2 * bool(kind)
            if length + width > COLUMNS:
                lines.append(" " * INDENT)
                length = INDENT
            lines[-1] += self._marked(text, kind) + " "
            length += width
        return "\n".join(line.rstrip() for line in lines)


def first_slip(found: Sequence[int], reference: Sequence[int]) -> int | None:
    """The first place where the two differ, or where one has ended; None if they are equal."""
    for place, (one, other) in enumerate(zip(found, reference, strict=False)):
        if one != other:
            return place
    return None if len(found) == len(reference) else min(len(found), len(reference))


MEASURES = {
    "under_references": "tokens right under references",
    "running_freely": "tokens right running freely",
    "whole_answers": "whole answers right running freely",
}


def table(gaps: dict[str, Gap], results: dict[str, Any]) -> str:
    found = {name: shares(gap) for name, gap in gaps.items()}
    count = len(next(iter(gaps.values())).tokens)
    lines = [f"{f'{count} held-out rows':40}" + "".join(f"{name:>12}" for name in gaps)]
    lines += [f"{text:40}" + "".join(f"{one[key]:12.1%}" for one in found.values()) for key, text in MEASURES.items()]
    lines.append(f"{'points lost by running freely':40}" + "".join(f"{gap.points:12.1f}" for gap in gaps.values()))
    own = "".join(f"{mean_of(result['log'], 'self_share'):12.1%}" for result in results.values())
    lines.append(f"{'own tokens in the contexts of training':40}{own}")
    seconds = "".join(f"{result['seconds']:12.0f}" for result in results.values())
    return "\n".join([*lines, f"{'processor seconds of training':40}{seconds}"])


def mean_of(log: Sequence[dict[str, Any]], key: str) -> float:
    return sum(entry[key] for entry in log) / len(log)


def verdict(gaps: dict[str, Gap]) -> str:
    """Who is better when it runs freely, as measured."""
    sft, bss = (shares(gaps[name]) for name in ("SFT", "BSS"))
    tokens, answers = (round(100 * (bss[key] - sft[key]), 1) for key in ("running_freely", "whole_answers"))
    if tokens > 0 and answers > 0:
        winner = "BSS wins"
    elif tokens < 0 and answers < 0:
        winner = "SFT wins"
    else:
        winner = "Neither wins both"
    return f"BSS minus SFT, running freely: {tokens:+.1f} points of tokens, {answers:+.1f} of whole answers. {winner}."


def plot(results: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True, layout="constrained")
    for axis, (key, title) in zip(axes, MEASURES.items(), strict=True):
        for name, result in results.items():
            points = result["points"]
            steps, values = ([point[one] for point in points] for one in ("step", key))
            axis.plot(steps, [100 * value for value in values], marker="o", label=name)
        axis.set(title=title, xlabel="step", ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of held-out rows' tokens or answers")
    axes[0].legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def record(
    arguments: argparse.Namespace, results: dict[str, Any], gaps: dict[str, Gap], shown_row: int
) -> dict[str, Any]:
    return {
        "arguments": vars(arguments),
        "options": RUNS,
        "versions": versions("selfgen", "torch", "transformers"),
        "results": {
            name: {"gap": gaps[name].to_dict()} | {key: result[key] for key in ("points", "seconds", "log")}
            for name, result in results.items()
        },
        "shown_row": shown_row,
    }


def next_steps(out: Path) -> list[str]:
    """Commands to go on with, as they run here."""
    command = "selfgen"
    if not shutil.which(command):
        beside = Path(sys.executable).with_name(command)
        command = os.path.relpath(beside) if beside.exists() else f"{sys.executable} -m selfgen"
    model, rows, results, answers = (
        shlex.quote(str(out / name)) for name in ("BSS", "held_out.jsonl", "eval", "answers.jsonl")
    )
    return [
        f"{command} eval --model {model} --dataset {rows} \\\n    --output-dir {results}",
        f"{command} generate --model {model} --dataset {rows} \\\n    --output-file {answers}",
    ]


if __name__ == "__main__":
    sys.exit(main())
