"""The methods that are compared, over equal optimizer steps and, but where said, equal tokens seen.

``self_prob`` is 0.25 and constant, the library's defaults, on every task; the ablations change it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from selfgen import BSSConfig, BSSTrainer, MixedContext, RACConfig, RACTrainer
from selfgen.context import ContextStats
from selfgen.correction import CorrectionCue
from selfgen.data import IGNORE_INDEX, Collator
from selfgen.evaluation.answers import rouge
from selfgen.generation import answer, generate_corrected
from selfgen.training.bss import step_seed

from ..peers import Rows, parallel_scheduled_sampling
from .tasks import AnyTask

ROUNDS = 4  # of the offline variant
WARMUP = 50  # steps, at most a tenth of all


@dataclass(frozen=True)
class Setting:
    """What the methods of one comparison share."""

    steps: int = 1000
    rows: int = 32  # of a step
    learning_rate: float = 2e-3
    width: int = 64
    layers: int = 3


@dataclass(frozen=True)
class Method:
    """``kind`` is online (which SFT is at p = 0), offline, approximate (K passes) or correction.

    A row of a correction is two, and longer; so that steps have as many tokens as the others', they have fewer rows,
    unless ``equal_rows``.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "online"
    passes: int = 0
    equal_rows: bool = False


P = {"self_prob": 0.25}
CORRECTION = {"direct_weight": 1.0}
METHODS = {
    method.name: method
    for method in (
        Method("SFT", {"self_prob": 0.0}),
        Method("BSS", P),
        Method("BASH", P, "offline"),
        Method("RAC", CORRECTION, "correction"),
        Method("BSS + RAC", P | CORRECTION, "correction"),
    )
}
ABLATIONS = {
    method.name: method
    for method in (
        Method("BSS, p = 0.1", {"self_prob": 0.1}),
        Method("BSS, p = 0.5", {"self_prob": 0.5}),
        Method("BSS, p = 0.9", {"self_prob": 0.9}),
        Method("BSS, p rising to 0.25", P | {"self_prob_schedule": "linear"}),
        Method("BSS, p rising to 0.5", {"self_prob": 0.5, "self_prob_schedule": "linear"}),
        Method("BSS, greedy", P | {"sampling_temperature": 0.0}),
        Method("BSS, confident", P | {"min_reference_prob": 0.5}),
        Method("BSS, spans", P | {"granularity": "span"}),
        Method("BSS, answers", P | {"granularity": "sequence"}),
        Method("BSS, 1 pass", P, "approximate", passes=1),
        Method("BSS, 2 passes", P, "approximate", passes=2),
        Method("RAC, equal rows", CORRECTION, "correction", equal_rows=True),
    )
}


class OfflineTrainer(BSSTrainer):
    """Contexts of each quarter of the training are made by the model that it began with (BASH in rounds).

    As ``train_rounds`` does, but for one optimizer and one learning-rate schedule over all rounds, so that nothing but
    the age of the contexts tells it from the others. The first quarter is under references: no model is before it.
    """

    _round = 0

    def make_contexts(self, rows, self_prob: float) -> MixedContext:
        now = self.state.global_step * ROUNDS // self.state.max_steps
        if now == 0:
            self_prob = 0.0
        elif now > self._round:
            self._round = now
            snapshot = copy.deepcopy(self.accelerator.unwrap_model(self.model))
            self.generator = self.args.generator(snapshot, self.processing_class)
        return super().make_contexts(rows, self_prob)


class ApproximateTrainer(BSSTrainer):
    """Contexts from a fixed number of teacher-forced passes (Parallel Scheduled Sampling, arXiv 1906.04331)."""

    passes = 1

    def make_contexts(self, rows, self_prob: float) -> MixedContext:
        prompts, references = ([getattr(row, name).tolist() for row in rows] for name in ("prompt", "reference"))
        batch = Rows(prompts, references, [row.sample_id for row in rows])
        model = self.generator.model.eval()
        key = step_seed(self.args.seed, self.state.global_step)
        tokens = parallel_scheduled_sampling(model, batch, self_prob, self.passes, seed=key)
        model.train()
        lengths = [[len(row) for row in part] for part in (batch.prompts, batch.references)]
        return MixedContext(
            tokens, [torch.ones_like(row, dtype=torch.bool) for row in tokens], ContextStats.untouched(*lengths)
        )


