"""``BSSTrainer``: online batch-scheduled sampling inside ``transformers.Trainer``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor
from torch.utils.data import RandomSampler
from transformers import AutoTokenizer, PreTrainedModel
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput

from ..context.models import (
    max_positions,
    text_inputs,
    text_positions,
    transformers_model,
    vocab_size_of,
)
from ..data import Collator, DataError, check_sample_ids, load_rows, pad_token_id
from ..data.batches import IGNORE_INDEX, ROWS, lengths_of
from ..data.streams import StreamedRows, refuse_stream
from ..files import at_home, to_json
from ..provenance import columns_hash
from .checkpoints import (
    SETTINGS,
    STATE,
    check_resumed,
    check_same_models,
    check_savable,
    load_renamed,
    record_of,
    resumed_checkpoint,
    saving,
    whole_or_not_at_all,
)
from .config import BSSConfig
from .engines import engine_of
from .log_lines import show_lines, told_of_loss, told_of_mixing
from .losses import AnswerLoss, TokenMean
from .mixing import MixesContexts
from .objective import (
    adapters_of,
    changes_of_loss,
    check_target,
    compared,
    hashes_of,
    is_cross_entropy,
    load_model,
    make_loss,
)
from .processes import once_per_machine
from .sampling import SeededByEpoch
from .schedules import Schedule
from .streams import StreamProgress, check_stream, message_of, sorts_by_length, stream_loader
from .targets import REFERENCES, keep_references
from .tensor import allowed_to_resume, is_split_at_load, load_split, whole_optimizer

logger = logging.getLogger(__name__)

_ROW_COLUMNS = ("sample_id", "prompt_ids", "answer_ids", "is_learned", "context_ids", "is_self")
_BOOKKEEPING = (*ROWS, REFERENCES, "loss_weight", "read")  # columns that are not the model's
_OF_TIME = ("runtime", "samples_per_second", "steps_per_second")  # metrics of every evaluation


class BSSTrainer(MixesContexts):
    """Fine-tune a causal language model on contexts that are partly its own (arXiv 2410.14655, section on BSS).

    Before each optimizer step the contexts of the whole accumulated batch are made at once, with the current weights.
    Then the Trainer runs its ordinary step: inputs are the mixed contexts, labels the reference answers. Where the
    model allows it, the forward of that step takes what making the contexts has computed (``training.reuse``).

    Args:
        model: a transformers causal language model, a PEFT model around one, or a name for ``from_pretrained``, whose
            weights are then fp32: in bf16, small updates are rounded away (``args.bf16`` computes in mixed precision).
        args: ``BSSConfig``.
        train_dataset, eval_dataset: rows as ``tokenize_rows`` takes them (``prompt``/``completion`` or ``messages``),
            or as it returns them. Evaluation is teacher-forced: under reference contexts. An ``IterableDataset`` is
            read while it is trained on (docs/data.md, "Streams"); it needs ``args.max_steps``.
        processing_class: the tokenizer; by default it is loaded from where the model came from.
        schedule: a function (self_prob_start, self_prob, progress in [0, 1]) -> self-probability, in place of
            ``args.self_prob_schedule``.
        trust_remote_code: run the code that comes with a ``model`` given by name, its tokenizer, ``args.kl_model`` and
            ``args.teacher_model``.
        teacher: the frozen model of ``args.target="teacher"``, in place of ``args.teacher_model``. It gets no gradient.
        **kwargs: of ``transformers.Trainer``.

    Every training log has figures of the steps since the last one, in the process that logs: ``self_share`` (self
    tokens / answer tokens), ``agreement`` (self tokens equal to the reference / self tokens; absent where there are
    none), ``differing_share`` (self tokens that differ from it / answer tokens), ``computed_per_token`` (tokens
    computed / context tokens), ``tokens_per_second`` (context tokens / time), ``invalid`` (tokens that could not be
    sampled, as their logits were not finite), and, as means per step, ``self_prob``, ``passes``, ``context_seconds``
    and ``training_seconds``, with ``weights="sharded"`` also ``passes_in_step`` (that all processes run together,
    trials of the model included); with fp16 also ``skipped_steps`` (steps that the loss
    scaler left out, as gradients overflowed); on a GPU with ``cuda_graphs`` also ``replayed_share`` (passes that were
    replays of CUDA graphs / passes) and ``padding_share`` (padding / tokens that passes computed with it). On a stream
    they also have what was read so far, by all processes: ``rows_read``, ``rows_kept``, ``rows_truncated``,
    ``rows_dropped``, and ``rows_dropped/REASON``. They are printed as lines (``log_lines``), where transformers would
    print dicts.

    Only ids of the tokenizer are sampled. Where the model's embedding is padded with more rows, a warning says so.

    Raises:
        ValueError: arguments that don't go together, such as a token without a row in the model's embedding, or weights
            that can't be trained: fp16, or not finite.
        DivergedError: (by ``train``) a loss, a gradient or the weights are not finite any more; it names the step.

    Example:
        >>> config = BSSConfig("outputs/bss", self_prob=0.25, max_steps=100)
        >>> BSSTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", config, train_dataset=rows).train()
    """

    _weighs_rows = False  # whether batches have a column loss_weight
    _weighing = "direct_weight"  # the options that such a column comes from
    _learns_rows_once = True  # so that the loss of a step is a mean over its learned tokens
    _lean_by_default = False  # also where self_prob is 0
    collator_class = Collator
    compute_loss_func: Callable | None

    def __init__(
        self,
        model: PreTrainedModel | torch.nn.Module | str,
        args: BSSConfig,
        *,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        data_collator=None,
        schedule: Schedule | None = None,
        trust_remote_code: bool = False,
        teacher: PreTrainedModel | None = None,
        **kwargs,
    ):
        if not isinstance(args, BSSConfig):
            raise TypeError(f"args is a {type(args).__name__}; BSSTrainer takes a BSSConfig")
        self._trust_remote_code, self._teacher = trust_remote_code, teacher
        if isinstance(model, str | Path):
            model = load_model(at_home(model), torch.float32, trust_remote_code)
        name = transformers_model(model).name_or_path
        if processing_class is None and not name:
            raise ValueError("the model was not loaded by name, so its tokenizer can't be found: give processing_class")
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        self._take_model(model, args, processing_class, schedule)
        limit = max_positions(self.generator.model)
        if args.max_length is None:
            args.max_length = limit
        elif limit is not None and args.max_length > limit:
            raise ValueError(f"max_length is {args.max_length}, but the model has {limit} positions; lower max_length")

        args.check_evaluation(eval_dataset is not None)
        self._stream: StreamProgress | None = None
        self._resumed_from: str | None = None
        # _prepare reads these; the Trainer's constructor sets them again.
        self.processing_class, self.args, self.eval_dataset = processing_class, args, None
        train_dataset, eval_dataset = self._prepare("train", train_dataset), self._prepare("eval", eval_dataset)
        with allowed_to_resume(args, transformers_model(model)):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                data_collator=data_collator or self.collator_class(pad_token_id(processing_class)),
                **kwargs,
            )
        self._engine = engine_of(self)
        if args.kl_weight and not args.kl_model and not adapters_of(self) and not self._engine.can_be_copied:
            raise ValueError(
                "kl_weight is given, but the model is sharded or loaded in the first process alone, so no frozen copy "
                "of it can be made: give kl_model (--kl-model), a folder or a name, which each process loads"
            )
        self._privileged = check_target(self)
        self._end_answers_where_rows_end()
        check_savable(self.generator.model, adapter=adapters_of(self) is not None)
        self._check_best_metric()
        self._known_rows_hash: str | None = None
        self._known_hashes: dict[str, str | None] | None = None  # of models that this one is compared with
        self._checked: str | None = None  # a checkpoint that this run can go on from
        self._answer_loss: AnswerLoss | None = None
        self._cross_entropy_alone = self._computed_loss = False
        self._begin_mixing()
        smoother = self.label_smoother  # type: ignore[has-type]
        # The Trainer shifts labels by the name of the model's class, which FSDP2 changes.
        self._label_smoother = None if smoother is None else partial(smoother, shift_labels=True)
        show_lines(self, self._told_of_contexts, self._told_of_loss)

    def _learn_of_model(self) -> None:
        super()._learn_of_model()
        if self._resumed_from is not None:
            check_same_models(self._resumed_from, self._hashes())

    def _told_of_contexts(self) -> str:
        """What the contexts of this run are, for the lines of the log; `_told_of_loss` likewise."""
        return told_of_mixing(self.args, by_function=self.schedule is not None)

    def _told_of_loss(self) -> str:
        return told_of_loss(self.args)

    def _learn_of_loss(self) -> None:
        self._answer_loss = make_loss(self)
        self._cross_entropy_alone = is_cross_entropy(self)

    def _check_best_metric(self) -> None:
        """Raise ValueError if the best checkpoint is chosen by a metric that no evaluation has."""
        args, sets = self.args, self.eval_dataset
        metric = args.metric_for_best_model
        if metric is None or args.eval_strategy == "no" or self.compute_metrics is not None:
            return
        known = self._metrics_of_evaluations()
        if isinstance(sets, dict):
            known = [f"{one}_{of}" for one in sets for of in known]
        if metric.removeprefix("eval_") not in known:
            losses = ", ".join(f"eval_{one}" for one in known if not one.endswith(_OF_TIME))
            raise ValueError(
                f"metric_for_best_model is {metric!r}, which no evaluation has; accepted: {losses}, or a metric of "
                "compute_metrics"
            )

    def _metrics_of_evaluations(self) -> list[str]:
        """Names of what an evaluation measures, without a prefix."""
        return ["loss", *_OF_TIME]

    def _end_answers_where_rows_end(self) -> None:
        """Make the trained model end its answers as its training rows do, also when it is loaded later."""
        config = getattr(self.generator.model, "generation_config", None)
        known = self.generator.eos_token_ids
        more = sorted(self.args.answer_ends(self.processing_class) - set(known))
        if config is not None and more:
            config.eos_token_id = [*known, *more]

    def _get_train_sampler(self, *args, **kwargs):
        sampler = super()._get_train_sampler(*args, **kwargs)
        seeded = self.accelerator.dataloader_config.use_seedable_sampler  # by accelerate, if it is plainly random
        if isinstance(sampler, LengthGroupedSampler) or (type(sampler) is RandomSampler and not seeded):
            sampler = SeededByEpoch(sampler, self.args.seed if self.args.data_seed is None else self.args.data_seed)
        return sampler

    def _next_batches(self, epoch_iterator, num_batches, device):
        try:
            batches, num_items = super()._next_batches(epoch_iterator, num_batches, device)
        except DataError as error:
            raise DataError(message_of(error)) from error
        if self._stream is not None:
            self._stream.take(batches)
        return batches, num_items

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        asked = "last" if resume_from_checkpoint is True else at_home(resume_from_checkpoint)
        try:
            output = super().train(resumed_checkpoint(asked, self.args.output_dir), *args, **kwargs)
            if self._stream is not None:
                self._stream.tell()
            return output
        finally:
            self._stream = self._resumed_from = None

    def _save(self, output_dir=None, state_dict=None):
        output_dir = at_home(output_dir or self.args.output_dir)
        with saving(output_dir):
            super()._save(output_dir, state_dict)
            self._hashes()  # of weights that may be split over processes
            if not self.args.should_save:  # every process is here
                return
            self._save_settings(Path(output_dir))
            if adapters_of(self) and (config := getattr(self.generator.model, "generation_config", None)):
                config.to_json_file(Path(output_dir) / "generation_config.json")  # where answers end; PEFT writes none

    def _save_settings(self, folder: Path) -> None:
        record = to_json(record_of(self.args, self._rows_hash(), self._hashes()), indent=1)
        (folder / SETTINGS).write_text(f"{record}\n")

    def _save_checkpoint(self, *args, **kwargs):
        self._stop_unless_weights_finite()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with whole_or_not_at_all(folder) if self.args.should_save else saving(folder):
            super()._save_checkpoint(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Write a model that ``from_pretrained`` loads, also where checkpoints are written in shards."""
        folder = Path(output_dir or self.args.output_dir)
        if self._engine.saves_shards and _internal_call and folder.name.startswith("checkpoint-"):
            self._hashes()  # of weights that may be split over processes
            if self.args.should_save:
                with saving(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                    self.generator.model.config.save_pretrained(str(folder))
                    self._save_settings(folder)
            return
        with self._engine.whole_state_dicts():
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir):
        split = is_split_at_load(self.model)
        with whole_optimizer(self.optimizer, keep=self.args.should_save) if split else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        split = checkpoint is not None and is_split_at_load(self.model)
        with whole_optimizer(self.optimizer, keep=False) if split else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self._go_on_from(resume_from_checkpoint)
        if is_split_at_load(self.model):
            load_split(resume_from_checkpoint, self.model)
        elif self._engine.keeps_names or not load_renamed(
            resume_from_checkpoint, self.model if model is None else model
        ):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _go_on_from(self, checkpoint: str) -> None:
        self.check_resumed(checkpoint)
        super()._go_on_from(checkpoint)
        self._resumed_from = checkpoint

    def _load_best_model(self):
        if is_split_at_load(self.model):
            load_split(self.state.best_model_checkpoint, self.model)
        elif self._engine.keeps_names or not load_renamed(self.state.best_model_checkpoint, self.model):
            super()._load_best_model()

    def check_resumed(self, checkpoint: str | Path) -> None:
        """Raise ResumeError if this run can't go on from ``checkpoint``: broken, or of other settings or rows."""
        if str(checkpoint) != self._checked:
            check_resumed(checkpoint, self.args, self._rows_hash)
            if self._known:  # else when these models are loaded
                check_same_models(checkpoint, self._hashes())
            self._checked = str(checkpoint)

    def _hashes(self) -> dict[str, str | None]:
        """Of the weights of other models that this one is compared with."""
        if self._known_hashes is None:
            self._known_hashes = hashes_of(self._answer_loss)
        return self._known_hashes

    def _rows_hash(self) -> str | None:
        """Of what training rows are; a stream has none."""
        if not isinstance(self.train_dataset, Dataset):
            return None
        if self._known_rows_hash is None:
            names = {*_ROW_COLUMNS, *([self.args.length_column_name] if sorts_by_length(self.args) else [])}
            self._known_rows_hash = columns_hash(self.train_dataset, names)
        return self._known_rows_hash

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self._stream is not None:
            self._stream.save(output_dir)

    def get_train_dataloader(self):
        rows, batch_size = self.train_dataset, self._train_batch_size
        if not isinstance(rows, StreamedRows):
            return super().get_train_dataloader()
        self._stream = StreamProgress(rows, self.args, batch_size, self._resumed_from)
        return stream_loader(rows, self.args, batch_size, self.data_collator)

    def get_eval_dataloader(self, eval_dataset=None):
        known: Any = self.eval_dataset
        rows = known if eval_dataset is None else known[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        if not isinstance(rows, StreamedRows):
            return super().get_eval_dataloader(eval_dataset)
        return stream_loader(rows, self.args, self.args.eval_batch_size, self.data_collator)

    def get_test_dataloader(self, test_dataset):
        if not isinstance(test_dataset, StreamedRows):
            return super().get_test_dataloader(test_dataset)
        return stream_loader(test_dataset, self.args, self.args.eval_batch_size, self.data_collator)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._computed_loss = False
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._computed_loss and (asked := changes_of_loss(self)):
            raise ValueError(
                f"compute_loss of {type(self).__name__} takes the place of the loss that {', '.join(asked)} would "
                "change: have it call that of its base class, or leave these out"
            )
        return loss

    def _before_contexts(self, batches: list[dict[str, Tensor]]) -> None:
        if self.args.learned_target in ("teacher_forced", "privileged"):
            keep_references(batches)

    @property
    def _loss_is_users(self) -> bool:
        ours = self._answer_loss is not None and self._answer_loss.outside
        return self.compute_loss_func is not None and not ours

    def _ids_guessed_from(self) -> int | None:
        computed = type(self).compute_loss  # by a subclass of the user's, perhaps
        is_plain = (
            self._learns_rows_once
            and self._cross_entropy_alone
            and not self._loss_is_users
            and computed.__module__.startswith("selfgen.")
        )
        return vocab_size_of(self.generator.model) if is_plain else None

    def _look_at_loss(self) -> None:
        self._loss_looks = False
        if self._answer_loss is None:
            return
        with self._engine.autocast():
            changed = self._answer_loss.look_again()
        if changed:
            step = self.state.global_step + 1
            logger.warning("from step %d on the loss is not lean: %s", step, self._answer_loss.not_lean)

    def prediction_step(self, model, inputs, *args, **kwargs):
        loader = self.accelerator.gradient_state.active_dataloader
        if isinstance(getattr(loader, "dataset", None), StreamedRows):  # whose last batch weighs as many rows as it has
            loader.remainder = len(inputs["labels"])
        inputs = self._evaluated.without_repeated(inputs, self.accelerator, self.args.row_share)
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None:
            self._evaluated.add(loss, (inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        return loss, logits, labels

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """The Trainer's, with a loss that is the mean over tokens; the Trainer's is a mean of the means of batches.

        If the loss of a batch is not finite, neither is the mean: a warning tells, and it is never the best.
        """
        self._evaluated = TokenMean()
        self._engine.shard(self)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        name = f"{metric_key_prefix}_loss"
        if name in (output.metrics or {}) and not self._loss_is_users and self.args.n_gpu <= 1:
            output.metrics[name] = self._evaluated.over_all(self.accelerator)
            if broken := self._evaluated.not_finite:
                logger.warning(
                    "step %d: %s is %s, as the loss of %d of %d batches is not finite",
                    self.state.global_step,
                    name,
                    output.metrics[name],
                    broken,
                    len(self._evaluated.means),
                )
        return output

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        return super().evaluate(self._prepare("eval", eval_dataset), *args, **kwargs)

    def evaluate_at_the_end(self) -> None:
        """Evaluate, if there is evaluation data that ``eval_strategy`` has never used."""
        if self.eval_dataset is not None and self.args.eval_strategy == "no":
            self.evaluate()

    def save_state(self):
        """Write ``trainer_state.json`` to the output folder, all of it or nothing."""
        if self.is_world_process_zero():
            beside = Path(self.args.output_dir) / f".{STATE}.partial"
            with saving(self.args.output_dir):
                self.state.save_to_json(str(beside))
                beside.replace(Path(self.args.output_dir) / STATE)

    def predict(self, test_dataset, *args, **kwargs):
        return super().predict(self._prepare("test", test_dataset), *args, **kwargs)

    def _prepare(self, name: str, rows):
        """The rows tokenized, if they are not yet: a data set, or several by name."""
        if isinstance(rows, IterableDatasetDict) and not name.startswith("eval"):
            rows = rows["train"]
        if isinstance(rows, dict) and (name.startswith("eval") or not isinstance(rows, DatasetDict)):
            return {key: self._prepare(f"{name} {key}", part) for key, part in rows.items()}
        if rows is None or (isinstance(rows, str) and isinstance(self.eval_dataset, dict)):  # one of several, by name
            return rows
        if isinstance(rows, IterableDataset | StreamedRows):
            return self._prepare_stream(name, rows)
        rows = tokenized(name, rows, self.processing_class, self.args, self._longest_row(name))
        column = self.args.length_column_name
        if sorts_by_length(self.args) and column not in rows.column_names:
            plain = rows.with_format(None)
            lengths = plain.map(lengths_of, batched=True, remove_columns=rows.column_names, desc="Lengths")
            rows = plain.add_column(column, lengths["length"][:])
        return rows

    def _prepare_stream(self, name: str, rows: IterableDataset | StreamedRows) -> StreamedRows:
        if isinstance(rows, StreamedRows):
            return rows
        training = name == "train"
        if training:
            check_stream(self.args)
        rank, processes = self.args.row_share
        split = {"rank": rank, "processes": processes} if training else {}
        options = self.args.of_rows(self._longest_row(name))
        return StreamedRows(rows, self.processing_class, options, name=name, endless=training, **split)

    def _longest_row(self, name: str) -> int | None:
        """Most tokens of a row of the data set ``name``, before a method adds to it; None is no limit."""
        return self.args.max_length

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._computed_loss = True
        if not model.training and not self._loss_is_users:
            num_items_in_batch = None  # the mean over the tokens that this process has
        batch = inputs
        inputs = {key: value for key, value in inputs.items() if key not in _BOOKKEEPING}
        inputs = text_inputs(self.generator.model, inputs["input_ids"]) | inputs
        compute_loss = super().compute_loss
        own: Callable[[], AbstractContextManager] = nullcontext
        self.label_smoother = self._label_smoother
        ours = self._answer_loss if model.training and not self._loss_is_users else None
        if return_outputs and ours is not None and ours.lean:
            raise ValueError(
                "compute_loss is asked for outputs in training, but the loss is lean, so that there are no logits in "
                "them: give lean_loss=False, or do not ask for outputs"
            )
        if ours is not None and (given := compared(self, batch)) is not None:
            self.label_smoother = None  # the smoothing is the loss's own; in evaluation it is the Trainer's
            own = partial(ours.inside, compared=given)

        def loss(model):
            with own(), text_positions(self.generator.model):
                return compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)  # may take labels out

        return self._loss_of_step(model, loss, batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._stream is not None:
            logs.update(self._stream.logs())
        super().log(logs, start_time)


def tokenized(name: str, rows, tokenizer, args: BSSConfig, max_length: int | None) -> Dataset:
    """``rows`` as ``tokenize_rows`` returns them; a log line says how many were kept, cut and dropped."""
    rows = load_rows(rows) if isinstance(rows, DatasetDict) else rows
    refuse_stream(rows, "rounds")
    if hasattr(rows, "column_names") and {"sample_id", "prompt_ids", "answer_ids"} <= set(rows.column_names):
        check_sample_ids(rows)
        return rows

    def tokenize() -> Dataset:
        try:
            dataset, report = args.tokenize(load_rows(rows), tokenizer, max_length)
        except DataError as error:  # of which of several data sets
            raise DataError(f"{name} data: {error}") from error
        logger.log(report.level, "%s data: %s", name, report)
        return dataset

    return once_per_machine(tokenize)
