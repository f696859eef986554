"""The methods that are compared, over equal optimizer steps and, but where said, equal tokens seen.

``BSS`` has a constant ``self_prob`` of 0.25 on every task; candidates and ablations change it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback

from selfgen import BSSConfig, BSSTrainer, ContextGenerator, MixedContext, RACConfig, RACTrainer
from selfgen.context import ContextStats
from selfgen.correction import CorrectionCue
from selfgen.data import IGNORE_INDEX, Collator, rows_of
from selfgen.evaluation import Corrections
from selfgen.evaluation.answers import rouge
from selfgen.generation import answer, generate_corrected
from selfgen.training.mixing import step_seed
from tools.real_parts import cache_dir

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
    lora_rank: int = 0  # of an adapter on all linear layers; 0 trains all weights
    lora_alpha: int = 32


@dataclass(frozen=True)
class Method:
    """``kind`` is online (which SFT is at p = 0), offline, approximate (K passes), correction or own_answers (GKD).

    A row of a correction is two, and longer; so that steps have as many tokens as the others', they have fewer rows,
    unless ``equal_rows``. ``needs`` is what not every task has: a base (it begins with a pretrained model) or a teacher
    (a larger model can be trained for it).
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "online"
    passes: int = 0
    equal_rows: bool = False
    needs: str = ""

    def is_for(self, task: AnyTask) -> bool:
        return not self.needs or getattr(task, f"has_{self.needs}")

    @property
    def is_sft_until_it_mixes(self) -> bool:
        """Whether the method trains as SFT with a lean loss, bit for bit, as long as no context is mixed."""
        of_contexts = {"self_prob", "self_prob_schedule", "self_prob_warmup", "sampling_temperature"}
        return self.kind == "online" and self.options.keys() <= of_contexts

    @property
    def waits(self) -> bool:
        """Whether a training may end before any context is mixed."""
        return self.options.get("self_prob_warmup", self.options.get("self_prob")) in ("settled", "auto")


def by_name(*methods: Method) -> dict[str, Method]:
    return {method.name: method for method in methods}


