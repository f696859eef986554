"""``RACTrainer``: reference-answer-based correction (arXiv 2410.14655, section on RAC).

Each row becomes: the prompt, the model's own answer, a cue that asks for a correction, and the reference, which is
learned. At inference the model answers, gets the cue, and corrects itself, with no oracle (``generate_corrected``).
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor

from ..context import Answers, ContextStats
from ..context.masks import check_probability
from ..context.models import max_positions
from ..correction import DEFAULT_CUE, CorrectionCue
from ..data import Collator, load_rows, pad_token_id, rows_of, sample_ids_of
from ..data.batches import IGNORE_INDEX, Row
from ..data.streams import StreamedRows, refuse_stream
from ..evaluation import Corrections, greedy_of
from ..generation import generate_corrected
from .batches import unique_rows
from .bss import BSSTrainer
from .config import BSSConfig
from .mixing import step_seed
from .right_answers import RIGHT_ANSWERS, Judge, is_right, left_out, same_as_eval

logger = logging.getLogger(__name__)

OWN_ANSWERS = ("generated", "mixed", "column")
_MEASURED = ("first_right", "corrected_right", "wrong_to_right", "right_to_wrong")
_NO_LIMIT = 2**31
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
    sampling_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature of own answers, and of self tokens in corrections: 0 is greedy, 1 is the model's own "
            "distribution, and more adds noise."
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
        default=1.0,
        metadata={
            "help": "Weight of the loss on the reference right after the prompt, in addition to that on the "
            "correction; the loss of the log is the sum of both. 1 gives both the same weight, with twice the rows; 0 "
            "trains on corrections only, and first answers may get worse."
        },
    )
    right_answers: str = field(
        default="reference",
        metadata={
            "help": "What is learned as the correction of an own answer that is right already: reference (as of any "
            "other), or keep (the own answer itself, which teaches not to spoil right answers)."
        },
    )
    right_answer_share: float = field(
        default=1.0,
        metadata={
            "help": "Most of a step's corrections whose own answer is right already, as a share in [0, 1]; others of "
            "them are left out of the loss. 0 corrects wrong answers only; 1 leaves out none."
        },
    )
    eval_corrections: int = field(
        default=0,
        metadata={
            "help": "Number of rows of the evaluation data, the first ones, that are answered and corrected in every "
            "evaluation: its metrics then have first_right, corrected_right, wrong_to_right and right_to_wrong. 0 is "
            "none."
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
        if self.right_answers not in RIGHT_ANSWERS:
            raise ValueError(f"right_answers is {self.right_answers!r}; accepted: {', '.join(RIGHT_ANSWERS)}")
        if not 0.0 <= self.right_answer_share <= 1.0:
            raise ValueError(f"right_answer_share is {self.right_answer_share}; it must be a share in [0, 1]")
        if self.right_answers == "keep" and self.right_answer_share == 0.0:
            raise ValueError(
                "right_answers=keep, but right_answer_share is 0, which leaves all right answers out: give a share "
                "above 0, or right_answers=reference"
            )
        if self.eval_corrections < 0:
            raise ValueError(f"eval_corrections is {self.eval_corrections}; it must be at least 0")

    def check_own_answers(self, rows: Dataset | IterableDataset) -> None:
        """Raise an error if own answers are to be read from a column that the training data ``rows`` lack."""
        if self.own_answer != "column":
            return
        refuse_stream(rows, "own answers of a column")
        if self.own_answer_column not in rows.column_names:
            raise ValueError(
                f"own_answer=column, but the training data has no column {self.own_answer_column!r} with own answers "
                f"(it has {', '.join(rows.column_names)}); give the name of the column as own_answer_column, or write "
                "one with `selfgen generate`"
            )

    @property
    def judges(self) -> bool:
        """Whether it matters to the loss which own answers are right."""
        return self.right_answers == "keep" or self.right_answer_share < 1.0


class RACTrainer(BSSTrainer):
    """Fine-tune a model to correct its own answers; everything else is ``BSSTrainer``'s.

    Before each optimizer step the own answers of the whole accumulated batch are made at once, with the current
    weights. They depend on the seed, the step and the row's sample id, so a resumed run has the same ones. Prompt, own
    answer, cue and reference together have at most ``max_length`` tokens: an own answer is cut to what is left, and
    ``own_answers_cut`` in the logs is the share of own answers that were cut. ``own_answers_empty`` is the share of
    those without a token, which are shown as such, and ``own_answers_unfinished``, where they are generated, that of
    those which did not end within ``max_new_tokens`` or the model's positions. ``own_answers_right`` is the share of
    those that were right before the correction: they ended, were not cut, and say what a reference says that was not
    cut, either. Where ``right_answer_share`` leaves some out, ``own_answers_left_out`` is their share.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, **kwargs: as in ``BSSTrainer``; ``args`` is an
            ``RACConfig``. With ``own_answer="column"`` the training rows have a column with own answers. What is
            evaluated is the answer right after the prompt, without a correction; with ``eval_corrections``, some rows
            are also answered and corrected.
        judge: a function (answer, reference) -> whether the answer is right, of their texts, in place of
            ``evaluation.exact_match``: True or False, and the same whenever it is asked the same.
    """

    _lean_by_default = True  # its rows are the longest

    def __init__(
        self, model, args: RACConfig, *, train_dataset=None, data_collator=None, judge: Judge | None = None, **kwargs
    ):
        if not isinstance(args, RACConfig):
            raise TypeError(f"args is a {type(args).__name__}; RACTrainer takes an RACConfig")
        if data_collator is not None:
            raise ValueError("RACTrainer makes its batches with selfgen's collator; leave data_collator out")
        if args.own_answer == "column":
            refuse_stream(train_dataset, "own answers of a column")
        self._judge = judge or same_as_eval
        self._own_answers: dict[int, list[int]] = {}
        self._broken_off: set[int] = set()  # of these
        self._known_cue: CorrectionCue | None = None
        self._has_direct = args.direct_weight > 0
        self._learns_rows_once = not self._has_direct
        self._counts_anew = args.loss_on != "all" or args.judges  # direct rows and corrections learn other tokens
        reasons = {
            "right_answer_share": args.right_answer_share < 1,
            "direct_weight": args.direct_weight != 1,
            "right_answers": args.right_answers == "keep",
            "loss_on": args.loss_on != "all",
        }
        self._weighing = ", ".join(name for name, holds in reasons.items() if holds)
        self._weighs_rows = args.right_answer_share < 1 or (
            self._has_direct and (args.direct_weight != 1 or self._counts_anew)
        )
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        if args.eval_corrections:
            self._check_eval_corrections()
        if args.own_answer == "column":
            self._own_answers = self._read_own_answers(train_dataset)
            self.train_dataset = self._rows_with_own_answers(self.train_dataset)  # type: ignore[has-type]

    def _told_of_contexts(self) -> str:
        args = self.args
        made = {"column": "read from the data", "generated": f"at temperature {args.sampling_temperature:g}"}
        own = made.get(args.own_answer, f"mixed with p = {args.own_answer_self_prob:g}")
        return f"prompt, own answer ({own}) and cue; corrections: {super()._told_of_contexts()}"

    def _told_of_loss(self) -> str:
        told = super()._told_of_loss()
        if not self._has_direct:
            return f"{told} of corrections"
        return f"{told} of corrections, plus {self.args.direct_weight:g} (direct_weight) * that of first answers"

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
        unique = unique_rows([row for part in rows for row in part])
        self.meter.contexts_begin()
        own, work = self._own(unique)
        self.meter.contexts_end(work)
        right = self._right(unique, own)
        out: set[int] = set()
        if self.args.right_answer_share < 1:
            wrong = {row.sample_id for row in unique} - right
            seed = step_seed(self.args.seed, self.state.global_step, stream=1)
            together = self.args.world_size > 1
            out = left_out(right, wrong, self.args.right_answer_share, seed, together=together)
        return [self._corrections(part, own, right, out) for part in rows]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches or not self._counts_anew:
            return batches, num_items
        if self.args.loss_on == "all":  # counted before there were corrections
            num_items = self._get_num_items_in_batch(batches, device)
        if self._has_direct and num_items is not None:  # they get a mean of their own
            direct = super()._get_num_items_in_batch([self._learned(batch, direct=True) for batch in batches], device)
            for batch in batches:
                weights = batch["loss_weight"]
                weights[len(weights) // 2 :] = self.args.direct_weight * max(1, int(num_items)) / max(1, int(direct))
        return batches, num_items

    def _get_num_items_in_batch(self, batch_samples, device):
        """Learned tokens are counted in corrections only, without those that are left out."""
        first = [self._learned(batch) if "loss_weight" in batch else batch for batch in batch_samples]
        return super()._get_num_items_in_batch(first, device)

    def _learned(self, batch: dict[str, Tensor], *, direct: bool = False) -> dict[str, Tensor]:
        """A batch with the labels of its direct rows, or of its corrections that have a weight."""
        labels, weights = batch["labels"], batch["loss_weight"]
        if direct:
            return {**batch, "labels": labels.chunk(2)[1]}
        if self._has_direct:  # they follow the corrections
            labels, weights = labels.chunk(2)[0], weights.chunk(2)[0]
        return {**batch, "labels": labels.masked_fill((weights == 0)[:, None], IGNORE_INDEX)}

    def _corrections(
        self, rows: list[Row], own: dict[int, list[int]], right: set[int], out: set[int]
    ) -> dict[str, Tensor]:
        """The micro-batch of some rows and their own answers."""
        made = [self._correction(row, own[row.sample_id], row.sample_id in right) for row in rows]
        prompts, targets = [prompt for prompt, _ in made], [target for _, target in made]
        ids, weights = [row.sample_id for row in rows], [float(row.sample_id not in out) for row in rows]
        self.meter.counts["own_answers_left_out"] += weights.count(0.0)
        if self._has_direct:
            prompts += [row.prompt for row in rows]
            targets += [row.reference for row in rows]
            ids += [row ^ _DIRECT for row in ids]  # a row of its own, with own noise
            weights += [self.args.direct_weight] * len(rows)
        batch = Collator(pad_token_id(self.processing_class)).pad(prompts, targets, ids)
        if self._weighs_rows:
            batch["loss_weight"] = torch.tensor(weights, device=batch["input_ids"].device)
        return batch

    def _correction(self, row: Row, own: list[int], is_right: bool) -> tuple[Tensor, Tensor]:
        """Prompt, own answer and cue, int64 [P], the answer cut to the room that there is; and what is learned, [T]."""
        whole, own, room = self._cue.whole(own), self._cue.ended(own), self._room(row)
        self.meter.counts["own_answers"] += 1
        self.meter.counts["own_answers_cut"] += len(own) > room
        self.meter.counts["own_answers_empty"] += not own
        self.meter.counts["own_answers_right"] += is_right
        prompt = torch.cat([row.prompt, row.prompt.new_tensor(self._cue.prompt([], own[:room]))])
        target = row.reference
        if is_right and self.args.right_answers == "keep":
            kept = torch.cat([target.new_tensor(whole), self._end_of(target)])
            if self.args.max_length is None or len(prompt) + len(kept) <= self.args.max_length:
                target = kept
        return prompt, target

    def _room(self, row: Row) -> int:
        """The most tokens of an own answer that can be shown before the reference."""
        if self.args.max_length is None:
            return _NO_LIMIT
        prompt, answer, cue = len(row.prompt), len(row.reference), len(self._cue.ids)
        room = self.args.max_length - prompt - cue - answer
        if room < 0:
            raise ValueError(
                f"row {row.sample_id} has no room for the cue of {cue} tokens within max_length="
                f"{self.args.max_length}: its prompt has {prompt} tokens and its answer {answer}; raise max_length, or "
                "leave the row out"
            )
        return room

    def _end_of(self, reference: Tensor) -> Tensor:
        """What a reference has from its end on; nothing if it was cut."""
        return reference[len(self._cue.whole(reference.tolist())) :]

    def _right(self, rows: list[Row], own: dict[int, list[int]]) -> set[int]:
        """Sample ids of own answers that are right: none that is empty, broken off or cut, nor of a cut reference."""
        whole = []
        for row in rows:
            answer = self._cue.ended(own[row.sample_id])
            ended = self.args.own_answer == "column" or not self._cue.stop_ids.isdisjoint(own[row.sample_id])
            ended = ended and row.sample_id not in self._broken_off and len(self._end_of(row.reference)) > 0
            if answer and ended and len(answer) <= self._room(row):
                whole.append((row, answer))
        says = partial(self.args.answer_texts, self.processing_class)
        texts = zip(says([answer for _, answer in whole]), says([row.reference for row, _ in whole]), strict=True)
        return {
            row.sample_id
            for (row, _), (answer, reference) in zip(whole, texts, strict=True)
            if is_right(self._judge, answer, reference)
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        counts = self.meter.counts
        if "loss" in logs and (shown := counts["own_answers"]):
            logs["own_answers_cut"] = counts["own_answers_cut"] / shown
            logs["own_answers_empty"] = counts["own_answers_empty"] / shown
            logs["own_answers_right"] = counts["own_answers_right"] / shown
            if self.args.right_answer_share < 1:
                logs["own_answers_left_out"] = counts["own_answers_left_out"] / shown
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
        digest.update(np.asarray(sorted(self._broken_off), dtype="<i8").tobytes())
        return digest.hexdigest()

    def _own(self, rows: list[Row]) -> tuple[dict[int, list[int]], ContextStats]:
        """Own answers by sample id, with the token that ends them if they are generated, and what they cost."""
        work = ContextStats.untouched([], [])
        cost: Answers | ContextStats
        if self.args.own_answer == "column":
            return self._own_answers, work
        ids, prompts = [row.sample_id for row in rows], [row.prompt for row in rows]
        seed = step_seed(self.args.seed, self.state.global_step, stream=1)
        if self.args.own_answer == "mixed":
            self._agree_on_budget()
        with self._whole_weights(keep=not self._between.may_change), self._engine.autocast():
            if self.args.own_answer == "mixed":
                mixed = self.generator.contexts(
                    prompts,
                    [row.reference for row in rows],
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

    def _check_eval_corrections(self) -> None:
        known = self.eval_dataset
        sets = list(known.values()) if isinstance(known, dict) else [known]
        if any(isinstance(one, StreamedRows) for one in sets):
            raise ValueError("eval_corrections reads the first rows anew: give evaluation data that is no stream")

    def _metrics_of_evaluations(self) -> list[str]:
        return [*super()._metrics_of_evaluations(), *(_MEASURED if self.args.eval_corrections else ())]

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """BSSTrainer's, and what becomes of some rows' answers when they are corrected."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.args.eval_corrections and output.metrics is not None and metric_key_prefix.startswith("eval"):
            loader = args[0] if args else kwargs["dataloader"]
            found = self.measure_corrections(loader.dataset, self.args.eval_corrections)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def measure_corrections(self, rows: Dataset, most: int) -> dict[str, float]:
        """Shares of the first ``most`` rows: right at first, right when corrected, made right, and spoilt.

        Answers are greedy, and asked to be corrected once, as by ``selfgen eval --metrics correction``. Rows whose
        prompt leaves no room for that, or whose reference was cut, are passed over. Processes share the rows.

        Args:
            rows: tokenized, with columns ``prompt_ids`` and ``answer_ids``.
        """
        refuse_stream(rows, "eval_corrections")
        limit = max_positions(self.generator.model) or _NO_LIMIT
        fitting = (
            row
            for row in rows
            if len(row["prompt_ids"]) + len(self._cue.ids) + 2 <= limit
            and not self._cue.stop_ids.isdisjoint(row["answer_ids"])
        )
        chosen = [*enumerate(islice(fitting, most))]
        if not chosen:
            logger.warning("no row has room for a correction and a whole reference, so no correction is evaluated")
        share, shares = self.args.row_share
        mine = chosen[share::shares]
        greedy = greedy_of(self.generator)
        with self._whole_weights(), self._engine.autocast():
            found = generate_corrected(
                greedy,
                self.processing_class,
                [row["prompt_ids"] for _, row in mine],
                cue=self.args.correction_cue,
                row_options=self.args,
                max_new_tokens=self.args.max_new_tokens,
                batch_size=self.args.own_answer_batch_size,
                sample_ids=[number for number, _ in mine],
            )
        greedy.release()
        says = partial(self.args.answer_texts, self.processing_class)
        texts = zip(says(found.first), says(found.corrected), says([row["answer_ids"] for _, row in mine]), strict=True)
        right = partial(is_right, self._judge)
        judged = [(right(first, truth), right(corrected, truth)) for first, corrected, truth in texts]
        told = [(number, pair) for (number, _), pair in zip(mine, judged, strict=True)]
        everyone = dict(gather_object(told) if self.args.world_size > 1 else told)
        return Corrections.of(everyone.values()).of_all

    def _read_own_answers(self, rows) -> dict[int, list[int]]:
        column = self.args.own_answer_column
        rows = load_rows(rows)
        self.args.check_own_answers(rows)
        given = {
            one: text for one, text in zip(sample_ids_of(rows), rows[column], strict=True) if isinstance(text, str)
        }
        if "finished" in rows.column_names:  # as `selfgen generate` writes it
            finished = zip(sample_ids_of(rows), rows["finished"], strict=True)
            self._broken_off = {one for one, ended in finished if ended is not None and not ended}
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
