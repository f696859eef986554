"""The log of a training as lines that a person can read; ``trainer_state.json`` has the numbers as they are.

They take the place of the dicts that transformers prints, in the same stream, and go around its progress bar.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from .config import AUTO, CONSTANT, DISAGREEMENT, SETTLED, BSSConfig
from .gap import of_logged
from .metrics import METRICS, counted, duration, metric_of, readable

_HEADER_EVERY = 20  # lines
_WIDTH = 120  # of lines that go to no terminal
_LEAST_IMPORTANT = (
    "learning_rate", "computed_per_token", "grad_norm", "own_answers_unfinished", "agreement", "passes",
    "tokens_per_second", "training_seconds", "context_seconds", "own_answers_right", "differing_share", "self_prob",
)  # fmt: skip
"""Columns in the order in which they are left out of a narrow terminal."""
_IF_ANY = ("invalid", "skipped_steps", "rows_dropped", "own_answers_cut", "own_answers_empty", "privileged_too_long")
"""What follows the columns of a line where it is not 0."""


class Lines(TrainerCallback):
    """Writes one line per log, under a header that is repeated.

    Args:
        contexts: tells what contexts are made of.
        loss: tells what the training loss is.
    """

    def __init__(self, contexts: Callable[[], str], loss: Callable[[], str]):
        super().__init__()
        self._contexts, self._loss = contexts, loss
        self._columns: list[str] = []
        self._seen: set[str] = set()  # columns that there are values of
        self._explained: set[str] = set()
        self._since_header = 0

    def write(self, line: str) -> None:
        print(line, flush=True)

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._columns, self._seen, self._explained = [], set(), set()
        if state.is_world_process_zero:
            for line in _opening(args, state, self._contexts()):
                self.write(line)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            for line in self._lines(state, logs):
                self.write(line)

    def _lines(self, state, logs: Mapping[str, Any]) -> list[str]:
        if "loss" in logs:
            return [*self._header(state, logs), self._row(state, logs)]
        if "train_runtime" in logs:
            return [_closing(state, logs)]
        if gap := of_logged(logs):
            points, low, high = (readable(gap[name]) for name in ("gap", "gap_low", "gap_high"))
            return [
                f"gap at step {state.global_step}: {points} points (95% interval {low} to {high}, {gap['gap_rows']} "
                f"rows of the {gap['of']} data): {gap['right_under_references']:.1%} of tokens right under references, "
                f"{gap['right_running_freely']:.1%} running freely"
            ]
        evaluated = any(name.startswith("eval_") for name in logs)
        return [f"step {state.global_step}{', evaluation' if evaluated else ''}: {_in_words(logs)}"]

    def _header(self, state, logs: Mapping[str, Any]) -> list[str]:
        self._seen |= {name for name, metric in METRICS.items() if metric.head and name in logs}
        columns = _fitting({"step", *self._seen, *(["agreement"] if "self_share" in logs else [])}, _widths(state))
        if columns == self._columns and self._since_header < _HEADER_EVERY:
            self._since_header += 1
            return []
        self._columns, self._since_header = columns, 1
        new = [name for name in columns if name not in self._explained and name != "step"]
        self._explained |= {*new}
        lines = [self._explain(name) for name in new]
        widths = _widths(state)
        for text_of in (_head, _unit):
            lines.append(" ".join(f"{text_of(name):>{widths[name]}}" for name in columns).rstrip())
        return lines

    def _explain(self, name: str) -> str:
        metric = METRICS[name]
        says = self._loss() if name == "loss" else metric.says
        return f"  {_head(name):9} {says}{f' ({metric.unit})' if metric.unit else ''}"

    def _row(self, state, logs: Mapping[str, Any]) -> str:
        widths = _widths(state)
        none = {name for name in self._columns if name not in logs or (name == "context_seconds" and not logs[name])}
        cells = {name: "-" if name in none else METRICS[name].show(logs[name]) for name in self._columns}
        cells["step"] = f"{state.global_step}/{state.max_steps}"
        line = " ".join(f"{cells[name]:>{widths[name]}}" for name in self._columns)
        unknown = [name for name in logs if metric_of(name) is None]
        more = {name: logs[name] for name in (*_IF_ANY, *unknown) if name in logs and logs[name] != 0}
        return f"{line}  {_in_words(more)}" if more else line


class PrintedLines(Lines, PrinterCallback):
    """Where there is no bar."""


class LinesAroundBar(Lines, ProgressCallback):
    """Where there is transformers' progress bar, while it is there."""

    def write(self, line: str) -> None:
        if self.training_bar is None:
            super().write(line)
        else:
            self.training_bar.write(line)


def show_lines(trainer: Trainer, contexts: Callable[[], str], loss: Callable[[], str]) -> None:
    """Put lines in the place of transformers' dicts; a callback of a notebook, or of the user's, stays."""
    ours = {PrinterCallback: PrintedLines, ProgressCallback: LinesAroundBar}
    callbacks = trainer.callback_handler.callbacks
    for place, callback in enumerate(callbacks):
        if kind := ours.get(type(callback)):
            callbacks[place] = kind(contexts, loss)