P, LESS, AUTO = {"self_prob": 0.25}, {"self_prob": 0.1}, {"self_prob": "auto"}
PLAIN = {"self_prob": 0.0}
FALLS = {"self_prob_schedule": "disagreement"}
MORE = {"self_prob": 0.5} | FALLS
WAITS = {"self_prob_warmup": "settled"}
PREFIX = P | {"granularity": "prefix"}
CORRECTION = {"direct_weight": 1.0}
METHODS = by_name(
    Method("SFT", PLAIN),
    Method("BSS", P),
    Method("BASH", P, "offline"),
    Method("RAC", CORRECTION, "correction"),
    Method("BSS + RAC", P | CORRECTION, "correction"),
)
BASELINES = by_name(
    Method("SFT + DFT", PLAIN | {"target": "dft"}),
    Method("SFT + KL to base", PLAIN | {"kl_weight": 0.1}, needs="base"),
    Method(
        "GKD, whole answers", PLAIN | {"target": "teacher", "target_weight": 1.0}, kind="own_answers", needs="teacher"
    ),
)
CANDIDATES = by_name(
    Method("BSS, p = 0.1", LESS),
    Method("BSS, greedy", P | {"sampling_temperature": 0.0}),
    Method("BSS, p falls from 0.25", P | FALLS),
    Method("BSS, p falls from 0.4", {"self_prob": 0.4} | FALLS),
    Method("BSS, p falls from 0.5", MORE),
    Method("BSS, p falls from 0.5, cooler", MORE | {"sampling_temperature": 0.7}),
    Method("BSS, p falls from 0.5, cold", MORE | {"sampling_temperature": 0.5}),
    Method("BSS, p falls from 0.5, waits", MORE | WAITS),
    Method("BSS, p falls from 0.5, cooler, waits", MORE | WAITS | {"sampling_temperature": 0.7}),
    Method("BSS, p falls from 0.5, cold, waits", MORE | WAITS | {"sampling_temperature": 0.5}),
    Method("BSS, p falls from 0.25, waits", P | FALLS | WAITS),
    Method("BSS, p falls from 0.4, waits", {"self_prob": 0.4} | FALLS | WAITS),
    Method("BSS, auto", AUTO),
    Method("BSS, prefix", PREFIX),
    Method("BSS, prefix, after switch", PREFIX | {"loss_on": "after_switch"}),
    Method("BSS + DFT", P | FALLS | {"target": "dft"}),
    Method("BSS + teacher-forced", P | FALLS | {"target": "teacher_forced"}),
    Method("BSS + teacher-forced, waits", P | FALLS | WAITS | {"target": "teacher_forced"}),
    Method("BSS, privileged", P | FALLS | {"target": "privileged"}),
)
"""One of these may become the default."""
ABLATIONS = by_name(
    Method("BSS, p = 0.5", {"self_prob": 0.5}),
    Method("BSS, p = 0.9", {"self_prob": 0.9}),
    Method("BSS, p rising to 0.25", P | {"self_prob_schedule": "linear"}),
    Method("BSS, p rising to 0.5", {"self_prob": 0.5, "self_prob_schedule": "linear"}),
    Method("BSS, confident", P | {"min_reference_prob": 0.5}),
    Method("BSS, spans", P | {"granularity": "span"}),
    Method("BSS, answers", P | {"granularity": "sequence"}),
    Method("BSS, 1 pass", P, "approximate", passes=1),
    Method("BSS, 2 passes", P, "approximate", passes=2),
    Method("RAC, equal rows", CORRECTION, "correction", equal_rows=True),
    Method("SFT, lean loss", PLAIN | {"lean_loss": True}),
    Method(
        "BSS, p falls from 0.5, cooler, from half-way on", MORE | {"self_prob_warmup": 0.5, "sampling_temperature": 0.7}
    ),
)
ALL_METHODS = METHODS | BASELINES | CANDIDATES | ABLATIONS


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


class OwnAnswersTrainer(BSSTrainer):
    """GKD (arXiv 2306.13649): half of the rows have a whole answer of the model in place of the reference.

    Of both, the model learns the distribution of the teacher (``target="teacher"``).
    """

    own_share, max_new_tokens = 0.5, 256

    def prepare_batches(self, batches):
        step = self.state.global_step
        draw = torch.Generator().manual_seed(step_seed(self.args.seed, step, stream=1))
        return [self._with_own_answers(batch, draw, step_seed(self.args.seed, step, stream=1)) for batch in batches]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self._get_num_items_in_batch(batches, device) if batches else num_items

    def _with_own_answers(self, batch, draw: torch.Generator, seed: int):
        rows = rows_of(batch)
        answers = [row.reference for row in rows]
        own = (torch.rand(len(rows), generator=draw) < self.own_share).nonzero().flatten().tolist()
        if own:
            found = self.generator.answer(
                [rows[place].prompt for place in own],
                max_new_tokens=self.max_new_tokens,
                seed=seed,
                sample_ids=[rows[place].sample_id for place in own],
                batch_size=len(own),
            )
            for place, tokens in zip(own, found.tokens, strict=True):
                answers[place] = tokens
        collate = Collator(self.processing_class.pad_token_id)
        return collate.pad([row.prompt for row in rows], answers, [row.sample_id for row in rows])


def teacher_of(task: AnyTask, seed: int, setting: Setting, without: Dataset) -> tuple[Path, float]:
    """The folder of a model of twice the width, trained as SFT is, and the seconds that took; made once, then kept."""
    wider = replace(setting, width=2 * setting.width, layers=setting.layers + 1)
    about = json.dumps([task.name, seed, asdict(wider), task.test_rows, task.train_rows], sort_keys=True)
    folder = cache_dir() / "quality" / f"{task.name}-{seed}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        trained = train(task, METHODS["SFT"], seed, wider, without)
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            trained.model.save_pretrained(staging)
            (staging / "seconds.json").write_text(json.dumps(trained.seconds))
            with contextlib.suppress(OSError):  # another process was faster
                staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return folder, json.loads((folder / "seconds.json").read_text())


