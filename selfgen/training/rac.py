"""``RACTrainer``: reference-answer-based correction (arXiv 2410.14655, section on RAC).

Each row becomes: the prompt, the model's own answer, a cue that asks for a correction, and the reference, which is
learned. At inference the model answers, gets the cue, and corrects itself, with no oracle (``generate_corrected``).
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..context import Answers, ContextStats
from ..context.masks import check_probability
from ..correction import DEFAULT_CUE, CorrectionCue
from ..data import Collator, load_rows, pad_token_id, rows_of, sample_ids_of
from ..data.batches import Row
from ..data.streams import refuse_stream
from .batches import unique_rows
from .bss import BSSTrainer, step_seed
from .config import BSSConfig

logger = logging.getLogger(__name__)

OWN_ANSWERS = ("generated", "mixed", "column")
_DIRECT = 1 << 62  # the bit of a sample id that tells the row without a correction; negative ids may be the user's


@dataclass
class RACConfig(BSSConfig):
    """Arguments of ``RACTrainer``: those of ``BSSConfig``, and the fields below.

    ``self_prob`` is 0 by default: the correction is learned under its reference tokens. Above 0 its context is mixed,
    too, which makes the method RAC and BSS at once.
    """

    self_prob: float | str = field(
        default=0.0,
        metadata={
            "help": "Probability that a context token of the correction is a self token, in [0, 1], or auto, as in "
            "BSS. 0 is plain RAC; above 0 the method is RAC and BSS at once."
        },
    )
    own_answer: str = field(
        default="generated",
        metadata={
            "help": "Where the model's own answers come from: generated (a free run of the current weights), mixed (a "
            "context of reference and self tokens), or column (made beforehand, in a column of the data set)."
        },
    )
    own_answer_self_prob: float = field(
        default=1.0,
        metadata={
            "help": "For own_answer=mixed: probability of a self token in an own answer, in [0, 1]. 0 is the "
            "reference, 1 is a free run as long as the reference."
        },
    )
    own_answer_column: str = field(
        default="own_answer", metadata={"help": "For own_answer=column: name of the column with own answers, as text."}
    )
    max_new_tokens: int = field(
        default=256,
        metadata={
            "help": "For own_answer=generated: most tokens of an own answer, at least 1. Fewer are cheaper, but long "
            "answers are broken off."
        },
    )
    own_answer_batch_size: int = field(
        default=32,
        metadata={
            "help": "For own_answer=generated: most rows that are answered at a time, at least 1. Fewer take less "
            "memory (each row has K/V for the longest of all) and more passes."
        },
    )
    correction_cue: str = field(
        default=DEFAULT_CUE,
        metadata={
            "help": "Text that asks for a correction: the user's next turn in the chat template, or a paragraph of "
            "its own if there is no template."
        },
    )
    direct_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the loss on the reference right after the prompt, in addition to that on the "
            "correction. 0 trains on corrections only; 1 gives both the same weight, with twice the rows."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.own_answer not in OWN_ANSWERS:
            raise ValueError(f"own_answer is {self.own_answer!r}; accepted: {', '.join(OWN_ANSWERS)}")
        check_probability("own_answer_self_prob", self.own_answer_self_prob)
        for name in ("max_new_tokens", "own_answer_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.assistant_turns != "last":
            raise ValueError("assistant_turns=all is not for RAC, which corrects one answer per row: the last turn")
        if self.own_answer != "mixed" and self.own_answer_self_prob != 1.0:
            raise ValueError(f"own_answer_self_prob goes with own_answer=mixed, but own_answer is {self.own_answer!r}")
        if not 0.0 <= self.direct_weight < float("inf"):
            raise ValueError(f"direct_weight is {self.direct_weight}; it must be a finite number >= 0")


class RACTrainer(BSSTrainer):
    """Fine-tune a model to correct its own answers; everything else is ``BSSTrainer``'s.

    Before each optimizer step the own answers of the whole accumulated batch are made at once, with the current
    weights. They depend on the seed, the step and the row's sample id, so a resumed run has the same ones. Prompt, own
    answer, cue and reference together have at most ``max_length`` tokens: an own answer is cut to what is left, and
    ``own_answers_cut`` in the logs is the share of own answers that were cut. ``own_answers_empty`` is the share of
    those without a token, which are shown as such, and ``own_answers_unfinished``, where they are generated, that of
    those which did not end within ``max_new_tokens`` or the model's positions.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, **kwargs: as in ``BSSTrainer``; ``args`` is an
            ``RACConfig``. With ``own_answer="column"`` the training rows have a column with own answers. What is
            evaluated is the answer right after the prompt, without a correction.
    """

    _lean_by_default = True  # its rows are the longest

    def __init__(self, model, args: RACConfig, *, train_dataset=None, data_collator=None, **kwargs):
        if not isinstance(args, RACConfig):
            raise TypeError(f"args is a {type(args).__name__}; RACTrainer takes an RACConfig")
        if data_collator is not None:
            raise ValueError("RACTrainer makes its batches with selfgen's collator; leave data_collator out")
        if args.own_answer == "column":
            refuse_stream(train_dataset, "own answers of a column")
        self._own_answers: dict[int, list[int]] = {}
        self._known_cue: CorrectionCue | None = None
        self._weighs_rows = args.direct_weight > 0
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        if args.own_answer == "column":
            self._own_answers = self._read_own_answers(train_dataset)
            self.train_dataset = self._rows_with_own_answers(self.train_dataset)  # type: ignore[has-type]

    @property
    def _cue(self) -> CorrectionCue:
        if self._known_cue is None:
            self._known_cue = CorrectionCue.of(
                self.processing_class,
                self.args.correction_cue,
                stop_ids=self.generator.eos_token_ids,
                options=self.args,
            )
        return self._known_cue

    def _longest_row(self, name: str) -> int | None:
        """Training rows leave room for the cue."""
        longest, cue = super()._longest_row(name), len(self._cue.ids) if name == "train" else 0
        if longest is None:
            return None
        if longest - cue < 2:
            raise ValueError(
                f"max_length is {longest}, of which the cue takes {cue} tokens and a prompt and an answer at least 2: "
                "raise max_length, or shorten correction_cue"
            )
        return longest - cue

    def prepare_batches(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Micro-batches of correction rows, followed by the rows as they were where these have a weight."""
        if not batches:
            return batches
        rows = [rows_of(batch) for batch in batches]
        self.meter.contexts_begin()
        own, work = self._own([row for part in rows for row in part])
        self.meter.contexts_end(work)
        return [self._corrections(part, own) for part in rows]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self._weighs_rows and self.args.loss_on != "all":
            # Direct rows have other self tokens, so they get a mean of their own.
            direct = super()._get_num_items_in_batch([_half(batch, 1) for batch in batches], device)
            for batch in batches:
                weights = batch["loss_weight"]
                weights[len(weights) // 2 :] = self.args.direct_weight * max(1, int(num_items)) / max(1, int(direct))
        return batches, num_items

    def _get_num_items_in_batch(self, batch_samples, device):
        """Learned tokens are counted in corrections only: the first half of the rows, where direct rows follow them."""
        first = [_half(batch, 0) if "loss_weight" in batch else batch for batch in batch_samples]
        return super()._get_num_items_in_batch(first, device)

    def _corrections(self, rows: list[Row], own: dict[int, list[int]]) -> dict[str, Tensor]:
        """The micro-batch of some rows and their own answers."""
        prompts = [self._correction_prompt(row, own[row.sample_id]) for row in rows]
        ids, weights = [row.sample_id for row in rows], [1.0] * len(rows)
        if self._weighs_rows:
            prompts += [row.prompt for row in rows]
            ids += [row ^ _DIRECT for row in ids]  # a row of its own, with own noise
            weights += [self.args.direct_weight] * len(rows)
        references = [row.reference for row in rows] * (len(ids) // len(rows))
        batch = Collator(pad_token_id(self.processing_class)).pad(prompts, references, ids)
        if self._weighs_rows:
            batch["loss_weight"] = torch.tensor(weights, device=batch["input_ids"].device)
        return batch

    def _correction_prompt(self, row: Row, own: list[int]) -> Tensor:
        """Prompt, own answer and cue, int64 [P]; the answer is cut to the room that there is."""
        prompt, answer, cue = len(row.prompt), len(row.reference), len(self._cue.ids)
        room = len(own) if self.args.max_length is None else self.args.max_length - prompt - cue - answer
        if room < 0:
            raise ValueError(
                f"row {row.sample_id} has no room for the cue of {cue} tokens within max_length="
                f"{self.args.max_length}: its prompt has {prompt} tokens and its answer {answer}; raise max_length, or "
                "leave the row out"
            )
        own = self._cue.ended(own)
        self.meter.counts["own_answers"] += 1
        self.meter.counts["own_answers_cut"] += len(own) > room
        self.meter.counts["own_answers_empty"] += not own
        return torch.cat([row.prompt, row.prompt.new_tensor(self._cue.prompt([], own[:room]))])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        counts = self.meter.counts
        if "loss" in logs and (shown := counts["own_answers"]):
            logs["own_answers_cut"] = counts["own_answers_cut"] / shown
            logs["own_answers_empty"] = counts["own_answers_empty"] / shown
            if generated := counts["own_answers_generated"]:
                logs["own_answers_unfinished"] = counts["own_answers_unfinished"] / generated
        super().log(logs, start_time)

    def _rows_hash(self) -> str | None:
        """With own answers that are read."""
        found = super()._rows_hash()
        if found is None or not self._own_answers:
            return found
        digest = hashlib.sha256(found.encode())
        for sample_id, answer in sorted(self._own_answers.items()):
            digest.update(np.asarray([sample_id, len(answer), *answer], dtype="<i8").tobytes())
        return digest.hexdigest()

    def _own(self, rows: list[Row]) -> tuple[dict[int, list[int]], ContextStats]:
        """Own answers by sample id, and what they cost."""
        work = ContextStats.untouched([], [])
        cost: Answers | ContextStats
        if self.args.own_answer == "column":
            return self._own_answers, work
        unique = unique_rows(rows)
        ids, prompts = [row.sample_id for row in unique], [row.prompt for row in unique]
        seed = step_seed(self.args.seed, self.state.global_step, stream=1)
        if self.args.own_answer == "mixed":
            self._agree_on_budget()
        with self._whole_weights(keep=self._forward_follows), self._engine.autocast():
            if self.args.own_answer == "mixed":
                mixed = self.generator.contexts(
                    prompts,
                    [row.reference for row in unique],
                    self.args.own_answer_self_prob,
                    seed=seed,
                    sample_ids=ids,
                    method=self.args.context_method,
                )
                tokens, cost = mixed.tokens, mixed.stats
            else:
                found = self.generator.answer(
                    prompts,
                    max_new_tokens=self.args.max_new_tokens,
                    seed=seed,
                    sample_ids=ids,
                    eos_token_ids=[*self._cue.stop_ids],
                    batch_size=self.args.own_answer_batch_size,
                )
                tokens, cost = found.tokens, found
                self.meter.counts["own_answers_generated"] += len(found.finished)
                self.meter.counts["own_answers_unfinished"] += found.finished.count(False)
        work = replace(work, passes=cost.passes, tokens_computed=cost.tokens_computed, invalid=cost.invalid)
        return {row: answer.tolist() for row, answer in zip(ids, tokens, strict=True)}, work

    def _read_own_answers(self, rows) -> dict[int, list[int]]:
        column = self.args.own_answer_column
        rows = load_rows(rows)
        if column not in rows.column_names:
            raise ValueError(
                f"own_answer=column, but the training data has no column {column!r} with own answers; give the name of "
                "the column as own_answer_column, or write one with `selfgen generate`"
            )
        given = {
            one: text for one, text in zip(sample_ids_of(rows), rows[column], strict=True) if isinstance(text, str)
        }
        tokens = self.args.answer_ids(self.processing_class, list(given.values()))
        return dict(zip(given, tokens, strict=True))

    def _rows_with_own_answers(self, rows: Dataset) -> Dataset:
        """The tokenized rows whose own answer is text; others are dropped, and the log names them."""
        ids = rows["sample_id"][:]
        kept = [row for row, one in enumerate(ids) if one in self._own_answers]
        if len(kept) == len(ids):
            return rows
        dropped = [one for one in ids if one not in self._own_answers]
        said = (
            f"{len(dropped)} of {len(ids)} rows have no text in {self.args.own_answer_column!r}: row {dropped[0]} first"
        )
        if not kept or self.args.strict_data:
            raise ValueError(f"{said}; own answers must be text, so fill or drop these rows")
        logger.warning("%s; they are dropped", said)
        return rows.select(kept)


def _half(batch: dict[str, Tensor], which: int) -> dict[str, Tensor]:
    """Labels of the corrections (0) or of the rows as they were (1)."""
    return {**batch, "labels": batch["labels"].chunk(2)[which]}
