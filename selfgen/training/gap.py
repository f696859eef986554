"""The gap before and after training, on a few rows: what the model loses when it runs freely."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from itertools import accumulate, compress
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback

from ..context import UnsupportedModelError
from ..evaluation import Gap, row_gaps
from .metrics import counted

logger = logging.getLogger(__name__)

MOST_TOKENS = 128
"""Of each answer, from its beginning: what the measurement costs does not depend on how long answers are."""


class GapBeforeAndAfter(TrainerCallback):
    """Measures the gap when training begins and when it ends, and logs it as ``eval_gap`` or ``train_gap``.

    A resumed run has the first one from its checkpoint. Training is left as it is: nothing is drawn from generators of
    random numbers that it uses, and the generator of its contexts is another one.

    Args:
        trainer: a BSSTrainer, whose callback it is.
        rows: the most rows that it is measured on, the first ones of the evaluation data or, if there are none, of the
            training data. At least 1.

    Example:
        >>> trainer.add_callback(GapBeforeAndAfter(trainer, rows=16))
    """

    def __init__(self, trainer: Any, rows: int = 16):
        if rows < 1:
            raise ValueError(f"rows is {rows}; it must be at least 1")
        self._trainer, self._rows = trainer, rows

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._log()

    def on_train_end(self, args, state, control, **kwargs):
        self._log()

    def _log(self) -> None:
        of, rows = _rows_of(self._trainer, self._rows)
        if reason := self._why_not(rows):
            logger.warning("the gap is not measured, as %s", reason)
            return
        logger.info(
            "measuring the gap on %s of the %s data, the first %d tokens of each answer",
            counted(len(rows), "row"),
            {"eval": "evaluation", "train": "training"}[of],
            MOST_TOKENS,
        )
        try:
            gap = measure_gap(self._trainer, rows)
        except UnsupportedModelError as reason:  # which may be trained on references alone
            logger.warning("the gap is not measured: %s", reason)
            return
        self._trainer.log(logged(gap, of))

    def _why_not(self, rows: list[dict[str, Any]]) -> str | None:
        if self._trainer._engine.splits_weights:
            return "weights are split over processes: selfgen eval measures it on the saved model"
        return None if rows else "a stream has no rows that can be read again: give evaluation data that is no stream"


def measure_gap(trainer: Any, rows: list[dict[str, Any]]) -> Gap:
    """The gap of tokenized ``rows``, with the current weights of a BSSTrainer.

    Processes share the rows; all must call it.
    """
    share, shares = trainer.args.row_share
    mine = [*enumerate(rows)][share::shares]
    counted: list[dict[str, int]] = []
    with trainer._whole_weights(), trainer._engine.autocast():
        method = trainer.args.context_method
        if method == "fixed_point":
            _ = trainer.generator.budget  # measured once, for the steps, too
        generator = copy.copy(trainer.generator)  # without its graphs
        try:
            if mine:
                counted = row_gaps(generator, [row for _, row in mine], seed=trainer.args.seed, method=method)
        finally:
            generator.release()
    told = [(number, line) for (number, _), line in zip(mine, counted, strict=True)]
    everyone = dict(gather_object(told) if trainer.args.world_size > 1 else told)
    return Gap.of(everyone[number] for number in sorted(everyone))


def logged(gap: Gap, of: str) -> dict[str, float]:
    """The metrics of a gap on rows ``of`` "eval" or "train"."""
    total = int(gap.tokens.sum())
    found = {
        "gap": gap.points,
        "gap_low": gap.interval[0],
        "gap_high": gap.interval[1],
        "right_under_references": int(gap.under_references.sum()) / total,
        "right_running_freely": int(gap.running_freely.sum()) / total,
        "gap_rows": len(gap.tokens),
    }
    return {f"{of}_{name}": value for name, value in found.items()}


def of_logged(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """The gap that an entry of the log has, under its names without their prefix, and ``of``; None if it has none."""
    of = next((of for of in ("eval", "train") if f"{of}_gap" in entry), None)
    if of is None:
        return None
    names = ("gap", "gap_low", "gap_high", "right_under_references", "right_running_freely", "gap_rows")
    return {"of": {"eval": "evaluation", "train": "training"}[of], **{n: entry.get(f"{of}_{n}") for n in names}}


def _rows_of(trainer: Any, most: int) -> tuple[str, list[dict[str, Any]]]:
    known: Any = trainer.eval_dataset
    known = next(iter(known.values()), None) if isinstance(known, dict) else known
    for of, data in (("eval", known), ("train", trainer.train_dataset)):
        if isinstance(data, Dataset):
            names = ["sample_id", "prompt_ids", "answer_ids", "is_learned"]
            columns = data.select_columns([name for name in names if name in data.column_names]).with_format(None)
            found = [columns[number] for number in range(min(most, len(columns)))]
            return of, [_beginning(**row) for row in found]
    return "train", []


def _beginning(is_learned: list[bool] | None = None, **row: Any) -> dict[str, Any]:
    """What is measured of a row: of several turns the first, as what others say after it is not the model's."""
    first = row["answer_ids"] if is_learned is None else [*compress(row["answer_ids"], accumulate(is_learned, min))]
    return {**row, "answer_ids": first[:MOST_TOKENS]}