class LearningCurve(TrainerCallback):
    """Measures the model on its way, at shares of all steps; the training goes on as if nothing had been.

    ``seconds`` is what that took, in processor time.
    """

    def __init__(self, measure: Callable[[], dict[str, float]], shares: Sequence[float]):
        self.measure, self.shares = measure, shares
        self.points: list[dict[str, float]] = []
        self.seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in {round(share * state.max_steps) for share in self.shares}:
            started = time.process_time()
            with torch.random.fork_rng():
                self.points.append({"step": state.global_step, **self.measure()})
            self.seconds += time.process_time() - started


@dataclass(frozen=True)
class Trained:
    """``seconds`` are those of the training, contexts included and points of the curve not, in processor time.

    ``self_prob`` is the mean of all steps, 0 if no context was mixed; ``differing_share`` that of all answer tokens
    which were self tokens other than the reference.
    """

    model: PreTrainedModel
    tokens_seen: int  # padding aside
    seconds: float
    points: list[dict[str, float]]
    self_prob: float
    differing_share: float
    teacher_seconds: float = 0.0


def train(
    task: AnyTask,
    method: Method,
    seed: int,
    setting: Setting,
    without: Dataset,
    curve: Callable[[PreTrainedModel], dict[str, float]] | None = None,
) -> Trained:
    """Train on rows that are not ``without``; ``curve`` measures the model on its way."""
    options = dict(method.options)
    teacher_seconds = 0.0
    if method.kind == "own_answers":
        teacher, teacher_seconds = teacher_of(task, seed, setting, without)
        options["teacher_model"] = str(teacher)
    torch.manual_seed(seed)
    model = task.model(setting.width, setting.layers)
    if setting.lora_rank:
        model = with_lora(model, setting)
    correction = method.kind == "correction"
    rows = task.rows(task.train_rows or setting.steps * setting.rows, seed=1000 + seed, without=without)
    step_rows, longest = setting.rows, max(map(len, rows["answer_ids"]))
    if correction:
        options["max_new_tokens"] = longest
        if not method.equal_rows:
            step_rows = round(step_rows * _share_of_rows(task, rows))
    if method.kind in ("offline", "approximate"):
        options["reuse_passes"] = False  # what made the contexts is not this step's forward
    if task.by_length:
        options["train_sampling_strategy"] = "group_by_length"
    callback = None if curve is None else LearningCurve(partial(curve, model), task.curve_shares)
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
            include_num_input_tokens_seen="non_padding",
            **options,
        )
        kinds = {
            "online": BSSTrainer,
            "offline": OfflineTrainer,
            "approximate": ApproximateTrainer,
            "correction": RACTrainer,
            "own_answers": OwnAnswersTrainer,
        }
        trainer = kinds[method.kind](
            model,
            args,
            train_dataset=rows,
            processing_class=task.tokenizer,
            callbacks=[] if callback is None else [callback],
        )
        if isinstance(trainer, ApproximateTrainer):
            trainer.passes = method.passes
        if isinstance(trainer, OwnAnswersTrainer):
            trainer.max_new_tokens = longest
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
    seen = int(trainer.state.num_input_tokens_seen)
    points, curve_seconds = ([], 0.0) if callback is None else (callback.points, callback.seconds)
    logged = trainer.state.log_history[0]  # one line, of all steps
    shares = logged.get("self_prob", 0.0), logged.get("differing_share", 0.0)
    return Trained(model.eval(), seen, seconds - curve_seconds, points, *shares, teacher_seconds)


