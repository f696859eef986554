"""What the log of a training has: each metric with its unit and what it says, and numbers that a person can read."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One key of the log."""

    unit: str  # "" where it has none; "%" is of a share, which is logged as a number from 0 to 1
    says: str
    head: str | None = None  # over its column in log lines; None where it has no column
    short_unit: str | None = None  # below it, where that is another one than `unit`

    def show(self, value: float) -> str:
        """``value`` in 3 significant digits, a share in percent."""
        return readable(100 * value if self.unit == "%" else value)


METRICS = {
    "step": Metric("", "optimizer steps so far", "step"),
    "loss": Metric(
        "nats per token",
        "training loss, under mixed contexts (unless p is 0): the mean over learned tokens",
        "loss",
        "nats/tok",
    ),
    "eval_loss": Metric("nats per token", "evaluation loss, under reference contexts: the mean over tokens"),
    "train_loss": Metric("nats per token", "mean training loss since the run was started or resumed"),
    "self_prob": Metric("", "probability that a context token is a self token, mean of the steps", "p"),
    "differing_share": Metric(
        "%", "answer tokens of contexts that are self tokens and differ from the reference", "differ"
    ),
    "agreement": Metric("%", "self tokens that equal the reference; absent where there are none", "agree"),
    "self_share": Metric("%", "answer tokens of contexts that are self tokens"),
    "passes": Metric("per step", "forwards that made contexts or own answers", "passes", "/step"),
    "computed_per_token": Metric(
        "", "tokens computed in passes, per token of contexts; one forward over them is 1", "work"
    ),
    "context_seconds": Metric("s per step", "time for contexts and own answers", "contexts", "s/step"),
    "training_seconds": Metric("s per step", "time for the rest: forward, backward, optimizer", "training", "s/step"),
    "tokens_per_second": Metric(
        "per s", "tokens trained on, prompts included, in the process that logs", "tokens", "/s"
    ),
    "grad_norm": Metric("", "norm of the gradients before they are clipped", "grad"),
    "learning_rate": Metric("", "learning rate", "lr"),
    "epoch": Metric("", "passes over the training data so far"),
    "own_answers_right": Metric("%", "own answers that are right before the correction", "right"),
    "own_answers_unfinished": Metric("%", "own answers that did not end within max_new_tokens", "unended"),
    "own_answers_cut": Metric("%", "own answers that were cut to fit into max_length"),
    "own_answers_empty": Metric("%", "own answers without a token"),
    "own_answers_left_out": Metric("%", "corrections of right answers that were left out of the loss"),
    "invalid": Metric("", "self tokens that kept the reference, as their logits were not finite"),
    "skipped_steps": Metric("", "steps that the loss scaler of fp16 left out, as gradients overflowed"),
    "passes_in_step": Metric("per step", "forwards that all processes ran together, with weights=sharded"),
    "replayed_share": Metric("%", "passes that were replays of CUDA graphs"),
    "padding_share": Metric("%", "tokens computed that only filled a recorded size"),
    "privileged_too_long": Metric("%", "rows without room for the reference in the prompt of target=privileged"),
    "rows_read": Metric("rows", "rows of the stream that were read so far, by all processes"),
    "rows_kept": Metric("rows", "of these, kept"),
    "rows_truncated": Metric("rows", "of these, kept and cut"),
    "rows_dropped": Metric("rows", "of these, dropped; rows_dropped/REASON says why"),
    "eval_first_right": Metric("%", "first answers that are right"),
    "eval_corrected_right": Metric("%", "corrected answers that are right"),
    "eval_wrong_to_right": Metric("%", "answers that the correction has made right"),
    "eval_right_to_wrong": Metric("%", "answers that the correction has spoilt"),
    "train_runtime": Metric("s", "wall time since the run was started or resumed, measuring the first gap included"),
    "train_samples_per_second": Metric("per s", "rows trained on since then"),
    "train_steps_per_second": Metric("per s", "optimizer steps since then"),
    "eval_runtime": Metric("s", "wall time of the evaluation"),
    "eval_samples_per_second": Metric("per s", "rows evaluated"),
    "eval_steps_per_second": Metric("per s", "batches evaluated"),
    "total_flos": Metric("", "floating-point operations, as transformers estimates them"),
}
_GAP = {
    "gap": Metric("points", "accuracy of tokens under references minus that running freely"),
    "gap_low": Metric("points", "lower end of its 95% interval"),
    "gap_high": Metric("points", "upper end of its 95% interval"),
    "right_under_references": Metric("%", "tokens that are right under references"),
    "right_running_freely": Metric("%", "tokens that are right running freely"),
    "gap_rows": Metric("rows", "rows that the gap was measured on"),
}
METRICS |= {f"{of}_{name}": metric for of in ("eval", "train") for name, metric in _GAP.items()}
"""By their keys in the log, those of columns in the order of these. Evaluations of several data sets have the name of
the set after ``eval_``."""


def metric_of(key: str, sets: tuple[str, ...] = ()) -> Metric | None:
    """What ``key`` of the log means; None if it is not ours. ``sets`` are names of evaluation data sets."""
    if key.startswith("rows_dropped/"):
        return Metric("rows", f"of these, dropped: {key.partition('/')[2]}")
    for name in sorted(sets, key=len, reverse=True):  # of test and test_hard, the longer one
        if key.startswith(prefix := f"eval_{name}_"):
            return METRICS.get(f"eval_{key.removeprefix(prefix)}")
    return METRICS.get(key)


def readable(value: float) -> str:
    """A number in 3 significant digits: 0.0123, 12.3, 1.23k, 4.56M, 5.00e-05; 0, nan and inf as they are."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    value = float(f"{value:.3g}")
    for size, letter in ((1e12, None), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value:.2e}" if letter is None else f"{value / size:#.3g}".rstrip(".") + letter
    return f"{value:#.3g}".rstrip(".")


def counted(number: int, what: str) -> str:
    """A number of things: 1 step, 2 steps."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Of a time, its two largest units: 1 h 5 min, 3 min 20 s; below a minute as a number."""
    if not seconds >= 60:
        return f"{readable(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