def _head(name: str) -> str:
    return METRICS[name].head or name


def _unit(name: str) -> str:
    metric = METRICS[name]
    return metric.unit if metric.short_unit is None else metric.short_unit


def _widths(state) -> dict[str, int]:
    """Of columns."""
    steps = f"{state.max_steps}/{state.max_steps}"
    least = {name: max(7, len(_head(name)), len(_unit(name))) for name, metric in METRICS.items() if metric.head}
    return least | {"step": max(7, len(steps)), "learning_rate": 8}


def _fitting(names: set[str], widths: Mapping[str, int]) -> list[str]:
    """The columns that a line has room for, in their order; step and loss in any case."""
    room = shutil.get_terminal_size((_WIDTH, 0)).columns
    dropping = [name for name in _LEAST_IMPORTANT if name in names]
    while sum(widths[name] + 1 for name in names) - 1 > room and dropping:
        names = names - {dropping.pop(0)}
    return [name for name in METRICS if name in names]


def _in_words(logs: Mapping[str, Any]) -> str:
    said = []
    for name, value in logs.items():
        metric = metric_of(name)
        if name == "epoch" or name.endswith(("samples_per_second", "steps_per_second")):
            continue
        shown = (
            value if not isinstance(value, int | float) else readable(value) if metric is None else metric.show(value)
        )
        unit = metric.unit if metric else ""
        said.append(f"{name.removeprefix('eval_')} {shown}{'' if unit == '%' else ' ' if unit else ''}{unit}")
    return ", ".join(said)


def _opening(args: BSSConfig, state, contexts: str) -> list[str]:
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.row_share[1]
    done = f", from step {state.global_step + 1} on" if state.global_step else ""
    return [
        f"training: {counted(state.max_steps, 'step')} of {counted(rows, 'row')}{done}, on {args.device.type}",
        f"contexts: {contexts}",
        f"log: {_how_often(args, state)}",
        "the first step takes longer, as it also checks what the model computes and measures the device",
    ]


def _how_often(args: BSSConfig, state) -> str:
    if args.logging_strategy == "no":
        return "no lines (logging_strategy=no)"
    steps = "step" if state.logging_steps == 1 else f"{state.logging_steps:g} steps"
    return f"a line every {steps if args.logging_strategy == 'steps' else 'epoch'}, with means since the line before"


def _closing(state, logs: Mapping[str, Any]) -> str:
    line = f"trained to step {state.global_step} of {state.max_steps} in {duration(logs['train_runtime'])}"
    rates = {"rows": "train_samples_per_second", "steps": "train_steps_per_second"}
    told = [f"{readable(logs[name])} {what} per s" for what, name in rates.items() if name in logs]
    if "train_loss" in logs:
        told.append(f"mean loss {readable(logs['train_loss'])} nats per token")
    return f"{line}: {', '.join(told)}" if told else line


def told_of_loss(args: BSSConfig) -> str:
    """What the training loss is made of."""
    told = METRICS["loss"].says
    if args.target != "reference":
        told += f", with a weight of {args.weight_of_target:g} on target={args.target}"
    return f"{told}, plus {args.kl_weight:g} * KL(model || frozen model)" if args.kl_weight else told


def told_of_mixing(args: BSSConfig, *, by_function: bool = False) -> str:
    """Which tokens of contexts are self tokens, and from when on; ``by_function`` if that gives p."""
    if args.self_prob == 0 and not by_function:
        return "references alone (p is 0), as in plain fine-tuning"
    differing = "self tokens that differ from the reference"
    if args.self_prob == AUTO:
        p = f"p such that {args.difference_target:.3g} of answer tokens are {differing}, at most {args.self_prob_cap:g}"
    elif by_function:
        p = "p by the schedule that was given"
    elif args.self_prob_schedule == DISAGREEMENT:
        p = f"p = {args.self_prob:g} * the share of {differing}"
    elif args.self_prob_schedule == CONSTANT:
        p = f"p = {args.self_prob:g}"
    else:
        p = f"p from {args.self_prob_start:g} to {args.self_prob:g} ({args.self_prob_schedule})"
    told = [p, f"self tokens at temperature {args.sampling_temperature:g}"]
    masks = args.masks
    if masks.granularity != "token":
        of = f" of {masks.span_length:g} tokens on average" if masks.granularity == "span" else ""
        told.append(f"in units of a {masks.granularity}{of}")
    if args.self_prob_curve not in (None, "flat"):
        told.append(f"p {args.self_prob_curve} along the answer")
    if masks.min_reference_prob:
        told.append(f"none where the reference has a probability below {masks.min_reference_prob:g}")
    if args.loss_on != "all":
        told.append(f"loss on {args.loss_on}")
    if args.warm_up == SETTLED:
        told.append("plain fine-tuning until the loss has settled (a model that only guesses does not wait)")
    elif args.warm_up:
        of = "steps" if float(args.warm_up) >= 1 else "of all steps"
        told.append(f"plain fine-tuning in the first {float(args.warm_up):g} {of}")
    return "; ".join(told)