def train(task: AnyTask, method: Method, seed: int, setting: Setting, without: Dataset) -> tuple[PreTrainedModel, int]:
    """The model trained on rows that are not ``without``, and how many tokens it has seen, padding aside."""
    torch.manual_seed(seed)
    model = task.model(setting.width, setting.layers)
    correction = method.kind == "correction"
    rows = task.rows(task.train_rows or setting.steps * setting.rows, seed=1000 + seed, without=without)
    options = dict(method.options)
    step_rows = setting.rows
    if correction:
        options["max_new_tokens"] = max(map(len, rows["answer_ids"]))
        if not method.equal_rows:
            step_rows = round(step_rows * _share_of_rows(task, rows))
    with tempfile.TemporaryDirectory() as folder:
        args = (RACConfig if correction else BSSConfig)(
            folder,
            max_steps=setting.steps,
            per_device_train_batch_size=step_rows,
            learning_rate=setting.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(WARMUP, setting.steps // 10),
            max_length=task.longest,
            token_budget=2048,
            balance=256,
            seed=seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=setting.steps,
            use_cpu=True,
            bf16=task.bf16,
            include_num_input_tokens_seen="non_padding",
            **options,
        )
        kinds = {
            "online": BSSTrainer,
            "offline": OfflineTrainer,
            "approximate": ApproximateTrainer,
            "correction": RACTrainer,
        }
        trainer = kinds[method.kind](model, args, train_dataset=rows, processing_class=task.tokenizer)
        if isinstance(trainer, ApproximateTrainer):
            trainer.passes = method.passes
        if method.kind in ("offline", "approximate"):
            trainer._reuse.on = False  # what made the contexts is not this step's forward
        trainer.train()
    return model.eval(), int(trainer.state.num_input_tokens_seen)


def _share_of_rows(task: AnyTask, rows: Dataset) -> float:
    """Rows of a correction that have as many tokens as one without: directly, and after an own answer and the cue."""
    prompt, answer = (sum(map(len, rows[name])) / len(rows) for name in ("prompt_ids", "answer_ids"))
    direct = prompt + answer
    return direct / (2 * direct + answer + len(CorrectionCue.of(task.tokenizer).ids))


def measure(task: AnyTask, method: Method, seed: int, setting: Setting) -> dict[str, float]:
    """Train and evaluate: shares of tokens and of answers that are right, on rows that no training has.

    ``rouge_l`` (F1) counts what stands in order, wherever it stands: one word too few makes all later *tokens* wrong.
    """
    rows = task.rows(task.test_rows, seed=1)
    model, seen = train(task, method, seed, setting, without=rows)
    references = list(rows["answer_ids"])
    longest = max(map(len, references))
    found: dict[str, float] = {"reference_token": _under_references(task, model, rows)}
    options: dict[str, Any] = {"max_new_tokens": longest, "batch_size": task.batch_size}
    if method.kind == "correction":
        both = generate_corrected(model, task.tokenizer, list(rows["prompt_ids"]), temperature=0.0, **options)
        answers, first = both.corrected, both.first
        found |= {f"first_{name}": value for name, value in _shares(task, first, references).items()}
    else:
        answers = answer(model, list(rows["prompt_ids"]), **options).tokens
    return found | _shares(task, answers, references) | {"tokens_seen": seen}


def _shares(task: AnyTask, answers: Sequence[torch.Tensor], references: list[list[int]]) -> dict[str, float]:
    pairs = list(zip([answer.tolist() for answer in answers], references, strict=True))
    right = [sum(a == b for a, b in zip(answer, reference, strict=False)) for answer, reference in pairs]
    overlap = [rouge(*(" ".join(map(str, row)) for row in pair))["rougeL"] for pair in pairs]
    return {
        "token": sum(right) / sum(map(len, references)),
        "exact": sum(task.is_right(*pair) for pair in pairs) / len(pairs),
        "rouge_l": sum(overlap) / len(pairs),
    }


@torch.no_grad()
def _under_references(task: AnyTask, model: PreTrainedModel, rows: Dataset) -> float:
    collate, right, learned = Collator(task.tokenizer.pad_token_id), 0, 0
    for first in range(0, len(rows), 8):
        batch = collate([*rows.select(range(first, min(first + 8, len(rows))))])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        right += int((logits.argmax(-1) == labels).sum())
        learned += int((labels != IGNORE_INDEX).sum())
    return right / learned


def describe(task: AnyTask, method: Method, setting: Setting) -> dict[str, Any]:
    """What a run depends on, for the record."""
    return {"task": task.name, "method": asdict(method), "setting": asdict(setting), "test_rows": task.test_rows}