def with_lora(model: PreTrainedModel, setting: Setting):
    """The model with an adapter on all linear layers, without dropout."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=setting.lora_rank,
        lora_alpha=setting.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def _share_of_rows(task: AnyTask, rows: Dataset) -> float:
    """Rows of a correction that have as many tokens as one without: directly, and after an own answer and the cue."""
    prompt, answer = (sum(map(len, rows[name])) / len(rows) for name in ("prompt_ids", "answer_ids"))
    direct = prompt + answer
    return direct / (2 * direct + answer + len(CorrectionCue.of(task.tokenizer).ids))


def measure(task: AnyTask, method: Method, seed: int, setting: Setting, *, count_passes: bool = True) -> dict[str, Any]:
    """Train and evaluate: the record's ``found``, ``curve`` and seconds.

    Found are shares of tokens and of answers that are right, on rows that no training has. ``rouge_l`` (F1) counts what
    stands in order, wherever it stands: one word too few makes all later *tokens* wrong. The last point of the curve is
    of the trained model. Seconds are processor time, as other processes may run.
    """
    rows = task.rows(task.test_rows, seed=1)
    some = rows.select(range(min(task.curve_rows, len(rows))))
    trained = train(task, method, seed, setting, rows, partial(_point, task, method, some))
    started = time.process_time()
    corrects = method.kind == "correction" or (method.name == "SFT" and not task.has_base)
    answers = _answers(task, trained.model, rows, corrects=corrects)
    right = _right_under_references(task, trained.model, rows)
    found: dict[str, float] = {
        "tokens_seen": trained.tokens_seen,
        "self_prob": trained.self_prob,
        "differing_share": trained.differing_share,
    }
    if len(answers) > 1:
        found |= _corrections(task, answers[0], answers[1], list(rows["answer_ids"]))
    if method.kind != "correction":
        answers = answers[:1]
        if count_passes:
            found |= _passes(trained.model, rows.select(range(min(task.pass_rows, len(rows)))))
    found |= _shares_of_all(task, answers[-1], rows, right)
    last = _shares_of_all(task, answers[-1][: len(some)], some, right[: len(some)])
    return {
        "found": found,
        "curve": [*trained.points, {"step": setting.steps, **_of_curve(last)}],
        "train_seconds": round(trained.seconds, 1),
        "teacher_seconds": round(trained.teacher_seconds, 1),
        "evaluation_seconds": round(time.process_time() - started, 1),
    }


def _point(task: AnyTask, method: Method, rows: Dataset, model: PreTrainedModel) -> dict[str, float]:
    """Of a learning curve; the model may be in the midst of a training."""
    was_training = model.training
    model.eval()
    try:
        right = _right_under_references(task, model, rows)
        answers = _answers(task, model, rows, corrects=method.kind == "correction")
        return _of_curve(_shares_of_all(task, answers[-1], rows, right))
    finally:
        model.train(was_training)


def _of_curve(found: dict[str, float]) -> dict[str, float]:
    return {name: found[name] for name in ("reference_token", "token", "exact")}


def _answers(task: AnyTask, model: PreTrainedModel, rows: Dataset, *, corrects: bool) -> list[list[list[int]]]:
    """[answers], or [first answers, what the model corrects them to]; token ids."""
    prompts = list(rows["prompt_ids"])
    options: dict[str, Any] = {"max_new_tokens": max(map(len, rows["answer_ids"])), "batch_size": task.batch_size}
    if corrects:
        both = generate_corrected(model, task.tokenizer, prompts, temperature=0.0, **options)
        found = [both.first, both.corrected]
    else:
        found = [answer(model, prompts, **options).tokens]
    return [[one.tolist() for one in answers] for answers in found]


def _corrections(
    task: AnyTask, first: list[list[int]], corrected: list[list[int]], references: list[list[int]]
) -> dict[str, float]:
    """Shares of first and of corrected answers that are right, and shares of all rows that change sides."""
    right = [
        (task.is_right(before, reference), task.is_right(after, reference))
        for before, after, reference in zip(first, corrected, references, strict=True)
    ]
    changes = Corrections.of(right)
    found = {f"first_{name}": value for name, value in _shares(task, first, references).items()}
    found |= {f"corrected_{name}": value for name, value in _shares(task, corrected, references).items()}
    return found | {
        "wrong_to_right": changes.wrong_to_right / len(right),
        "right_to_wrong": changes.right_to_wrong / len(right),
    }


def _passes(model: PreTrainedModel, rows: Dataset) -> dict[str, float]:
    """Passes per token of free runs as long as the references, row by row, with all guesses computed ahead.

    One token after the other is 1 pass per token. The first guess is the reference, as in training, or the answer of
    another row: whoever asks for an answer has no reference. The tokens are the same.
    """
    answers = list(rows["answer_ids"])
    others = [list(islice(cycle(answers[row - 1]), len(answer))) for row, answer in enumerate(answers)]
    found = {}
    for guesses, what in ((answers, ""), (others, "_unguided")):
        for temperature, how in ((1.0, ""), (0.0, "_greedy")):
            generator = ContextGenerator(model, temperature=temperature, token_budget=4096, balance=4096)
            passes = tokens = 0
            for row, guess in zip(rows, guesses, strict=True):
                ids = [row["sample_id"]]
                stats = generator.contexts([row["prompt_ids"]], [guess], 1.0, seed=1, sample_ids=ids).stats
                passes, tokens = passes + stats.passes, tokens + stats.answer_tokens
            found[f"passes_per_token{what}{how}"] = passes / tokens
    return found


def _shares_of_all(
    task: AnyTask, answers: list[list[int]], rows: Dataset, right: list[tuple[int, int]]
) -> dict[str, float]:
    under_references = sum(one for one, _ in right) / sum(learned for _, learned in right)
    return {"reference_token": under_references} | _shares(task, answers, list(rows["answer_ids"]))


def _shares(task: AnyTask, answers: list[list[int]], references: list[list[int]]) -> dict[str, float]:
    pairs = list(zip(answers, references, strict=True))
    right = [sum(a == b for a, b in zip(answer, reference, strict=False)) for answer, reference in pairs]
    overlap = [rouge(*(" ".join(map(str, row)) for row in pair))["rougeL"] for pair in pairs]
    return {
        "token": sum(right) / sum(map(len, references)),
        "exact": sum(task.is_right(*pair) for pair in pairs) / len(pairs),
        "rouge_l": sum(overlap) / len(pairs),
    }


@torch.no_grad()
def _right_under_references(task: AnyTask, model: PreTrainedModel, rows: Dataset) -> list[tuple[int, int]]:
    """(tokens right, tokens) of each row; rows of about the same length are computed together."""
    collate = Collator(task.tokenizer.pad_token_id)
    prompts, answers = ([len(row) for row in rows[name]] for name in ("prompt_ids", "answer_ids"))
    order = sorted(range(len(rows)), key=lambda row: (prompts[row] + answers[row], row))
    found: dict[int, tuple[int, int]] = {}
    for first in range(0, len(order), 8):
        some = order[first : first + 8]
        batch = collate([*rows.select(some)])
        kept = batch["input_ids"].shape[1] - min(prompts[row] for row in some) + 1  # from the last prompt token on
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=kept
        ).logits[:, :-1]
        labels = batch["labels"][:, 1 - kept :]  # [B, K - 1]
        right, learned = (logits.argmax(-1) == labels).sum(1), (labels != IGNORE_INDEX).sum(1)
        found |= dict(zip(some, zip(right.tolist(), learned.tolist(), strict=True), strict=True))
    return [found[row] for row in range(len(rows))]


def describe(task: AnyTask, method: Method, setting: Setting) -> dict[str, Any]:
    """What a run depends on, for the record."""
    return {"task": task.name, "method": asdict(method), "setting": asdict(setting), "test_rows": task.test_rows}
