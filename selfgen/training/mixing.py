"""``MixesContexts``: what batch-scheduled sampling adds to the steps of a Trainer, whatever its data and its loss."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..context import ContextStats, MixedContext, UnsupportedModelError
from ..context.hidden_states import ReuseError
from ..context.models import (
    active_adapters,
    check_4bit_layout,
    check_here,
    keep_4bit_layout,
    transformers_model,
    vocab_size_of,
)
from ..context.sharding import agreed, forget_steps, kept_whole, shard_again, tensor_parallel_size, together_of
from ..data import rows_of
from ..data.batches import IGNORE_INDEX, Row
from .batches import LEARN_ON, RowSlots, Step, unique_rows
from .between import Between
from .engines import TellHowWeightsAreHeld
from .meter import Meter, StepTimer
from .parallelism import check_even, check_tensor_parallel
from .processes import meet
from .reuse_trial import Loss, ReuseTrial
from .sampling import EpochOfSampler
from .schedules import Schedule
from .self_prob import SelfProb
from .tensor import has_partial_gradients
from .weights import (
    StopAtBrokenGradients,
    TellOfMissingGradients,
    check_finite,
    check_trainable,
    diverged,
    not_finite,
)

logger = logging.getLogger(__name__)

_FIRST_LOOK = 10  # the steps before the first look again
_LOOK_EVERY = 100  # steps between two looks at what contexts, reuse and a lean loss take for granted
_OF_TRAINER = logging.getLogger("transformers.trainer")


def _but_for_empty_epochs(record: logging.LogRecord) -> bool:
    """Leaves out what the Trainer says of an epoch without steps, where a run is at its end."""
    return "not to be a single sample" not in record.getMessage()


class MixesContexts(Trainer):
    """A Trainer whose steps learn references under contexts that are partly the model's own.

    Before each optimizer step the contexts of the whole accumulated batch are made at once, with the current weights,
    and written over the answers in ``input_ids``. Batches have the columns of ``data.batches.ROWS``.

    A subclass, whose own Trainer may be another one, calls ``_take_model``, sets ``_engine`` and calls
    ``_begin_mixing`` in its constructor, and has ``compute_loss`` go through ``_loss_of_step``. Its ``args`` have
    ``MixingOptions``.
    """

    _makes_contexts = True  # by passes, whose work may be used

    def _take_model(self, model: torch.nn.Module, args: Any, tokenizer: Any, schedule: Schedule | None = None) -> None:
        """Make what makes contexts; `_begin_mixing` follows when the Trainer's constructor is done.

        Raises:
            ValueError: a model that can't be trained, or a function in place of a schedule that takes none.
        """
        check_trainable(model)
        check_4bit_layout(model)
        keep_4bit_layout(model)
        check_here(transformers_model(model), everywhere=True)
        args.tensor_parallel = tensor_parallel_size(transformers_model(model))
        check_tensor_parallel(args, args.tensor_parallel)
        if args.tensor_parallel > 1 and (hasattr(model, "peft_config") or active_adapters(model)):
            raise ValueError(
                "the model is tensor parallel and has an adapter: PEFT's adapters on weights whose inputs are split "
                "(o_proj, down_proj) fail in plain fine-tuning, too. Leave tp_size out and shard the model with FSDP2, "
                "or train all weights"
            )
        self.generator = args.generator(model, tokenizer)
        self._tell_of_padding()
        args.check_schedule(schedule)
        self.schedule = schedule

    def _begin_mixing(self) -> None:
        """Call it at the end of a constructor, after `_take_model` and with an ``_engine``."""
        args = self.args
        if self._engine.is_sharded:
            self.generator._cuda_graphs = False  # gathered weights lie elsewhere in each step
        check_processes(args.world_size)
        self._step = Step()
        self._nothing_left = False  # to train
        self._told_of_nothing = False  # that a step learns
        self._logged_at: int | None = None  # the step of the last line of the log before the checkpoint
        self._looked = self._looks_now = self._loss_looks = False
        self._reuse = ReuseTrial(args, self.generator, self._engine, self._whole_weights)
        self._between = Between(self, self._engine)
        self._known = False  # what the model is like
        self._budget_agreed = False  # among processes
        has_graphs = args.cuda_graphs and args.device.type == "cuda"
        self.meter = Meter(scales_loss=self._engine.scales_loss, has_graphs=has_graphs)
        if self._engine.weights_are_here:
            self._learn_of_model()
        self.add_callback(StepTimer(self.meter))
        self._self_prob = SelfProb(args, self.accelerator, self.meter, self._ids_guessed_from)
        if self._makes_contexts:
            self.add_callback(self._self_prob)
        self.add_callback(EpochOfSampler())
        self.add_callback(TellHowWeightsAreHeld(self._engine))
        after = self._engine.steps_in_backward
        missing = TellOfMissingGradients(in_backward=after)
        self._unused = missing.unused if after else None
        self.add_callback(missing)
        if not self._engine.scales_loss:
            self.add_callback(StopAtBrokenGradients(self._engine.gradient_norm if after else None))

    def _learn_of_model(self) -> None:
        """Find out, once, what the model allows, with weights as they are before training."""
        with self._whole_weights(), self._engine.autocast():
            self.generator.check_causal(in_training=True)  # the loss of a model that sees the answer teaches nothing
            agreed(together_of(self.generator.model), partial(check_finite, self.model))  # each sees its own part
            self._reuse.on = self._makes_contexts and self._reuse.may_begin()
            self._learn_of_loss()
        self._known = True

    def _learn_of_loss(self) -> None:
        """The loss of the model before training, where it has to be known: none, here."""

    @contextmanager
    def _whole_weights(self, *, keep: bool = False) -> Iterator[None]:
        """Inside, each process runs as many forwards over the current weights as it needs; all enter together.

        The weights are whole, or others run along (``weights``). With ``keep``, a training forward follows at once.
        """
        with self._engine.own_forwards(self.model, keep=keep) as steps:
            yield
        if steps is not None:
            self.meter.counts["passes_in_step"] += steps.forwards

    def _tell_of_padding(self) -> None:
        tokens, rows = self.generator.vocab_size, vocab_size_of(self.generator.model)
        if tokens is not None:
            logger.warning(
                "the model has %d embedding rows for %d ids of the tokenizer: the ids %d to %d are padding and never "
                "sampled",
                rows,
                tokens,
                tokens,
                rows - 1,
            )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """All micro-batches of one optimizer step.

        None where the run goes on from the checkpoint of its last step, as the Trainer looks for its end after a step.
        """
        self._nothing_left = self.state.global_step >= self.state.max_steps
        if self._nothing_left:
            logger.warning(
                "nothing is left to train: the checkpoint is that of the last step, %d", self.state.global_step
            )
            _OF_TRAINER.addFilter(_but_for_empty_epochs)
            self.control.should_training_stop = True
            return [], None
        batches, num_items = self._next_batches(epoch_iterator, num_batches, device)
        if self._logged_at is not None:
            self._globalstep_last_logged, self._logged_at = self._logged_at, None
            self._total_loss_scalar -= self.meter.carried  # train_loss is the mean over the steps of this session
        self.meter.step_begin()
        if not self._known:
            self._learn_of_model()
        self._look_again()
        batches = self.prepare_batches(batches)
        self._step = Step(list(batches))
        if self.args.loss_on != "all":  # elsewhere after on_step_begin, where a callback may change the model
            self._mix_next()
            num_items = self._at_least_one(self._get_num_items_in_batch(batches, device))
        return batches, num_items

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        check_even(loader)
        return loader

    def _next_batches(self, epoch_iterator, num_batches, device):
        """Micro-batches as they are read, and the number of their learned tokens, as the Trainer's method has them."""
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _at_least_one(self, num_items):
        """The number of learned tokens of a step, by which its loss is divided: nothing learned is a loss of 0."""
        if num_items is None or torch.as_tensor(num_items).all():
            return num_items
        if not self._told_of_nothing:
            self._told_of_nothing = True
            logger.warning(
                "step %d learns no token, as loss_on=%s finds none in its contexts; later ones are not reported",
                self.state.global_step + 1,
                self.args.loss_on,
            )
        return torch.as_tensor(num_items).clamp(min=1)

    def prepare_batches(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """What a method does to the micro-batches of a step before their contexts are mixed: nothing, here."""
        return batches

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self._looked = False  # at the weights of a checkpoint
        if self.args.world_size > 1 and self.model.__dict__.pop("_is_accelerate_prepared", False):
            # By an evaluation; accelerate would take it as it is, and each process would train alone.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self._engine.check_first(resumes=bool(resume_from_checkpoint))
        self._between.begin()
        forget_steps(self.model)  # of a run that an exception has ended
        try:
            if resume_from_checkpoint and self.is_deepspeed_enabled:  # which loads it in its own way
                self._go_on_from(resume_from_checkpoint)
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            self._stop_unless_weights_finite()
            return output
        finally:
            _OF_TRAINER.removeFilter(_but_for_empty_epochs)
            self._step = Step()  # where the last one failed or was broken off
            shard_again(self.model)
            self.generator.release()

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if not self._nothing_left:  # then, the run before has done it
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _issue_warnings_after_load(self, load_result):
        """Miss no weight that is tied to another one: a checkpoint has it once."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.meter.save(Path(output_dir), self.args.process_index, self._globalstep_last_logged)
        self._self_prob.save(Path(output_dir))

    def _go_on_from(self, checkpoint: str) -> None:
        """Take from a checkpoint what steps before it have counted."""
        self._self_prob.load(Path(checkpoint))
        self._logged_at = self.meter.load(Path(checkpoint), self.args.process_index)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._step.ready == 0:
            self._mix_next()
        if self._step.ready == 0:
            raise RuntimeError(
                "training_step got a micro-batch without contexts, and would train on references alone: transformers' "
                "Trainer did not hand this step's micro-batches to get_batch_samples, which makes the contexts. "
                "Install a version of transformers that selfgen supports, or call get_batch_samples before "
                "training_step"
            )
        if self.args.world_size > 1 and not self._engine.holds(model):
            raise RuntimeError(
                f"this is one of {self.args.world_size} processes, but the model is not wrapped for them, so each "
                "would train alone: make a new trainer, with a model that no other has prepared"
            )
        # Weights were gathered for the passes, and are as they were until the optimizer's step.
        whole = self._engine.is_sharded and self._step.runs_passes and not self._engine.stay_sharded
        whole = whole and not self._between.may_change
        last = self.accelerator.sync_gradients
        try:
            with self._engine.backward_apart(), kept_whole(self.model, last=last) if whole else nullcontext():
                loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._step.trained()
        if not self._engine.scales_loss and not math.isfinite(float(loss)):  # it leaves such steps out
            raise diverged(self.state.global_step + 1, f"the loss is {float(loss)}")
        self._self_prob.trained(loss)
        return self.meter.step_loss(loss)

    def _defer_fsdp_gradient_reduction(self):
        if has_partial_gradients(self.model):  # a hook would sum what micro-batches have accumulated
            return nullcontext()
        return super()._defer_fsdp_gradient_reduction()

    def _stop_unless_weights_finite(self) -> None:
        broken = not_finite(self.model, trainable_only=True)
        if self._engine.splits_weights:  # each process sees its own part
            broken = next(filter(None, meet(say=broken)), None)
        if broken:
            raise diverged(self.state.global_step, f"{broken} has values that are not finite (NaN or inf)")

    def _mix_next(self) -> None:
        """Make the next contexts of the step."""
        batches = self._step.take(self.args.context_micro_batches)
        if not batches:
            return
        self.meter.contexts_begin()
        self._step.runs_passes = self._runs_passes()  # a callback may change it before the training forward
        runs = self._step.runs_passes or self._looks_now or not self._engine.is_sharded
        if self._step.runs_passes:
            self._agree_on_budget()
        keep = self._engine.is_sharded and not self._between.may_change
        with self._whole_weights(keep=keep) if runs or self._loss_looks else nullcontext():
            if self._loss_looks:
                self._look_at_loss()
            if runs:  # a forward of the whole model
                self._check_causal(batches)
            self._before_contexts(batches)
            stats, self._step.passes = self.mix(batches)
        self._between.look(reused=self._reuse.agree(self._step))
        self.meter.contexts_end(stats, made=self._step.runs_passes)

    def _before_contexts(self, batches: list[dict[str, Tensor]]) -> None:
        """Keep what is needed of the references that contexts are about to be written over: nothing, here."""

    def _agree_on_budget(self) -> None:
        """Once: where passes gather weights, all processes measure at the same time what a pass costs."""
        self._engine.choose_weights(self.model)
        if self._engine.stay_sharded and not self._budget_agreed:
            self._budget_agreed = True
            with self._whole_weights(), self._engine.autocast():
                _ = self.generator.budget
            self.generator.agree_on_budget(self._engine.together)

    def _runs_passes(self) -> bool:
        """Whether making the contexts of this step runs the model, in one process as in all."""
        return self.self_prob_now > 0

    @property
    def self_prob_now(self) -> float:
        """The self-probability of the step that is under way, or comes next; it is the same in all processes."""
        return self._self_prob.at(self.state.global_step, self.state.max_steps, self.schedule)

    def mix(self, batches: list[dict[str, Tensor]]) -> tuple[ContextStats, RowSlots | None]:
        """Write mixed contexts over the answers in ``input_ids``, for all micro-batches at once; labels stay.

        Returns what the contexts are like and cost, and, if the step may reuse it, what their passes computed.
        """
        self_prob = self.self_prob_now
        rows = [rows_of(batch) for batch in batches]
        if self_prob == 0.0:
            of_all = [row for part in rows for row in part]  # none, where a step learns nothing
            stats = ContextStats.untouched([len(row.prompt) for row in of_all], [len(row.reference) for row in of_all])
            self._self_prob.mixed(self_prob, stats)
            return stats, None
        unique = unique_rows([row for part in rows for row in part])
        mixed = self.make_contexts(unique, self_prob)
        self._self_prob.mixed(self_prob, mixed.stats)
        place = {row.sample_id: index for index, row in enumerate(unique)}
        for row in (row for part in rows for row in part):
            row.answer.copy_(mixed.tokens[place[row.sample_id]])
            if learn := LEARN_ON.get(self.args.loss_on):
                learn(row.labels, mixed.is_self[place[row.sample_id]])
        return mixed.stats, None if mixed.hidden_states is None else RowSlots(mixed.hidden_states, unique)

    def make_contexts(self, rows: list[Row], self_prob: float) -> MixedContext:
        """The mixed contexts of a step's rows, whose sample ids all differ, with the current weights.

        A subclass may make them in another way. If it keeps hidden states, these must be those of a forward over the
        contexts with the weights of this step.
        """

        def contexts() -> MixedContext:
            return self.generator.contexts(
                [row.prompt for row in rows],
                [row.reference for row in rows],
                self_prob,
                seed=step_seed(self.args.seed, self.state.global_step),
                sample_ids=[row.sample_id for row in rows],
                method=self.args.context_method,
                may_be_self=[row.labels != IGNORE_INDEX for row in rows],
                keep_hidden_states=self._reuse.on,
            )

        with self._engine.autocast():
            try:
                return contexts()
            except ReuseError as reason:
                self._reuse.off(reason)
                return contexts()

    def _ids_guessed_from(self) -> int | None:
        """How many ids a uniform guess chooses from; None where the loss is no mean of cross-entropies alone."""
        return None

    def _look_again(self) -> None:
        """From time to time: what a model computes may depend on weights, or on a setting that changed."""
        step, made_anew = self.state.global_step, self._between.made_anew()  # which is told of each step
        regular = not self._looked or step % _LOOK_EVERY == 0 or made_anew
        self._looks_now = regular or step == _FIRST_LOOK
        if self._looks_now:
            self._looked = True
            self._reuse.look_again()
            self.generator.look_again()
        self._loss_looks = regular or step & (step - 1) == 0  # powers of two, as this look is cheap

    def _look_at_loss(self) -> None:
        """A look at what the loss takes for granted, from time to time: at nothing, here."""

    def _check_causal(self, batches: list[dict[str, Tensor]]) -> None:
        """The loss of a model that sees the answer teaches nothing."""
        longest = max((batch["input_ids"].shape[1] for batch in batches), default=0)
        try:
            with self._engine.autocast():
                self.generator.check_causal(longest, in_training=True)
        except UnsupportedModelError as error:
            raise type(error)(f"at step {self.state.global_step + 1}: {error}") from error

    def _loss_of_step(self, model: torch.nn.Module, loss: Loss, batch: dict[str, Tensor]) -> Any:
        """``loss`` of ``model``, over what the passes computed for ``batch`` if the step reuses that.

        It may be called several times, as trying that compares losses.
        """
        if not model.training:
            return loss(model)
        if who := self._between.changed():
            self._step.passes = None
            self._reuse.off(f"the model was changed after its contexts had been made ({who})")
        return self._reuse.loss(model, loss, self._step, batch, tries=self._step.runs_passes, unused=self._unused)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            in_step = self.meter.counts["passes_in_step"] / max(1, self.meter.steps)
            logs.update(self.meter.flush())
            if self._engine.stay_sharded:
                logs["passes_in_step"] = in_step
        super().log(logs, start_time)


def step_seed(seed: int, step: int, stream: int = 0) -> int:
    """One 64-bit seed for each (seed, optimizer step): contexts change with the step, and a resumed run repeats them.

    ``stream`` 1 is for what a step draws besides its contexts.
    """
    return (seed & 0xFFFFFFFF) << 32 | (stream & 1) << 31 | (step & 0x7FFFFFFF)


def check_processes(world_size: int) -> None:
    """Raise ValueError in one of several processes that would train alone: accelerate joins CPUs only if asked to."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size < started:
        raise ValueError(
            f"this is one of {started} processes, but each would train alone; to train together on CPUs, give --use-cpu"
        )
